"""Distilling in ComfyUI's own page: a template is opened and run, cancelled and resumed; and the pictures of it."""

import copy
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Frontend, open_page
from PIL import Image
from saved_workflows import SIZE, SMALL
from stand_ins import StandIns
from test_host_workflows import DISTILLING, SAVING

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK
from trajectory_consistency.trainer.models.unet.checkpoint import TINY_PATH
from trajectory_consistency.trainer.tiny import world

pytestmark = [pytest.mark.host, pytest.mark.browser]

TEXT_TO_IMAGE = "tcd-sd15-text-to-image"
WORKFLOWS = {
    name: json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for name in (*DISTILLING, TEXT_TO_IMAGE)
}
FROM_PICTURES = DISTILLING[0]
CANCELLED = {**SMALL, "TCDDistill": {**SMALL["TCDDistill"], "training_steps": 60}}

# For the pictures: the demo's tiny model, which draws shapes on patterned backgrounds.
TINY = "tiny-sd.safetensors"
GUIDANCE = 1.5
TRAINED = {
    **SMALL,
    "TCDDistill": {
        **{"training_steps": 200, "batch": 8, "accumulate": 1, "rank": 32, "learning_rate": 2e-3, "preview_every": 20},
        **{"guidance_min": GUIDANCE, "guidance_max": GUIDANCE, "width": SIZE, "height": SIZE},
    },
    "KSampler": {"cfg": GUIDANCE},
}
TRAINING_MS = 600_000
PICTURE_WIDTH, DOCS_WIDTH = 1280, 1600


@pytest.fixture(scope="module")
def frontend(server: ComfyServer, stand_ins: StandIns, chromium: Path) -> Iterator[Frontend]:
    """The page with the first workflow open, and the files that the workflows name."""
    with open_page(chromium, server, stand_ins, WORKFLOWS, TEXT_TO_IMAGE) as frontend:
        yield frontend


def test_a_template_is_run_cancelled_and_resumed(frontend: Frontend, server: ComfyServer) -> None:
    content = frontend.open_templates()
    content.get_by_test_id(f"template-workflow-{FROM_PICTURES}").click()
    content.wait_for(state="hidden")
    frontend.set_widgets(CANCELLED)
    frontend.press_run()
    assert re.fullmatch(r"Step \d+ of 60, loss \d\.\d+, .+ left", frontend.wait_for_preview("TCDDistill"))
    frontend.cancel_run()
    step = wait_for_line(server, r"stopped after step (\d+)")
    saved = next(picture for picture in frontend.run() if picture["type"] in SAVING)
    assert (saved["width"], saved["height"]) == (2 * SIZE + 8, SIZE)
    assert f"resuming at step {step} of 60" in server.log_text()
    assert (server.models / "loras" / "tcd-from-pictures_00001_.safetensors").is_file()
    assert frontend.errors == []


def wait_for_line(server: ComfyServer, pattern: str, timeout_s: float = 60) -> str:
    """Wait until the last match of a pattern stands in the host's log, and return its group."""
    deadline = time.monotonic() + timeout_s
    while not (found := re.findall(pattern, server.log_text())):
        assert time.monotonic() < deadline, f"{pattern} is not in the log"
        time.sleep(0.1)
    last: str = found[-1]
    return last


@pytest.mark.pictures
@pytest.mark.parametrize("name", DISTILLING)
def test_pictures_of_distilling_are_made_on_request(
    frontend: Frontend, server: ComfyServer, pytestconfig: pytest.Config, name: str
) -> None:
    """Run each workflow on the tiny model; its thumbnail is the workflow as saved, with the pictures of that run."""
    folder = Path(pytestconfig.getoption("--pictures"))
    provide_tiny(server)
    frontend.page.evaluate("app.refreshComboInNodes()")
    frontend.load(tiny(WORKFLOWS[name]))
    frontend.set_widgets(TRAINED)
    frontend.press_run()
    if name == FROM_PICTURES:
        while not frontend.wait_for_preview("TCDDistill").startswith("Step 2"):
            time.sleep(0.5)
        frontend.photograph(folder / "docs" / "distil-in-the-graph.jpg", width=DOCS_WIDTH)
    frontend.wait_for_pictures(TRAINING_MS)
    outputs = enlarged(server)
    if name == FROM_PICTURES:
        frontend.show(outputs)
        frontend.photograph(folder / "docs" / "distilled-in-the-graph.jpg", width=DOCS_WIDTH)
    frontend.load(WORKFLOWS[name])
    frontend.show(outputs)
    frontend.photograph(folder / "workflows" / f"{name}.jpg", width=PICTURE_WIDTH)


@pytest.mark.pictures
def test_a_picture_of_sampling_is_made_on_request(
    frontend: Frontend, server: ComfyServer, pytestconfig: pytest.Config
) -> None:
    """Sample the tiny model with the LoRA that the test before has distilled."""
    *_, lora = sorted((server.models / "loras").glob("tcd-from-pictures_*"))
    graph = tiny(WORKFLOWS[TEXT_TO_IMAGE])
    (loader,) = [node for node in graph["nodes"] if node["type"] == "TCDLoraLoader"]
    loader["widgets_values"][0] = lora.name
    del loader["properties"]["models"]
    frontend.page.evaluate("app.refreshComboInNodes()")
    frontend.load(graph)
    frontend.set_widgets(SMALL)
    frontend.run()
    frontend.show(enlarged(server))
    frontend.photograph(Path(pytestconfig.getoption("--pictures"), "docs", "comfyui.jpg"), width=PICTURE_WIDTH)


def enlarged(server: ComfyServer, factor: int = 8) -> dict[str, Any]:
    """Return the outputs of the last run, after enlarging its saved pictures, which are small."""
    (last,) = server.get("/history?max_items=1").values()
    outputs: dict[str, Any] = last["outputs"]
    for output in outputs.values():
        for file in output.get("images", []):
            if file["type"] == "output":
                path = server.output / file["subfolder"] / file["filename"]
                with Image.open(path) as picture:
                    larger = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
                larger.save(path)
    return outputs


def provide_tiny(server: ComfyServer) -> None:
    """Give the host the tiny model, and pictures of its world in place of the user's."""
    shutil.copyfile(TINY_PATH, server.models / "checkpoints" / TINY)
    (loader,) = [node for node in WORKFLOWS[FROM_PICTURES]["nodes"] if node["type"].startswith("LoadImageText")]
    world.write_folder(server.base / "input" / loader["widgets_values"][0], 256, seed=0)


def tiny(workflow: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow for the tiny model: with its checkpoint, its VAE's own loader, and captions of its world."""
    graph = copy.deepcopy(workflow)
    captions = iter(scene.caption for scene in world.random_scenes(len(graph["nodes"]), seed=3))
    for node in graph["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            node["widgets_values"] = [TINY]
            node["outputs"][2]["links"] = []
            del node["properties"]["models"]
        if node["type"] == "CLIPTextEncode" and node["widgets_values"][0]:
            node["widgets_values"] = [next(captions)]
        if node["type"] == "LoraLoader":
            node["widgets_values"][1:] = [0.0, 0.0]  # there is no style LoRA for it
    key = graph["last_node_id"] = graph["last_node_id"] + 1
    links = [link for link in graph["links"] if link[5] == "VAE"]
    for link in links:
        link[1:3] = key, 0
    outputs = [{"name": "VAE", "type": "VAE", "links": [link[0] for link in links]}]
    loader = {
        "id": key,
        "type": "TinyShapesVAE",
        "pos": [0, -120],
        "size": [340, 60],
        "flags": {},
        "order": 0,
        "mode": 0,
    }
    graph["nodes"].append({**loader, "inputs": [], "outputs": outputs, "properties": {}, "widgets_values": [TINY]})
    return graph
