"""What a LoRA for a model holds, said before any weight is loaded."""

from __future__ import annotations

from collections import Counter

import torch

from ..config.settings import AdapterConfig
from ..format_bytes import format_bytes
from ..models.seam import Checkpoint

_SHOWN = 3  # names that a description spells out


def describe_keys(checkpoint: Checkpoint, adapter: AdapterConfig) -> str:
    """Say how many layers of which kinds are trained, what the file will hold, and a few of its names."""
    model = checkpoint.load(torch.float32, torch.device("meta"))
    layers = model.layers(adapter.targets)
    weights = model.new_weights(rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=adapter.targets)
    numbers = sum(parameter.numel() for parameter in weights.parameters())
    counts = Counter(map(model.layer_kind, layers))
    lines = [
        f"LoRA      {len(layers)} modules of {checkpoint.family}'s network, {3 * len(layers)} tensors, "
        f"{numbers / 1e6:.1f} million numbers, {format_bytes(2 * numbers)}",
        *(f"{count:>9} {kind}" for kind, count in counts.most_common()),
        *(f"          {model.lora_key(layer)}.lora_down.weight" for layer in layers[:_SHOWN]),
    ]
    return "\n".join(lines)
