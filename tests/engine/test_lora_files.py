"""LoRA files of ComfyUI's models: what they say about their base, and that every loader gives the trained network."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from families import FAMILIES, written
from quantized_files import FLOAT8, write_float8, write_quantized
from safetensors.torch import save_file
from small_models import batch_for, each_family, load, relative, sampled_x0
from torch import nn

from trajectory_consistency.nodes import host
from trajectory_consistency.nodes.lora_file import FileStamp, LoraFile
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.files.adapter_weights import file_tensors
from trajectory_consistency.trainer.files.metadata import lora_metadata
from trajectory_consistency.trainer.files.write_lora import VerificationError, write_lora
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_row
from trajectory_consistency.trainer.models.conditioning import Conditioning

TENSORS = {
    "diffusion_model.x_embedder.lora_down.weight": torch.empty(2, 8, device="meta"),
    "diffusion_model.x_embedder.lora_up.weight": torch.empty(8, 2, device="meta"),
}


def lora_file(**metadata: str) -> LoraFile:
    named = {f"tcd.{key}": value for key, value in metadata.items()}
    return LoraFile("fast.safetensors", FileStamp("", 0, 0), TENSORS, named)


def test_the_same_base_has_no_differences() -> None:
    assert lora_file(family="SD3", shift="3").differences("SD3", 3.0) == []
    assert lora_file(family="Flux", shift="1.14988").differences("Flux", 1.1498765) == []
    assert lora_file().differences("SD3", 3.0) == [], "what the file does not say is not compared"
    assert lora_file(shift="3").differences("SD15", None) == []


def test_another_shift_and_another_family_are_told_with_what_to_do() -> None:
    (shift,) = lora_file(family="SD3", shift="3").differences("SD3", 5.0)
    assert "trained with shift 3, and the model has 5: set that of the model to 3" in shift
    (family,) = lora_file(family="Flux", shift="1.15").differences("Chroma", 1.15)
    assert "trained on Flux, and the model is Chroma: use a model of that family" in family
    assert len(lora_file(family="Flux", shift="1.15").differences("Chroma", 1)) == 2


def test_a_shift_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="tcd.shift in the metadata of fast.safetensors is 'three'"):
        lora_file(shift="three").differences("SD3", 3.0)


def config_for(name: str, path: Path) -> Config:
    base, method = FAMILIES[name].base(path), {"target_time": True}
    return from_mapping({"base": base, "data": {"folder": "in"}, "method": method, "output": {"folder": "out"}})


def trained(name: str, path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, str]]:
    """The model of a file with a random LoRA and a random embedding of the target time, and the LoRA's metadata."""
    config = config_for(name, path)
    checkpoint = open_checkpoint(config.base)
    model = checkpoint.load(dtype, torch.device("cpu"))
    weights = model.adapter.add(STUDENT, model.new_weights(rank=2, alpha=2.0, seed=0, target_input="s"))
    generator = torch.Generator().manual_seed(1)
    for parameter in weights.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    return model, lora_metadata(config, checkpoint)


BASES = {"float32": 1e-5, "bfloat16": 5e-3, "float8": 1e-3, "scaled float8": 1e-3}
"""How far ComfyUI may be from the network in training, relative; where weights have 8 bits, the LoRA is beside them."""


def base_file(kind: str, name: str, folder: Path, target: Path) -> Path:
    if kind == "float8":
        write_float8(written(name, folder), target)
    elif kind != "float32" and kind != "bfloat16":
        write_quantized(written(name, folder), target, kind, FAMILIES[name].prefix)
    else:
        return written(name, folder)
    return target


@pytest.mark.parametrize("kind", BASES)
@each_family
def test_the_file_gives_the_trained_network_by_both_loaders(
    name: str,
    kind: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family, base = FAMILIES[name], base_file(kind, name, folder, tmp_path / "base.safetensors")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    options = {"float8": {"dtype": FLOAT8}, "scaled float8": {}}.get(kind, {"dtype": dtype})
    model, metadata = trained(name, base, dtype)
    weights = model.adapter.weights[STUDENT]
    assert any(weight.dtype == FLOAT8 for weight in model.network.parameters()) == (kind == "float8")
    tensors = {key: value.contiguous() for key, value in file_tensors(model, weights).items()}
    assert model.unloaded_keys(tensors) == []
    path = tmp_path / "fast.safetensors"
    save_file(tensors, path, metadata=metadata)
    network, cond, first = model._host, family.conditioning(1), torch.tensor([0])
    batch = batch_for(name, network)
    x_t, t, s = batch.x_t[:1], batch.points.t.rows(first), batch.points.s.rows(first)
    x, sigma = network._sampling_scale(x_t, t)
    _, sigma_s = network._sampling_scale(x_t, s)
    with torch.no_grad():
        wanted = network.x0(x_t, t, [cond], s)
        for parameter in weights.target_time["out"].parameters():
            parameter.zero_()
        without_embedding = network.x0(x_t, t, [cond], s)
    assert relative(without_embedding, wanted) > 1e-3
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    with caplog.at_level(logging.WARNING):
        state = comfy.utils.load_torch_file(str(path))
        stock, _ = comfy.sd.load_lora_for_models(family.load(base, **options), None, state, 1.0, 0.0)
        own = host.apply_lora(family.load(base, **options), host.read_lora(path.name), 1.0)
    unloaded = [each for each in caplog.messages if "not loaded" in each and "tcd_target_time" not in each]
    assert not unloaded and not [each for each in caplog.messages if "another base" in each]
    found = sampled_x0(own, x, sigma[0], cond, sigma_s=sigma_s[0])
    assert relative(found, wanted) <= BASES[kind]
    patched = relative(sampled_x0(stock, x, sigma[0], cond), without_embedding)
    assert patched <= (0.1 if "float8" in kind else BASES[kind]), "the stock loader rounds the sum to 8 bits"


def test_a_module_that_comfyui_would_not_load_fails_the_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, metadata = trained("sd3", written("sd3", folder))
    monkeypatch.setattr(type(model), "lora_key", lambda self, layer: f"network.{layer}")
    config = config_for("sd3", written("sd3", folder))
    with pytest.raises(VerificationError, match="ComfyUI would not load .* such as network"):
        write_lora(tmp_path / "x.safetensors", model, config, metadata, caption_of("sd3"))
    assert not list(tmp_path.iterdir())


def caption_of(name: str) -> Conditioning:
    return join([to_row(FAMILIES[name].conditioning(1))])


@pytest.mark.parametrize("kind", ["float32", "float8", "int8"])
@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_the_file_is_compared_by_comfyui_and_the_model_is_as_before(
    name: str, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_file(kind, name, folder, tmp_path / "base.safetensors")
    model, metadata = trained(name, base)
    compared = []
    as_loaded = type(model).x0_as_loaded
    monkeypatch.setattr(type(model), "x0_as_loaded", lambda *given: compared.append(as_loaded(*given)) or compared[-1])
    batch = batch_for(name, model._host)
    state = [vars(module).copy() for module in model._host.model.modules()]
    with torch.no_grad():
        before = batch.predict(model._host)
        write_lora(tmp_path / "x.safetensors", model, config_for(name, base), metadata, caption_of(name))
        assert torch.equal(batch.predict(model._host), before)
    assert [vars(module) for module in model._host.model.modules()] == state
    assert len(compared) == 1 and not model._host.patcher.object_patches_backup


def test_a_file_that_comfyui_uses_in_another_way_is_not_written(folder: Path, tmp_path: Path) -> None:
    base = written("sd3", folder)
    model, metadata = trained("sd3", base)
    metadata["tcd.target_time.module"] = "joint_blocks.0.x_block.attn.proj"  # a layer of the same width
    message = "ComfyUI, when it has loaded the written LoRA, predicts .* away from the trained one"
    with pytest.raises(VerificationError, match=message):
        write_lora(tmp_path / "x.safetensors", model, config_for("sd3", base), metadata, caption_of("sd3"))
    metadata["tcd.target_time.module"] = "y_embedder.mlp.1"
    with pytest.raises(VerificationError, match=r"ComfyUI would not load the written LoRA: .* not a Linear of this"):
        write_lora(tmp_path / "x.safetensors", model, config_for("sd3", base), metadata, caption_of("sd3"))
    assert not list(tmp_path.iterdir())


def test_a_model_with_another_shift_is_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, metadata = trained("sd3", written("sd3", folder))
    assert metadata["tcd.family"] == "SD3" and metadata["tcd.target_time.module"] == FAMILIES["sd3"].time_linear
    save_file(file_tensors(model, model.adapter.weights[STUDENT]), tmp_path / "fast.safetensors", metadata=metadata)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    patcher = load("sd3", folder)
    patcher.model.model_sampling.set_parameters(shift=5.0)
    with caplog.at_level(logging.WARNING):
        host.apply_lora(patcher, host.read_lora("fast.safetensors"), 1.0)
    (warning,) = [each for each in caplog.messages if "another base" in each]
    assert "trained with shift 3, and the model has 5" in warning


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_model_from_another_file_is_warned_of(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, renamed, tuned = written(name, folder), tmp_path / "renamed.safetensors", tmp_path / "tuned.safetensors"
    model, metadata = trained(name, base)
    shutil.copy(base, renamed)
    FAMILIES[name].write(tuned, seed=1)
    (tmp_path / "loras").mkdir()
    save_file(file_tensors(model, model.adapter.weights[STUDENT]), tmp_path / "loras/fast.safetensors", metadata)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    said = []
    for path in (base, renamed, tuned):
        caplog.clear()
        host.apply_lora(FAMILIES[name].load(path), host.read_lora("fast.safetensors"), 1.0)
        said.append([each for each in caplog.messages if "fast.safetensors" in each])
    assert said[:2] == [[], []]
    (message,) = said[2]
    expected = f"was trained on {name}.safetensors, and the model is from a file with other content, tuned.safetensors"
    assert expected in message


def test_loras_on_the_base_are_named_where_the_file_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, metadata = trained("sd3", written("sd3", folder))
    metadata = metadata | {"tcd.base_loras": "my-style.safetensors at 0.8"}
    save_file(file_tensors(model, model.adapter.weights[STUDENT]), tmp_path / "fast.safetensors", metadata=metadata)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    with caplog.at_level(logging.INFO):
        host.apply_lora(load("sd3", folder), host.read_lora("fast.safetensors"), 1.0)
    assert any("load them too: my-style.safetensors at 0.8" in each for each in caplog.messages)
