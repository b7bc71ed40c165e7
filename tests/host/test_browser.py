"""ComfyUI's own page in a browser: the workflows open and run there, and errors are shown to the user."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Frontend, open_page
from safetensors.torch import save_file
from saved_workflows import SMALL, api_prompt
from stand_ins import StandIns
from test_host_workflows import DISTILLING, NAMES, SAVING

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK

pytestmark = [pytest.mark.host, pytest.mark.browser]

WORKFLOWS = {name: json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}
FIRST = "tcd-sd15-text-to-image"
OLDER = Path(__file__).parent / "data" / "older_nodes"
REPLACED = {  # the type in the file, and the node and widgets that replace it
    "TCDModelSamplingDiscrete": ("TCDSamplingSetup", {"steps": 2, "scheduler": "simple", "denoise": 0.8, "eta": 0.6}),
    "TCDScheduler": ("TCDSigmas", {"steps": 3, "denoise": 1.0, "timesteps": ""}),
    "SamplerTCD": ("TCDSampler", {"eta": 0.6}),
    "SamplerTCD EulerA": ("TCDSampler", {"eta": 0.6}),
}
PICTURE_WIDTH = 1280
HELP = PACK / "nodes" / "web" / "docs"
NODES = (
    *("TCDSampler", "TCDSigmas", "TCDSamplingSetup", "TCDLoraLoader", "TCDModelSettings"),
    *("TCDDistill", "TCDSaveLora", "TCDLoraModelLoader"),
)


@pytest.fixture(scope="module")
def frontend(server: ComfyServer, stand_ins: StandIns, chromium: Path) -> Iterator[Frontend]:
    """The page with the first workflow open; every file that a workflow names exists before the page requests lists."""
    with open_page(chromium, server, stand_ins, WORKFLOWS, FIRST) as frontend:
        yield frontend


@pytest.fixture(autouse=True)
def _leave_nothing_behind(frontend: Frontend) -> Iterator[None]:
    yield
    frontend.close_dialogs()
    frontend.errors.clear()


def assert_as_saved(found: dict[str, Any], workflow: dict[str, Any]) -> None:
    """Assert that the page's graph equals a file's in nodes, titles, widgets and links; newer widgets come last."""
    nodes, saved = ({node["id"]: node for node in graph["nodes"]} for graph in (found, workflow))
    assert nodes.keys() == saved.keys()
    for key, node in saved.items():
        assert nodes[key]["type"] == node["type"] and nodes[key].get("title") == node.get("title")
        values = node.get("widgets_values", [])
        assert nodes[key].get("widgets_values", [])[: len(values)] == values, node["type"]
    assert wires(found) == wires(workflow)


def wires(graph: dict[str, Any]) -> list[list[Any]]:
    """Return [from, output, to, input, type] of a graph's links, by slot name, because the page renumbers slots."""
    at = {node["id"]: node for node in graph["nodes"]}
    return sorted(
        [start, at[start]["outputs"][i]["name"], end, at[end]["inputs"][j]["name"], kind]
        for _, start, i, end, j, kind in graph["links"]
    )


def test_the_url_of_a_template_opens_it(frontend: Frontend) -> None:
    assert_as_saved(frontend.graph(), WORKFLOWS[FIRST])
    assert frontend.errors == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_as_it_was_saved_and_runs(
    frontend: Frontend,
    server: ComfyServer,
    stand_ins: StandIns,
    name: str,
) -> None:
    workflow = WORKFLOWS[name]
    stand_ins.provide(workflow)
    frontend.load(frontend.served(name))
    assert_as_saved(frontend.graph(), workflow)
    assert frontend.prompt() == api_prompt(workflow, server.get("/object_info"))
    frontend.set_widgets(SMALL)
    saved = next(picture for picture in frontend.run() if picture["type"] in SAVING)
    assert saved["width"] >= saved["height"] >= 64
    assert frontend.errors == []


@pytest.mark.pictures
@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name not in DISTILLING])
def test_pictures_of_the_workflows_are_made_on_request(
    frontend: Frontend, stand_ins: StandIns, pytestconfig: pytest.Config, name: str
) -> None:
    folder = Path(pytestconfig.getoption("--pictures"), "workflows")
    stand_ins.provide(WORKFLOWS[name])
    frontend.load(frontend.served(name))
    folder.mkdir(exist_ok=True)
    frontend.photograph(folder / f"{name}.jpg", width=PICTURE_WIDTH)  # not run: it would be noise
    assert frontend.errors == []


def test_the_template_browser_shows_every_workflow_with_its_picture(frontend: Frontend) -> None:
    content = frontend.open_templates()
    for name in WORKFLOWS:
        card = content.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()  # a picture is fetched when it is scrolled into view
        card.locator('img[src^="blob:"]').wait_for()  # otherwise it is the page's default picture
    assert frontend.errors == []
    content.get_by_test_id(f"template-workflow-{FIRST}").click()
    content.wait_for(state="hidden")
    assert_as_saved(frontend.graph(), WORKFLOWS[FIRST])


def test_missing_models_are_offered_for_download(frontend: Frontend) -> None:
    graph = copy.deepcopy(WORKFLOWS[FIRST])
    models = [model for node in graph["nodes"] for model in node["properties"].get("models", [])]
    for node in graph["nodes"]:
        for model in node["properties"].get("models", []):
            model["name"] = node["widgets_values"][0] = f"absent-{model['name']}"
    frontend.load(graph)
    panel = frontend.details()
    rows = frontend.page.get_by_test_id("missing-model-importable-rows").inner_text()
    assert "Missing Models" in panel
    for model in models:
        assert model["name"] in rows and model["directory"] in rows
    assert frontend.page.get_by_test_id("missing-model-download").count() == len(models)


def test_a_missing_node_is_reported(frontend: Frontend) -> None:
    graph = copy.deepcopy(WORKFLOWS[FIRST])
    graph["nodes"][6]["type"] = "NoSuchSampler"
    frontend.load(graph)
    assert "Missing Node Packs" in frontend.details()


def test_a_lora_for_a_different_model_is_refused_with_our_message(frontend: Frontend, server: ComfyServer) -> None:
    up, down = torch.ones(9216, 4), torch.ones(4, 3072)
    prefix = "lora_unet_double_blocks_0_img_attn_qkv"
    lora = {f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down}
    save_file(lora, server.models / "loras" / "other.safetensors")
    frontend.page.evaluate("app.refreshComboInNodes()")
    graph = copy.deepcopy(WORKFLOWS[FIRST])
    (loader,) = [node for node in graph["nodes"] if node["type"] == "TCDLoraLoader"]
    loader["widgets_values"][0] = "other.safetensors"
    del loader["properties"]["models"]
    frontend.load(graph)
    frontend.press_run()
    assert "TCD LoRA Loader" in frontend.details()
    # On the page it is part of a report, which a busy ComfyUI does not always add.
    message = frontend.page.evaluate("app.lastExecutionError.exception_message")
    assert "other.safetensors does not fit the model, and nothing was applied" in message


def one_of_each() -> dict[str, Any]:
    """Return a graph with one of each of the pack's nodes, without links and titles."""
    nodes = [
        {"id": i, "type": kind, "pos": [350 * i, 0], "size": [300, 100], "flags": {}, "order": i, "mode": 0}
        for i, kind in enumerate(NODES)
    ]
    return {"last_node_id": len(nodes), "last_link_id": 0, "nodes": nodes, "links": [], "version": 0.4}


def first_words(page: str) -> str:
    """Return the heading of a help page, and the start of its first sentence, up to any markup."""
    heading, text = page.splitlines()[0:3:2]
    return heading.removeprefix("# ") + "\n\n" + re.split(r"[*`\[]", text.lstrip("*"))[0]


def test_the_info_button_shows_the_help_of_each_node(frontend: Frontend) -> None:
    frontend.load(one_of_each())
    for node in NODES:
        page = (HELP / f"{node}.md").read_text(encoding="utf-8")
        assert frontend.help_page(node).startswith(first_words(page))
    assert frontend.errors == []


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_nodes_and_help_use_the_language_of_the_page(frontend: Frontend, server: ComfyServer, language: str) -> None:
    names = server.get("/i18n")[language]["nodeDefs"]
    server.post("/settings/Comfy.Locale", language)
    try:
        frontend.open_address(FIRST)
        frontend.load(one_of_each())
        for node in frontend.titles():
            assert node["title"] == names[node["type"]]["display_name"]
            inputs = {name: each["name"] for name, each in names[node["type"]]["inputs"].items()}
            assert node["inputs"] == inputs
        page = (HELP / "TCDLoraLoader" / f"{language}.md").read_text(encoding="utf-8")
        assert frontend.help_page("TCDLoraLoader").startswith(first_words(page))
    finally:
        server.post("/settings/Comfy.Locale", "en")
        frontend.open_address(FIRST)
    assert frontend.errors == []


@pytest.mark.parametrize("old", REPLACED)
def test_another_packs_node_is_replaced_on_request_and_runs(frontend: Frontend, stand_ins: StandIns, old: str) -> None:
    workflow = json.loads((OLDER / f"{old}.json").read_text(encoding="utf-8"))
    stand_ins.provide(workflow)
    new, widgets = REPLACED[old]
    frontend.load(workflow)
    assert f"{old}\nThis node will be replaced by: {new}" in frontend.replace_node()
    found = frontend.graph()
    assert ends(found) == ends(workflow)
    (node,) = [node for node in frontend.prompt().values() if node["class_type"].startswith("TCD")]
    assert node["class_type"] == new
    assert {name: value for name, value in node["inputs"].items() if not isinstance(value, list)} == widgets
    assert frontend.run()
    assert frontend.errors == []


def ends(graph: dict[str, Any]) -> list[list[Any]]:
    """Return [from, output, to, type] of a graph's links, without input slots: a new node orders its inputs itself."""
    return sorted([start, i, end, kind] for _, start, i, end, _, kind in graph["links"])
