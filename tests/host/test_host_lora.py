"""TCDLoraLoader: the whole LoRA and its settings, or an error and nothing."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from graphs import Graph, Node, host_noise, latents, relative_error, sampled, shown
from loras import MODULES, RANK, merged, random_lora, targets
from reference import tcd_scheduler_sample
from safetensors.torch import save_file
from torch import Tensor

from tcd import timestep_grid
from trainer.demo.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.host


def _write(
    server: ComfyServer, name: str, lora: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    save_file(dict(lora), server.models / "loras" / name, metadata=dict(metadata or {}) or None)
    return name


def _loader(graph: Graph, name: str, strength: Any = 1.0) -> Node:
    return graph.add("TCDLoraLoader", model=graph.checkpoint()[0], lora_name=name, strength_model=strength)


def _sampled_with(server: ComfyServer, name: str, strength: float = 1.0) -> Tensor:
    graph = Graph()
    node = graph.sampler_custom(model=_loader(graph, name, strength)[0], seed=1)
    return latents(server, graph, graph.save(node[0]))[0]


def _expected(unet: UNet2DConditionModel) -> Tensor:
    return tcd_scheduler_sample(unet, host_noise(1), timestep_grid(4), eta=0.3, seed=1)


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_equals_the_merged_model(server: ComfyServer, unet: UNet2DConditionModel, strength: float) -> None:
    lora = random_lora(unet)
    assert len(lora) == 3 * MODULES, "all of the mini UNet's modules of the 14 targets"
    name = _write(server, "whole.safetensors", lora)
    before = len(server.log_text())
    found = _sampled_with(server, name, strength)
    assert relative_error(found, _expected(merged(unet, lora, strength))) < 1e-3
    assert relative_error(found, _expected(unet)) > 0.05
    log = server.log_text()[before:]
    assert "lora key not loaded" not in log
    assert "NOT LOADED" not in log
    assert "ERROR lora" not in log


def test_strength_0_leaves_the_model(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    name = _write(server, "whole.safetensors", random_lora(unet))
    assert torch.equal(_sampled_with(server, name, 0.0), sampled(server, seed=1))


def test_strength_0_asks_for_no_fit(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    name = _write(server, "xl.safetensors", _wider(random_lora(unet)))
    assert torch.equal(_sampled_with(server, name, 0.0), sampled(server, seed=1))


def test_the_model_that_came_in_is_left_alone(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    graph = Graph()
    with_lora = _loader(graph, _write(server, "whole.safetensors", random_lora(unet)))
    after = graph.add("TCDLoraLoader", model=with_lora[0], lora_name="whole.safetensors", strength_model=0.0)
    patched = graph.sampler_custom(model=after[0], seed=1)
    base = graph.sampler_custom(model=graph[with_lora.id]["inputs"]["model"], seed=1)
    found = latents(server, graph, graph.save(patched[0]), graph.save(base[0]))
    assert relative_error(found[0], _expected(unet)) > 0.05
    assert relative_error(found[1], _expected(unet)) < 1e-4


def test_two_loras_add_up(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    one, two = random_lora(unet, 1), random_lora(unet, 2)
    graph = Graph()
    first = _loader(graph, _write(server, "one.safetensors", one), 0.5)
    name = _write(server, "two.safetensors", two)
    second = graph.add("TCDLoraLoader", model=first[0], lora_name=name, strength_model=0.5)
    node = graph.sampler_custom(model=second[0], seed=1)
    found = latents(server, graph, graph.save(node[0]))[0]
    assert relative_error(found, _expected(merged(merged(unet, one, 0.5), two, 0.5))) < 1e-3


def test_a_replaced_file_is_noticed(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    _sampled_with(server, _write(server, "replaced.safetensors", random_lora(unet, 1)))
    other = random_lora(unet, 2)
    found = _sampled_with(server, _write(server, "replaced.safetensors", other))
    assert relative_error(found, _expected(merged(unet, other, 1.0))) < 1e-3


@pytest.mark.parametrize(
    ("metadata", "settings"),
    [
        (None, [4, 0.3, 1.0]),
        ({"tcd.steps": "8", "tcd.eta": "0.75", "tcd.cfg": "1.5"}, [8, 0.75, 1.5]),
        ({"tcd.eta": "0"}, [4, 0.0, 1.0]),
    ],
)
def test_settings_of_the_file(
    server: ComfyServer, unet: UNet2DConditionModel, metadata: dict[str, str] | None, settings: list[float]
) -> None:
    graph = Graph()
    node = _loader(graph, _write(server, "settings.safetensors", random_lora(unet), metadata))
    shows = [graph.show(node[output]) for output in (1, 2, 3)]
    outputs = server.run(graph)
    assert [outputs[show.id]["values"][0] for show in shows] == settings


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tcd.steps": "four"}, "tcd.steps in the metadata of bad.safetensors is 'four', but must be a number"),
        ({"tcd.steps": "0"}, "tcd.steps in the metadata of bad.safetensors is 0, but must be from 1 to 50"),
        ({"tcd.eta": "nan"}, "tcd.eta in the metadata of bad.safetensors is nan, but must be from 0 to 1"),
        ({"tcd.cfg": "-1"}, "tcd.cfg in the metadata of bad.safetensors is -1.0"),
    ],
)
def test_bad_settings(server: ComfyServer, unet: UNet2DConditionModel, metadata: dict[str, str], message: str) -> None:
    _fails(server, _write(server, "bad.safetensors", random_lora(unet), metadata), message)


def _wider(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA as if its model had SDXL's text encoders: 2048 channels of cross-attention in place of 768."""

    def widen(name: str, tensor: Tensor) -> Tensor:
        is_cross = "attn2_to_k.lora_down" in name or "attn2_to_v.lora_down" in name
        return torch.zeros(RANK, 2048) if is_cross else tensor

    return {name: widen(name, tensor) for name, tensor in lora.items()}


def test_another_architecture_by_its_metadata(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    name = _write(server, "xl.safetensors", _wider(random_lora(unet)), metadata)
    _fails(server, name, "the file is for stable-diffusion-xl-v1-base/lora, the model is SD15")


def test_another_architecture_by_its_shapes(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    message = _fails(server, _write(server, "xl.safetensors", _wider(random_lora(unet))), "the file is for SDXL")
    assert "the model is SD15. 57 of 65 LoRA modules fit the model; wrong shape: " in message
    assert "is 320 x 2048, but the model has 320 x 768" in message


def test_another_architecture_by_its_names(server: ComfyServer) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    lora = {f"{name}.lora_down.weight": torch.zeros(4, 3072), f"{name}.lora_up.weight": torch.zeros(9216, 4)}
    message = _fails(server, _write(server, "flux.safetensors", lora), "the file is for a model of unknown kind")
    assert f"not in the model: {name}" in message


def test_a_partial_fit_is_refused_and_nothing_applied(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    lora = random_lora(unet)
    lora["tcd_other.weight"] = torch.zeros(1)
    _fails(server, _write(server, "partial.safetensors", lora), "65 of 66 LoRA modules fit the model; not in the model")
    assert relative_error(sampled(server, seed=1), _expected(unet)) < 1e-4


def test_names_that_the_host_would_apply_in_part(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    lora = {f"unet.{path}.lora_{side}.weight": torch.zeros(RANK, RANK) for path in targets(unet) for side in ("A", "B")}
    _fails(server, _write(server, "peft.safetensors", lora), "0 of 130 LoRA modules fit the model")


def test_half_a_module(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    lora = random_lora(unet)
    del lora["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"]
    _fails(server, _write(server, "half.safetensors", lora), "conv1 has no lora_up.weight: the LoRA is damaged")


def test_truncated_file(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path = server.models / "loras" / _write(server, "cut.safetensors", random_lora(unet))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _fails(server, path.name, "cut.safetensors cannot be read: it is damaged, incomplete or not a file of tensors")


@pytest.mark.parametrize("name", ["words.safetensors", "words.pt"])
def test_a_file_of_something_else(server: ComfyServer, name: str) -> None:
    Path(server.models, "loras", name).write_text("<!doctype html>", encoding="utf-8")
    _fails(server, name, f"{name} cannot be read")


def test_a_pickle_is_not_executed(server: ComfyServer, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"lora": Bomb()}, server.models / "loras" / "bomb.pt")
    _fails(server, "bomb.pt", "bomb.pt cannot be read")
    assert not (tmp_path / "executed").exists()


def test_a_pickle_of_something_else(server: ComfyServer) -> None:
    torch.save({"epoch": 3, "loss": [0.5]}, server.models / "loras" / "numbers.pt")
    _fails(server, "numbers.pt", "numbers.pt is not a LoRA: it holds something other than named tensors")


@pytest.mark.parametrize("strength", [math.nan, "inf"])
def test_bad_strength(server: ComfyServer, unet: UNet2DConditionModel, strength: Any) -> None:
    name = _write(server, "whole.safetensors", random_lora(unet))
    _fails(server, name, f"strength_model is {float(strength)}, but must be from -100 to 100", strength)


def _fails(server: ComfyServer, name: str, message: str, strength: Any = 1.0) -> str:
    """Check that the node fails with the message, and return all of it."""
    graph = Graph()
    link = graph.add("TestFloat", text=strength)[0] if isinstance(strength, str) else strength
    with pytest.raises(ComfyError) as caught:
        shown(server, graph, _loader(graph, name, link)[1])
    assert caught.value.node_type == "TCDLoraLoader"
    assert message in str(caught.value)
    return str(caught.value)
