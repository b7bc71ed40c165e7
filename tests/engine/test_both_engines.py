"""UNets by both engines: the same LoRA from the same latents, captions and seed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file
from short_run import CAPTIONS, RESULT, TEXT_ENCODER, captions_of, config_of, dataset_of, run
from small_models import relative
from torch import Tensor

from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.text_encoder import HostTextEncoder

PYTHON = os.environ.get("TRAINER_PYTHON")
"""An interpreter with diffusers, which this environment does not have."""

pytestmark = pytest.mark.skipif(PYTHON is None, reason="TRAINER_PYTHON names no interpreter with diffusers")


def by_diffusers(kind: str, folder: Path) -> dict[str, Tensor]:
    """Return what short_run.py writes by the interpreter with diffusers."""
    script = Path(__file__).with_name("short_run.py")
    subprocess.run([str(PYTHON), str(script), kind, str(folder)], check=True)
    return load_file(folder / RESULT)


def part(found: dict[str, Tensor], name: str) -> Tensor:
    """Return all tensors of a part of a result in one row."""
    return torch.cat([found[key].flatten() for key in sorted(found) if key.startswith(f"{name}.")])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_both_engines_train_the_same_lora(family: str, tmp_path: Path) -> None:
    expected, config = by_diffusers(family, tmp_path), config_of(tmp_path)
    checkpoint = open_checkpoint(config.base)
    context, pooled = captions_of(family)
    captions = {"cross_attn": context} | ({} if pooled is None else {"pooled_output": pooled})
    model = checkpoint.load(torch.float32, torch.device("cpu"))
    found = run(model, dataset_of(captions, checkpoint.collate), config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found if key.startswith("start."))
    assert relative(part(found, "gradient"), part(expected, "gradient")) <= 1e-5
    change, expected_change = (part(each, "end") - part(each, "start") for each in (found, expected))
    assert relative(change, expected_change) <= 1e-3


def test_both_engines_encode_plain_captions_alike(tmp_path: Path) -> None:
    """Where they differ is weights in brackets, and captions of more than 75 tokens, which the host does not cut."""
    expected = by_diffusers("captions", tmp_path)
    clip = comfy.sd.load_clip([str(tmp_path / TEXT_ENCODER)], model_options={"dtype": torch.float32})
    encoder = HostTextEncoder(clip)
    for row, found in enumerate(encoder.encode(CAPTIONS)):
        context = found.tensors["cross_attn"]
        assert relative(context, expected[str(row)]) < 1e-5
    weighted, long = encoder.encode(["a (red:1.5) circle", "word " * 100])
    (plain,) = encoder.encode(["a red circle"])
    assert relative(weighted.tensors["cross_attn"], plain.tensors["cross_attn"]) > 1e-3
    assert long.tensors["cross_attn"].shape == (1, 2 * 77, 768)
