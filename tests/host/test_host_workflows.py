"""The workflows that the host's template browser shows: sound as files, and they run as they are."""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from loras import random_lora
from PIL import Image
from safetensors.torch import save_file

from trainer import bases, ldm
from trainer.demo.comfy_server import PACK, PACK_NAME, ComfyServer

WORKFLOWS = {path.stem: path for path in (PACK / "workflows").glob("*.json")}
NOTES = {"Note", "MarkdownNote"}  # nodes of the browser alone
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
MODEL_KEYS = {"name", "url", "directory"}


def _read(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads(WORKFLOWS[name].read_text(encoding="utf-8"))
    return workflow


def api_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a workflow as the browser saves it into a prompt, as the browser does when it is run."""
    sources = {link: [str(node), slot] for link, node, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            linked = {slot["name"]: sources[slot["link"]] for slot in node["inputs"]}
            typed = _widget_values(node, object_info[node["type"]])
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": typed | linked}
    return prompt


def _widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    values = iter(node["widgets_values"])
    found = {}
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            if isinstance(kind, list) or kind in WIDGETS:
                found[name] = next(values)
                if options and options[0].get("control_after_generate"):
                    assert next(values) in {"fixed", "increment", "decrement", "randomize"}
    assert list(values) == [], f"{node['type']} has more values than widgets"
    return found


@pytest.mark.parametrize("name", WORKFLOWS)
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


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nodes_say_where_they_and_their_models_come_from(name: str) -> None:
    for node in _read(name)["nodes"]:
        if node["type"] in NOTES:
            continue
        properties = node["properties"]
        assert properties["cnr_id"] == (PACK_NAME if node["type"].startswith("TCD") else "comfy-core")
        assert properties["ver"] and properties["Node name for S&R"] == node["type"]
        if node["type"] in {"CheckpointLoaderSimple", "TCDLoraLoader"}:
            (model,) = properties["models"]
            assert set(model) == MODEL_KEYS
            assert model["name"] == node["widgets_values"][0], "or the browser does not offer the download"
            assert model["url"].startswith("https://huggingface.co/"), "one of the few that the browser offers"
            assert model["url"].endswith("/" + model["name"]), "the browser saves it under the address's name"
            assert model["directory"] == {"CheckpointLoaderSimple": "checkpoints"}.get(node["type"], "loras")


def test_no_other_json_is_taken_for_a_workflow() -> None:
    assert sorted(WORKFLOWS) == ["tcd-sd15-text-to-image"]


@pytest.mark.host
def test_the_host_lists_them(server: ComfyServer) -> None:
    assert sorted(server.get("/workflow_templates")[PACK_NAME]) == sorted(WORKFLOWS)


@pytest.fixture(scope="module")
def stand_ins(server: ComfyServer, unet: UNet2DConditionModel) -> Iterator[None]:
    """The files that the workflow names, of random weights: SD 1.5's text encoder and VAE in full, the mini UNet."""
    torch.manual_seed(0)
    tensors = ldm.unet_to_ldm(unet.state_dict(), unet.config)
    vae, text_encoder = bases.empty_vae("sd15"), bases.empty_text_encoder("sd15")
    tensors |= ldm.vae_to_ldm(vae.state_dict(), vae.config) | ldm.text_to_ldm(text_encoder.state_dict())
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items() if tensor.is_floating_point()}
    checkpoint = server.models / "checkpoints" / "v1-5-pruned-emaonly-fp16.safetensors"
    save_file(halves, checkpoint)
    settings = {"tcd.steps": "2", "tcd.eta": "0.5", "tcd.cfg": "1.0"}
    save_file(random_lora(unet), server.models / "loras" / "pytorch_lora_weights.safetensors", metadata=settings)
    yield
    with suppress(PermissionError):  # it is 450 MB; Windows keeps it while the host has it open
        checkpoint.unlink()


@pytest.mark.host
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_runs(server: ComfyServer, name: str) -> None:
    prompt = api_prompt(_read(name), server.get("/object_info"))
    for node in prompt.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"] |= {"width": 64, "height": 64}  # all that is not as in the file
    before = len(server.log_text())
    outputs = server.run(prompt)
    (save,) = [node_id for node_id, node in prompt.items() if node["class_type"] == "SaveImage"]
    (file,) = outputs[save]["images"]
    assert Image.open(io.BytesIO(server.fetch(file))).size == (64, 64)
    log = server.log_text()[before:]
    assert "2/2 [" in log, "the steps are those that the LoRA file recommends"
    assert "not loaded" not in log.lower()
