"""Describes the LoRA that a run would train, before any weights are loaded, for `tcd-train check`."""

from __future__ import annotations

from collections import Counter

import torch

from ..config.settings import AdapterConfig
from ..format_bytes import format_bytes
from ..models.seam import Checkpoint

_MAX_EXAMPLES = 3


def describe_keys(checkpoint: Checkpoint, adapter: AdapterConfig) -> str:
    """Return the number of trained layers in total and by kind, the file's size, and a few of its tensor names."""
    model = checkpoint.load(torch.float32, torch.device("meta"))
    layers = model.layers(adapter.targets)
    weights = model.new_weights(rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=adapter.targets)
    parameters = sum(parameter.numel() for parameter in weights.parameters())
    counts = Counter(map(model.layer_kind, layers))
    tensors = 3 * len(layers)  # down, up and alpha of each
    size = format_bytes(2 * parameters)  # the file has 2 bytes to a number
    lines = [
        f"LoRA      {len(layers)} modules of {checkpoint.family}'s network, {tensors} tensors, "
        f"{parameters / 1e6:.1f} million numbers, {size}",
        *(f"{count:>9} {kind}" for kind, count in counts.most_common()),
        *(f"          {model.lora_key(layer)}.lora_down.weight" for layer in layers[:_MAX_EXAMPLES]),
    ]
    return "\n".join(lines)
