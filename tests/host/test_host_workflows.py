"""The workflows that the host's template browser shows: the files are consistent, and they run unchanged."""

import io
import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from graphs import Graph
from loras import RANK, random_lora
from PIL import Image
from safetensors.torch import save_file
from saved_workflows import NOTES, SIZE, SMALL, api_prompt, inputs_of, widget_values
from stand_ins import RECOMMENDED_STEPS, TRAINED, StandIns

from trajectory_consistency.tcd.lora_metadata import DEFAULT_STEPS
from trajectory_consistency.trainer.demo.comfy_server import PACK_NAME, ComfyError, ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK

DISTILLING = ["distil-a-lora-from-a-folder-of-pictures", "distil-from-prompts-alone", "my-style-in-four-steps"]
NAMES = [
    "tcd-sd15-text-to-image",
    "tcd-sd15-image-to-image",
    "tcd-sd15-inpaint",
    "tcd-sd15-controlnet",
    "tcd-sd15-ksampler",
    "tcd-sd15-eta-comparison",
    "tcd-sd15-two-stage",
    "hyper-sd15-eight-steps",
    "tcd-sdxl-text-to-image",
    "tcd-sdxl-more-steps-more-detail",
    "hyper-sdxl-one-step",
    "hyper-sd3-eight-steps",
    "tcd-flux-text-to-image",
    "tcd-z-image-text-to-image",
    "tcd-qwen-image-text-to-image",
    "tcd-wan-text-to-video",
    *DISTILLING,
]
MODEL_KEYS = {"name", "url", "directory"}
DIRECTORIES = {
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "TCDLoraLoader": "loras",
    "ControlNetLoader": "controlnet",
}
SAVING = {"SaveImage", "SaveAnimatedWEBP"}
FRAMES = {"tcd-wan-text-to-video": 33}
SIZES = {  # else SIZE x SIZE
    "tcd-sd15-two-stage": (96, 96),
    "tcd-sd15-eta-comparison": (4 * SIZE + 3 * 8, SIZE),
    **dict.fromkeys(DISTILLING, (2 * SIZE + 8, SIZE)),
}
COMPLAINTS = ("not loaded", "error", "missing", "does not fit", "applied in part")  # in upper or lower case
SAMPLERS = {"SamplerCustom", "SamplerCustomAdvanced", "KSampler"}
RECOMMENDED = {"TCDLoraLoader": RECOMMENDED_STEPS, "TCDLoraModelLoader": DEFAULT_STEPS}


def _read(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return workflow


@pytest.mark.parametrize("name", NAMES)
def test_links_and_ids_are_consistent(name: str) -> None:
    workflow = _read(name)
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link[1:] for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and workflow["last_node_id"] == max(nodes)
    assert len(links) == len(workflow["links"]) and workflow["last_link_id"] == max(links)
    ends = {slot["link"]: [node, i, slot["type"]] for node in nodes for i, slot in enumerate(nodes[node]["inputs"])}
    assert ends == {link: [node, slot, kind] for link, (_, _, node, slot, kind) in links.items()}
    starts = {
        link: [node, i, slot["type"]]
        for node in nodes
        for i, slot in enumerate(nodes[node]["outputs"])
        for link in slot["links"]
    }
    assert starts == {link: [node, slot, kind] for link, (node, slot, _, _, kind) in links.items()}
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    for start, _, end, _, _ in links.values():
        assert nodes[start]["order"] < nodes[end]["order"]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_name_their_pack_and_the_sources_of_their_models(name: str) -> None:
    for node in _read(name)["nodes"]:
        if node["type"] in NOTES:
            continue
        properties = node["properties"]
        assert properties["cnr_id"] == (PACK_NAME if node["type"].startswith("TCD") else "comfy-core")
        assert properties["ver"] and properties["Node name for S&R"] == node["type"]
        has_address = node["type"] in DIRECTORIES and node["widgets_values"][0] not in TRAINED
        assert ("models" in properties) == has_address
        for model in properties.get("models", []):
            assert set(model) == MODEL_KEYS
            assert model["name"] in node["widgets_values"], "otherwise the browser does not offer the download"
            assert model["url"].startswith("https://huggingface.co/"), "only these sources are offered by the browser"
            assert model["url"].endswith("/" + model["name"]), "the browser saves the file under the name in the URL"
            assert model["directory"] == DIRECTORIES[node["type"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_note_describes_the_workflow_and_no_nodes_overlap(name: str) -> None:
    nodes = _read(name)["nodes"]
    (note,) = [node for node in nodes if node["type"] in NOTES]
    assert note["widgets_values"][0].startswith("## ")
    for i, node in enumerate(nodes):
        for other in nodes[:i]:
            assert not _overlap(node, other), f"{node['type']} and {other['type']}"


def _overlap(node: Mapping[str, Any], other: Mapping[str, Any], title: int = 30) -> bool:
    """Whether two nodes overlap; a node's title is above its position."""
    (x, y), (width, height) = node["pos"], node["size"]
    (x2, y2), (width2, height2) = other["pos"], other["size"]
    return x < x2 + width2 and x2 < x + width and y - title < y2 + height2 and y2 - title < y + height


def test_every_json_in_the_folder_is_a_workflow() -> None:
    assert sorted(path.stem for path in (PACK / "workflows").glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_picture_that_loads_fast(name: str) -> None:
    file = PACK / "workflows" / f"{name}.jpg"
    assert file.stat().st_size <= 100_000
    with Image.open(file) as image:
        assert image.format == "JPEG", "the only format that the browser requests"
        assert 640 <= image.width <= 1280
        assert max(high - low for low, high in image.getextrema()) > 100, "the picture is of one color"


def test_every_picture_belongs_to_a_workflow() -> None:
    others = [path.name for path in (PACK / "workflows").iterdir() if path.suffix not in {".json", ".jpg"}]
    assert sorted(path.stem for path in (PACK / "workflows").glob("*.jpg")) == sorted(NAMES)
    assert others == []


@pytest.mark.host
def test_the_host_lists_them(server: ComfyServer) -> None:
    assert sorted(server.get("/workflow_templates")[PACK_NAME]) == sorted(NAMES)


@pytest.mark.host
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(server: ComfyServer, stand_ins: StandIns, name: str) -> None:
    workflow = _read(name)
    stand_ins.provide(workflow)
    info = server.get("/object_info")
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            _check_widgets(node, info[node["type"]])
    prompt = api_prompt(workflow, info)
    for node in prompt.values():
        node["inputs"] |= SMALL.get(node["class_type"], {})
        if node["class_type"] == "KSampler":  # or the host would take the picture of another workflow from its cache
            node["inputs"]["seed"] = 1000 + NAMES.index(name)
    before = len(server.log_text())
    outputs = server.run(prompt)
    (save,) = [node_id for node_id, node in prompt.items() if node["class_type"] in SAVING]
    (file,) = outputs[save]["images"]
    with Image.open(io.BytesIO(server.fetch(file))) as image:
        assert image.size == SIZES.get(name, (SIZE, SIZE)) and getattr(image, "n_frames", 1) == FRAMES.get(name, 1)
        assert max(high - low for low, high in image.getextrema()) > 10, "the picture is of one color"
    log = server.log_text()[before:]
    for steps in _asked_steps(prompt):
        assert f"{steps}/{steps} [" in log
        log = log.replace(f"{steps}/{steps} [", "", 1)
    assert _complaints(log) == []


def _complaints(log: str) -> list[str]:
    """Return the lines of the host's log that report a problem with a file."""
    return [line for line in log.splitlines() if any(each in line.lower() for each in COMPLAINTS)]


@pytest.mark.host
@pytest.mark.parametrize(
    ("loader", "options", "words"),
    [
        ("LoraLoaderModelOnly", {}, ["lora key not loaded", "ERROR lora"]),
        ("TCDLoraLoader", {}, ["does not fit the model"]),
        ("TCDLoraLoader", {"allow_partial": True}, ["was applied in part"]),
    ],
)
def test_messages_about_a_lora_that_does_not_fit_are_found(
    server: ComfyServer, unet: UNet2DConditionModel, loader: str, options: dict[str, Any], words: list[str]
) -> None:
    lora = random_lora(unet)
    wide = next(name for name in lora if "attn2_to_k.lora_down" in name)
    lora[wide] = torch.zeros(RANK, 2048)  # the width of SDXL
    lora |= {f"lora_unet_nowhere.lora_{side}.weight": torch.zeros(RANK, RANK) for side in ("up", "down")}
    save_file(lora, server.models / "loras" / "strange.safetensors")
    graph = Graph()
    model = graph.checkpoint()[0]
    loaded = graph.add(loader, model=model, lora_name="strange.safetensors", strength_model=1.0, **options)[0]
    graph.save(graph.ksampler(model=loaded, steps=1)[0])
    before = len(server.log_text())
    with nullcontext() if loader != "TCDLoraLoader" or options else pytest.raises(ComfyError):
        server.run(graph)
    found = "\n".join(_complaints(server.log_text()[before:]))
    assert all(each in found for each in words)


def _check_widgets(node: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Check every widget value, including those that a link overrides, because the link may be removed."""
    for name, value in widget_values(node, info).items():
        kind, *rest = inputs_of(info)[name]
        options = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else options.get("options")
        if choices is not None:
            assert value in choices, f"{name} of {node['type']}"
        elif kind in {"INT", "FLOAT"}:
            assert type(value) in {"INT": {int}, "FLOAT": {int, float}}[kind], f"{name} of {node['type']}"
            assert options["min"] <= value <= options["max"], f"{name} of {node['type']}"


def _asked_steps(prompt: Mapping[str, Any]) -> list[int]:
    """Return the number of steps of each sampler in the prompt; if steps is a link, it is that of the LoRA loader."""
    asked = []
    for node in prompt.values():
        if node["class_type"] in SAMPLERS:
            source = node["inputs"].get("sigmas")
            inputs = prompt[source[0]]["inputs"] if source else node["inputs"]
            steps = len(inputs["timesteps"].split(",")) if inputs.get("timesteps") else inputs["steps"]
            asked.append(RECOMMENDED[prompt[steps[0]]["class_type"]] if isinstance(steps, list) else steps)
    assert asked
    return asked
