"""What a LoRA for a family of models has in it, without the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

import torch

from ...tcd import kohya_name
from ..config.targets import kinds_of
from ..format_bytes import readable
from ..models.unet import families as bases

_SHOWN = 3


@cache
def module_shapes(family: bases.Family) -> dict[str, tuple[int, ...]]:
    """The shapes [out, in, ...] of all weights of a family's UNet that can have a LoRA, by diffusers path."""
    with torch.device("meta"):
        unet = bases.empty_unet(family)
    kinds = torch.nn.Linear | torch.nn.Conv2d
    return {path: tuple(module.weight.shape) for path, module in unet.named_modules() if isinstance(module, kinds)}


def describe_keys(family: bases.Family, rank: int, targets: Sequence[str]) -> str:
    """Say how many modules of which kinds are trained, what the file will hold, and a few of its names."""
    shapes = module_shapes(family)
    kinds = {path: kind for path in shapes for kind in kinds_of(targets) if path.endswith(f".{kind}")}
    counts = Counter(kinds.values())
    numbers = sum(rank * (shapes[path][0] + torch.Size(shapes[path][1:]).numel()) for path in kinds)
    # A convolution's down half has its kernel, the up half is 1 x 1.
    lines = [
        f"LoRA      {len(kinds)} modules of {family}'s UNet, {3 * len(kinds)} tensors, {numbers / 1e6:.1f} million "
        f"numbers, {readable(2 * numbers)}",
        *(f"{count:>9} {kind}" for kind, count in counts.most_common()),
        *(f"          {kohya_name(path)}.lora_down.weight" for path in list(kinds)[:_SHOWN]),
    ]
    return "\n".join(lines)
