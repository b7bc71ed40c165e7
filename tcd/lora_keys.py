"""Names of LoRA tensors, as pure dict -> dict: every spelling in use becomes kohya's.

kohya names are the one spelling that ComfyUI and diffusers both map completely on SD1.5 and SDXL. They name a module
lora_unet_<path with _>, and its tensors .lora_down.weight [r, in, ...], .lora_up.weight [out, r, ...], .alpha []; of
LyCORIS, .lora_mid.weight [r, r, ...], the core of a convolution in Tucker's form; of DoRA (arXiv 2402.09353),
.dora_scale [out, 1, ...] or [1, in, 1, ...].
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
"""The alpha of modules that have none of their own: for all of them, or by diffusers path and rank; None: unknown."""

# Where the network stands within whatever was saved, by who saved it: diffusers, PEFT, ComfyUI, a checkpoint, kohya,
# OneTrainer, LyCORIS.
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
    """The name of a LoRA tensor: the module's path as it is spelled, and kohya's name of the part."""

    path: str
    part: str


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA has for one module: its tensors by kohya's names of the parts, and its path as it was spelled."""

    path: str
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """The rank r of the product."""
        return self.tensors[DOWN].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [out, in, ...] of the product."""
        kernel = self.tensors.get(MID, self.tensors[DOWN]).shape[2:]
        return (self.tensors[UP].shape[0], self.tensors[DOWN].shape[1], *kernel)


def split_name(name: str) -> LoraName | None:
    """Take the name of a LoRA tensor apart; None for another tensor's."""
    for part, pattern in _PARTS.items():
        match = pattern.fullmatch(name)
        if match is not None:
            return LoraName(match["path"], part)
    return None


def kohya_name(path: str) -> str:
    """Return the kohya name of a module, given its path in any spelling: "mid_block.x" is "lora_unet_mid_block_x"."""
    return "lora_unet_" + _bare(path).replace(".", "_")


def to_kohya(state_dict: Mapping[str, Tensor], alpha: Alpha = None) -> dict[str, Tensor]:
    """Rename the tensors of a LoRA, whatever their spelling, to kohya names, and write alpha (float32, []) if known.

    An alpha in state_dict is kept. Tensors are passed on as they are, PEFT's DoRA magnitudes as [out, 1, ...].

    Raises ValueError for a name that is not a LoRA's, a bad alpha, and as lora_modules does.
    """
    modules, others = lora_modules(state_dict)
    if others:
        raise ValueError(f"{others[0]} is not the name of a LoRA tensor, such as x.lora_A.weight")
    renamed: dict[str, Tensor] = {}
    for name, module in modules.items():
        renamed |= {f"{name}.{part}": tensor for part, tensor in module.tensors.items()}
        known = alpha(_bare(module.path), module.rank) if callable(alpha) else alpha
        if known is not None:
            renamed.setdefault(f"{name}.{ALPHA}", torch.tensor(_checked(known)))
    return renamed


def lora_modules(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, LoraModule], tuple[str, ...]]:
    """Gather a LoRA's tensors by kohya module name, in their order; and the names that are not a LoRA's.

    Looks at names and shapes alone, so the tensors may be on the meta device. Raises ValueError for two names that
    become one, a module whose parts do not make a product, and weights of a kind that is not a LoRA.
    """
    spelled: dict[str, dict[str, str]] = {}
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
        first = spelled.setdefault(module, {}).setdefault(split.part, name)
        if first is not name:
            raise ValueError(f"{first} and {name} would both be named {module}.{split.part}")
    return {module: _module(paths[module], names, state_dict) for module, names in spelled.items()}, tuple(others)


def _bare(path: str) -> str:
    """Strip a module's path to what stands in the network: as diffusers spells it now, or without dots."""
    path = re.sub(r"\.processor\.to_out$", ".to_out.0", _PREFIX.sub("", path))
    return path.replace(".processor.", ".")


def _checked(alpha: float) -> float:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha!r}, but must be a positive number")
    return float(alpha)


def _refuse_other_kinds(name: str) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        if pattern.fullmatch(name):
            raise ValueError(f"it has weights of the kind {kind} ({name}), not of a LoRA: use ComfyUI's own LoraLoader")


def _module(path: str, names: Mapping[str, str], state_dict: Mapping[str, Tensor]) -> LoraModule:
    """Gather the tensors of one module, given their names by part."""
    absent = [part for part in (DOWN, UP) if part not in names]
    if absent:
        raise ValueError(f"{path} has no {' and no '.join(absent)}: the LoRA is damaged")
    tensors = {part: state_dict[name] for part, name in names.items()}
    down, up, mid = tensors[DOWN], tensors[UP], tensors.get(MID)
    whole = down.ndim > 1 and up.ndim > 1 and up.numel() == up.shape[0] * down.shape[0] > 0
    if mid is not None:
        # Tucker's form: only the core has a kernel.
        whole = whole and mid.ndim > 2 and mid.shape[:2] == (down.shape[0],) * 2 and down[0].numel() == down.shape[1]
    if not whole or (ALPHA in tensors and tensors[ALPHA].numel() != 1):
        shapes = ", ".join(f"{part} {by(tensor.shape)}" for part, tensor in tensors.items())
        raise ValueError(f"{path} has {shapes}, which are not of one rank: the LoRA is damaged")
    if ".lora_magnitude_vector" in names.get(DORA, ""):
        tensors[DORA] = tensors[DORA].reshape(-1, *[1] * (down.ndim - 1))  # PEFT's is [out], or [1, out, 1, 1]
    return LoraModule(path, tensors)


def by(shape: tuple[int, ...]) -> str:
    """Write a shape as a person does: 320 x 768."""
    return " x ".join(str(size) for size in shape) or "a number"
