"""Convert the names of LoRA tensors from every spelling in use to kohya's spelling.

kohya names are the only spelling that both ComfyUI and diffusers map completely for SD1.5 and SDXL. A module is named
lora_unet_<path with _>, and its tensors are named
  .lora_down.weight  [r, in, ...]
  .lora_up.weight    [out, r, ...]
  .alpha             []
  .lora_mid.weight   [r, r, ...], the core of a convolution in Tucker form (LyCORIS)
  .dora_scale        [out, 1, ...] or [1, in, 1, ...] (DoRA, arXiv 2402.09353)
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
ALPHA, DORA = "alpha", "dora_scale"

Alpha = float | Callable[[str, int], float | None] | None
"""The alpha for modules that have none in the file: a number, a function of (diffusers path, rank), or None."""

# Prefixes before the network's module paths, in the spellings of diffusers, PEFT, ComfyUI, checkpoints, kohya,
# OneTrainer and LyCORIS.
_PREFIX = re.compile(
    r"\A(?:(?:unet|transformer|base_model\.model|model\.diffusion_model|diffusion_model)\.)*"
    r"(?:lora_unet_|lora_transformer_|lycoris_)?"
)
_PARTS = {
    part: re.compile(f"(?P<path>.+)(?:{pattern})")
    for part, pattern in {
        DOWN: r"\.lora_A(\.default)?(\.weight)?|(\.lora_|[._]lora\.|\.lora_linear_layer\.)down\.weight",
        UP: r"\.lora_B(\.default)?(\.weight)?|(\.lora_|[._]lora\.|\.lora_linear_layer\.)up\.weight",
        MID: r"\.lora_mid\.weight",
        ALPHA: r"\.alpha",
        DORA: r"\.dora_scale|\.lora_magnitude_vector(\.default)?(\.weight)?",
    }.items()
}
_OTHER_KINDS = {
    "LoHa": re.compile(r".+\.hada_[wt]\d\w*"),
    "LoKr": re.compile(r".+\.lokr_[wt]\d\w*"),
    "OFT": re.compile(r".+\.oft_(blocks|diag)"),
    "GLoRA": re.compile(r".+\.[ab][12]\.weight"),
    "difference": re.compile(r".+\.(diff|diff_b|set_weight|reshape_weight|[wb]_norm)"),
}


class LoraName(NamedTuple):
    """The name of a LoRA tensor: the module's path as spelled in the file, and the kohya name of the part."""

    path: str
    part: str


@dataclass(frozen=True)
class LoraModule:
    """One module of a LoRA: its path as spelled in the file, and its tensors by kohya part name."""

    path: str
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """The rank r of the product up @ down."""
        return self.tensors[DOWN].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [out, in, ...] of the product up @ down."""
        kernel = self.tensors.get(MID, self.tensors[DOWN]).shape[2:]
        return (self.tensors[UP].shape[0], self.tensors[DOWN].shape[1], *kernel)


def split_name(name: str) -> LoraName | None:
    """Split the name of a LoRA tensor into module path and part; None if it is not the name of a LoRA tensor."""
    for part, pattern in _PARTS.items():
        match = pattern.fullmatch(name)
        if match is not None:
            return LoraName(match["path"], part)
    return None


def kohya_name(path: str) -> str:
    """Return the kohya name of a module from its path in any spelling: "mid_block.x" gives "lora_unet_mid_block_x"."""
    return "lora_unet_" + _network_path(path).replace(".", "_")


def to_kohya(state_dict: Mapping[str, Tensor], alpha: Alpha = None) -> dict[str, Tensor]:
    """Rename the tensors of a LoRA in any spelling to kohya names, and add `alpha` (float32, []) to modules without.

    Tensors are not copied; PEFT's DoRA magnitudes are reshaped to [out, 1, ...].

    Raises ValueError if a name is not a LoRA tensor's, an alpha is not positive, or lora_modules raises it.
    """
    modules, others = lora_modules(state_dict)
    if others:
        raise ValueError(f"{others[0]} is not the name of a LoRA tensor, such as x.lora_A.weight")
    renamed: dict[str, Tensor] = {}
    for name, module in modules.items():
        renamed |= {f"{name}.{part}": tensor for part, tensor in module.tensors.items()}
        known = alpha(_network_path(module.path), module.rank) if callable(alpha) else alpha
        if known is not None:
            renamed.setdefault(f"{name}.{ALPHA}", torch.tensor(_checked_alpha(known)))
    return renamed


def lora_modules(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, LoraModule], tuple[str, ...]]:
    """Return a LoRA's modules by kohya name, in the order of state_dict, and the names that are not LoRA tensors.

    Only names and shapes are used, so the tensors may be on the meta device. Raises ValueError if two names have the
    same kohya name, if the tensors of a module cannot be multiplied, or for other kinds of adapters, such as LoHa.
    """
    names_by_module: dict[str, dict[str, str]] = {}
    paths: dict[str, str] = {}
    others: list[str] = []
    for name in state_dict:
        split = split_name(name)
        if split is None:
            _refuse_other_kinds(name)
            others.append(name)
            continue
        module = kohya_name(split.path)
        paths.setdefault(module, split.path)
        first = names_by_module.setdefault(module, {}).setdefault(split.part, name)
        if first is not name:
            raise ValueError(f"{first} and {name} would both be named {module}.{split.part}")
    modules = {module: _module(paths[module], names, state_dict) for module, names in names_by_module.items()}
    return modules, tuple(others)


def _network_path(path: str) -> str:
    """Return a module's path within the network: in diffusers' current spelling, or in kohya's form without dots."""
    path = re.sub(r"\.processor\.to_out$", ".to_out.0", _PREFIX.sub("", path))
    return path.replace(".processor.", ".")


def _checked_alpha(alpha: float) -> float:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha!r}, but must be a positive number")
    return float(alpha)


def _refuse_other_kinds(name: str) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        if pattern.fullmatch(name):
            raise ValueError(f"it has weights of the kind {kind} ({name}), not of a LoRA: use ComfyUI's own LoraLoader")


def _module(path: str, names: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> LoraModule:
    """Build one module from its tensors, given their names by part. Raises ValueError if it is damaged."""
    absent = [part for part in (DOWN, UP) if part not in names]
    if absent:
        raise ValueError(f"{path} has no {' and no '.join(absent)}: the LoRA is damaged")
    tensors = {part: state_dict[name] for part, name in names.items()}
    down, up, mid = tensors[DOWN], tensors[UP], tensors.get(MID)
    multiplies = down.ndim > 1 and up.ndim > 1 and up.numel() == up.shape[0] * down.shape[0] > 0
    if mid is not None:
        # Tucker form: only the core has a kernel.
        core_fits = mid.ndim > 2 and mid.shape[:2] == (down.shape[0],) * 2
        multiplies = multiplies and core_fits and down[0].numel() == down.shape[1]
    if not multiplies or (ALPHA in tensors and tensors[ALPHA].numel() != 1):
        shapes = ", ".join(f"{part} {format_shape(tensor.shape)}" for part, tensor in tensors.items())
        raise ValueError(f"{path} has {shapes}, which are not of one rank: the LoRA is damaged")
    if ".lora_magnitude_vector" in names.get(DORA, ""):
        tensors[DORA] = tensors[DORA].reshape(-1, *[1] * (down.ndim - 1))  # PEFT's is [out], or [1, out, 1, 1]
    return LoraModule(path, tensors)


def format_shape(shape: tuple[int, ...]) -> str:
    """Format a shape for a message, such as "320 x 768"; "a number" if it is 0-dim."""
    return " x ".join(str(size) for size in shape) or "a number"
