"""Files of stand-ins whose weights are quantised in the host's own formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


def write_quantized(source: Path, target: Path, kind: str, prefix: str = "") -> None:
    """Write a network's file with the weights of the Linears in its blocks quantised, and the others in bfloat16.

    kind: one of QUANTIZE. prefix: of the file's keys.
    """
    state: dict[str, Tensor] = {}
    for key, value in load_file(source).items():
        if key.endswith(".weight") and value.ndim == 2 and ("block" in key or "layers." in key):
            state |= {f"{key.removesuffix('weight')}{part}": each for part, each in QUANTIZE[kind](value).items()}
        else:
            state[key] = value.bfloat16()
    if kind == "scaled float8":
        state[f"{prefix}scaled_fp8"] = torch.tensor([], dtype=FLOAT8)
    save_file(state, target)


def write_float8(source: Path, target: Path) -> None:
    """Write a network's file with all weights of layers cast to float8, and the other tensors to bfloat16."""
    state = load_file(source)
    save_file({key: value.to(FLOAT8 if value.ndim > 1 else torch.bfloat16) for key, value in state.items()}, target)


def _scaled_float8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(FLOAT8), "scale_weight": scale}


def _by_layout(layout: str, format: str) -> Callable[[Tensor], dict[str, Tensor]]:
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        from comfy.quant_ops import QuantizedTensor

        packed = QuantizedTensor.from_float(weight.bfloat16(), layout, scale="recalculate").state_dict("weight")
        config = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
        return {**packed, "comfy_quant": config}

    return quantize


QUANTIZE = {
    "scaled float8": _scaled_float8,
    "nvfp4": _by_layout("TensorCoreNVFP4Layout", "nvfp4"),
    "int8": _by_layout("TensorWiseINT8Layout", "int8_tensorwise"),
}
