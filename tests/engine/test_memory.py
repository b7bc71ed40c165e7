"""The memory estimate for ComfyUI's models: on the meta device, compared with what torch allocates in a real step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, written
from lent_encoders import lend
from quantized_files import write_float8, write_quantized
from safetensors.torch import load_file
from small_models import each_family
from test_checkpoint import base_at, base_of

from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.seam import Checkpoint, Model
from trajectory_consistency.trainer.training.memory import MemorySettings, _allocated, _weights, estimate_memory

CPU, META = torch.device("cpu"), torch.device("meta")
SETTINGS = MemorySettings(rank=2, batch=2, width=256, height=256, target_input="s", preview=Size(256, 256))


def allocated_by_a_step(checkpoint: Checkpoint, model: Model) -> int:
    """The peak of what torch allocates on the CPU in a step, counted as in the estimate, and nothing else of it."""
    weights = model.new_weights(rank=2, alpha=1.0, seed=0, targets=("all",), target_input="s")
    model.adapter.add(STUDENT, weights)
    x_t = torch.randn(2, *model.latents.shape(256, 256))
    t = model.schedule.point(torch.tensor([500, 500]), x_t.ndim)
    cond = checkpoint.placeholder_conditioning(2, CPU)
    with _allocated(_weights(model)) as allocations:
        with torch.no_grad(), model.adapter.off():
            model.guided_x0(x_t, t, cond, cond, torch.ones(2))
        model.x0(x_t, t, cond, t).square().mean().backward()
    return allocations.peak


@each_family
def test_every_family_is_estimated_without_its_weights(name: str, folder: Path) -> None:
    with lend(FAMILIES[name]):
        checkpoint = open_checkpoint(base_of(name, folder))
        estimate = estimate_memory(checkpoint, SETTINGS)
        larger = estimate_memory(checkpoint, SETTINGS._replace(batch=4))
    state = load_file(written(name, folder))
    assert estimate.weights == pytest.approx(4 * sum(tensor.numel() for tensor in state.values()), rel=0.02)
    assert larger.step > 1.5 * estimate.step > 0 and estimate.preview > estimate.training - estimate.step
    assert estimate.caching > 0


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_a_step_takes_what_is_estimated(name: str, folder: Path) -> None:
    with lend(FAMILIES[name]):
        checkpoint = open_checkpoint(base_of(name, folder))
        expected = estimate_memory(checkpoint, SETTINGS).step
        taken = allocated_by_a_step(checkpoint, checkpoint.load(torch.float32, CPU))
    assert abs(expected / taken - 1) < 0.2, (expected, taken)


@pytest.mark.parametrize("kind", ["plain", "scaled"])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_weights_in_8_bits_are_one_byte_each(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    path, family = tmp_path / f"{kind}.safetensors", FAMILIES[name]
    if kind == "scaled":
        write_quantized(written(name, folder), path, "scaled float8", family.prefix)
    else:
        write_float8(written(name, folder), path)
    with lend(family):
        estimate = estimate_memory(open_checkpoint(base_at(name, path)), SETTINGS._replace(dtype=torch.bfloat16))
    assert estimate.weights == pytest.approx(path.stat().st_size, rel=0.1) and estimate.step > 0
