"""A training step on the meta device, by the trainer's own code, and the work of its parts."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial
from itertools import islice
from typing import Any

import torch
from counting import H100, Counted, counting

from trajectory_consistency.tcd.adapter import AVERAGE, STUDENT
from trajectory_consistency.tcd.distill import Examples, step_losses
from trajectory_consistency.tcd.times import Times
from trajectory_consistency.trainer.config.settings import Config
from trajectory_consistency.trainer.models.seam import Checkpoint, Model
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.memory import MemoryEstimate

META = torch.device("meta")
DTYPE = torch.bfloat16
PARTS = ("teacher", "target", "student", "gradient")
LONGEST = 6


def count_step(checkpoint: Checkpoint, config: Config, size: tuple[int, int], cond: Any = None) -> Counted:
    """Return the work of the losses and gradients of one micro-batch, in bfloat16, by part.

    size: width and height of the pictures, in pixels. cond: the captions' conditioning on the meta device; by default
    that of the longest captions.
    """
    model, batch, method = load_student(config, checkpoint, META, DTYPE), config.training.batch, config.method
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.adapter.add(AVERAGE, deepcopy(model.adapter.weights[STUDENT]).requires_grad_(False))
    model.adapter.state = STUDENT
    width, height = size
    latents = torch.empty(batch, *model.latents.shape(height, width), device=META)
    cond = checkpoint.placeholder_conditioning(batch, META) if cond is None else cond
    times = Times(*(torch.empty(batch, dtype=torch.long, device=META) for _ in range(3)))
    targets = math.ceil(batch * (1 - method.diagonal))  # how many there are on average
    examples = Examples(
        latents, latents, cond, cond, times, times.t[:targets], cond[:targets], torch.empty(batch, device=META)
    )
    with counting() as result:
        _name_parts(model, result)
        result.part = "student"
        loss = step_losses(model, examples, method).sum()
        result.part = "gradient"
        loss.backward()
    return result


def _name_parts(model: Model, result: Counted) -> None:
    """Let the model's calls name the part of the step that they are."""

    def call(part: str, original: Any, *args: Any) -> Any:
        before, result.part = result.part, part if torch.is_grad_enabled() or part == "teacher" else "target"
        output = original(*args)
        result.part = before
        return output

    for name, part in (("x0", "student"), ("guided_x0", "teacher")):
        setattr(model, name, partial(call, part, getattr(model, name)))


def figures_of(
    label: str, counted: Counted, batch: int, estimate: MemoryEstimate, *, recomputed: bool
) -> dict[str, Any]:
    """Return what the tables show of a step.

    recomputed: whether the gradient's part repeats the student's, which is no work that counts for the utilisation.
    """
    step, products = counted.of(), counted.of(products=True)
    useful = step.flops - (counted.of("student").flops if recomputed else 0)
    return {
        "step": label,
        "TFLOP": step.flops / batch / 1e12,
        **{part: counted.of(part).flops / batch / 1e12 for part in PARTS},
        "kernels": step.kernels,
        "GB moved": step.moved / 1e9,
        "ms": 1e3 * step.seconds,
        "ms of products": 1e3 * products.seconds,
        "utilisation": useful / H100.flops / step.seconds,
        "longest": {name: 1e3 * work.seconds for name, work in islice(counted.by_operation().items(), LONGEST)},
        "weights GB": estimate.weights / 1e9,
        "adapter GB": estimate.adapter / 1e9,
        "step GB": estimate.step / 1e9,
        "GB": estimate.training / 1e9,
    }
