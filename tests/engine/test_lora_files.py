"""LoRA files of ComfyUI's models: what they say about their base, and that every loader gives the trained network."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from small_models import batch_for, each_family, load
from test_checkpoint import base_of
from torch import Tensor, nn

from trajectory_consistency.nodes import host
from trajectory_consistency.nodes.host.training import HostNetwork
from trajectory_consistency.nodes.lora_file import FileStamp, LoraFile
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.files.adapter_weights import file_tensors
from trajectory_consistency.trainer.files.metadata import lora_metadata
from trajectory_consistency.trainer.files.write_lora import VerificationError, write_lora
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_row

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


def trained(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, str]]:
    """A model with a random LoRA without S+, and the metadata of its file."""
    checkpoint = open_checkpoint(base_of(name, folder))
    model = checkpoint.load(dtype, torch.device("cpu"))
    weights = model.adapter.add(STUDENT, model.new_weights(rank=2, alpha=2.0, seed=0, targets=("all",)))
    generator = torch.Generator().manual_seed(1)
    for parameter in weights.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    base = {"path": str(checkpoint.path), "engine": "comfyui"}
    config = from_mapping({"base": base, "data": {"folder": "in"}, "output": {"folder": "out"}})
    return model, lora_metadata(config, checkpoint)


def predicted(patcher: Any, name: str) -> Tensor:
    """x0 of the host's MODEL, whose weights are patched when it is loaded."""
    network = HostNetwork(patcher, FAMILIES[name].time_linear)
    batch = batch_for(name, network)
    with torch.no_grad():
        return network.x0(batch.x_t, batch.points.t, batch.conds)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
@each_family
def test_the_file_gives_the_trained_network_by_both_loaders(
    name: str,
    dtype: torch.dtype,
    tolerance: float,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, metadata = trained(name, folder, dtype)
    tensors = {key: value.contiguous() for key, value in file_tensors(model, model.adapter.weights[STUDENT]).items()}
    assert model.unloaded_keys(tensors) == []
    path = tmp_path / "fast.safetensors"
    save_file(tensors, path, metadata=metadata)
    batch = batch_for(name, model._host)
    with torch.no_grad():
        wanted = model._host.x0(batch.x_t, batch.points.t, batch.conds)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    with caplog.at_level(logging.WARNING):
        state = comfy.utils.load_torch_file(str(path))
        stock, _ = comfy.sd.load_lora_for_models(load(name, folder, dtype=dtype), None, state, 1.0, 0.0)
        own = host.apply_lora(load(name, folder, dtype=dtype), host.read_lora(path.name), 1.0)
    assert not [each for each in caplog.messages if "not loaded" in each or "another base" in each]
    for patcher in (stock, own):
        error = (predicted(patcher, name) - wanted).norm() / wanted.norm()
        assert error <= tolerance, error


def test_a_module_that_comfyui_would_not_load_fails_the_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, metadata = trained("sd3", folder)
    monkeypatch.setattr(type(model), "lora_key", lambda self, layer: f"network.{layer}")
    config = from_mapping(
        {"base": {"path": "x", "engine": "comfyui"}, "data": {"folder": "in"}, "output": {"folder": "out"}}
    )
    with pytest.raises(VerificationError, match="ComfyUI would not load .* such as network"):
        write_lora(tmp_path / "x.safetensors", model, config, metadata, join([to_row(FAMILIES["sd3"].conditioning(1))]))
    assert not list(tmp_path.iterdir())


def test_a_model_with_another_shift_is_warned_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, metadata = trained("sd3", folder)
    assert metadata["tcd.family"] == "SD3" and metadata["tcd.target_time.module"] == FAMILIES["sd3"].time_linear
    save_file(file_tensors(model, model.adapter.weights[STUDENT]), tmp_path / "fast.safetensors", metadata=metadata)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    patcher = load("sd3", folder)
    patcher.model.model_sampling.set_parameters(shift=5.0)
    with caplog.at_level(logging.WARNING):
        host.apply_lora(patcher, host.read_lora("fast.safetensors"), 1.0)
    (warning,) = [each for each in caplog.messages if "another base" in each]
    assert "trained with shift 3, and the model has 5" in warning


def test_loras_on_the_base_are_named_where_the_file_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, metadata = trained("sd3", folder)
    metadata = metadata | {"tcd.base_loras": "my-style.safetensors at 0.8"}
    save_file(file_tensors(model, model.adapter.weights[STUDENT]), tmp_path / "fast.safetensors", metadata=metadata)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    with caplog.at_level(logging.INFO):
        host.apply_lora(load("sd3", folder), host.read_lora("fast.safetensors"), 1.0)
    assert any("load them too: my-style.safetensors at 0.8" in each for each in caplog.messages)
