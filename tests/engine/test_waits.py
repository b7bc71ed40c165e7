"""For what a step on ComfyUI's models waits: counted on the meta device, in place of a GPU."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_loops import Pictures
from families import FAMILIES, Family, written
from small_models import each_family

from trajectory_consistency.nodes.host.training.data import Captions
from trajectory_consistency.tcd import distill
from trajectory_consistency.tcd.adapter import AVERAGE
from trajectory_consistency.tcd.distill import draw_examples
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_row
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.loop import Training
from waits import GPU, counted_waits

BATCH, READS_THE_LOSS = 4, "aten._to_copy.default"
OF_THE_HOST = {"wan": 6, "ltxv": 12}
"""Waits in the host's own code, by family, in six calls of the network: three for each of two lengths of captions.

Wan's embedding of t begins on the CPU, and LTX-Video makes two scales of positions from Python's numbers.
"""


def captions_of(family: Family) -> list[Any]:
    """Return captions of two lengths, of which the first is the empty one."""
    captions = [family.conditioning(seed) for seed in range(BATCH + 1)]
    for number in (1, 3):
        context, entries = captions[number][0]
        cut = {name: value[:, :-1] for name, value in entries.items() if name == "attention_mask"}
        captions[number] = [[context[:, :-1], {**entries, **cut}]]
    return captions


def settings_of(name: str, folder: Path) -> Config:
    return from_mapping(
        {
            "base": FAMILIES[name].base(written(name, folder)),
            "data": {"folder": "."},
            "method": {"target_time": True, "diagonal": 0.25, "ema_decay": 0.9, "guidance_max": 5.0},
            "adapter": {"rank": 2, "alpha": 2.0},
            "training": {"steps": 10, "batch": BATCH},
            "output": {"folder": "."},
        }
    )


@each_family
def test_a_step_of_the_trainer_waits_once(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config = FAMILIES[name], settings_of(name, folder)
    empty, *rows = [to_row(caption) for caption in captions_of(family)]
    data = Pictures(torch.randn(BATCH, *family.latent), join(rows), join([empty] * BATCH))
    model: Any = load_student(config, open_checkpoint(config.base), GPU, torch.float32)
    monkeypatch.setattr(model, "_reading_numbers", nullcontext)  # what it would answer is counted
    with Training(model, data, config) as training, counted_waits(numbers_are_one=True) as waits:  # type: ignore[arg-type]
        training.train_step()
    assert AVERAGE in model.adapter.weights and waits.pop() == READS_THE_LOSS
    assert len(waits) == OF_THE_HOST.get(name, 0), Counter(waits)


@each_family
def test_a_step_of_the_node_waits_once(name: str, folder: Path) -> None:
    family, config = FAMILIES[name], settings_of(name, folder)
    empty, *rows = captions_of(family)
    latents, cond, uncond = torch.randn(BATCH, *family.latent), Captions(tuple(rows)), Captions((empty,) * BATCH)
    model: Any = load_student(config, open_checkpoint(config.base), GPU, torch.float32)
    network, method = model._host, config.method

    examples = draw_examples(
        latents,
        cond,
        uncond,
        slice(0, BATCH),
        method=method,
        training=config.training,
        schedule=open_checkpoint(config.base).schedule,
        step=0,
    )
    training = distill.Training(network, lambda *_: examples, [slice(0, BATCH)], method, config.training)
    with counted_waits(numbers_are_one=True) as waits:
        training.train_step()
    assert waits.pop() == READS_THE_LOSS and len(waits) == OF_THE_HOST.get(name, 0), Counter(waits)
