"""Convert the names of LoRA tensors from every spelling in use to kohya's spelling.

kohya names are the only spelling that both ComfyUI and diffusers map completely for SD1.5 and SDXL. A module is named
lora_unet_<path with _>, or lora_te_, lora_te1_, lora_te2_ for a text encoder's, and its tensors are named
  .lora_down.weight  [r, in, ...]
  .lora_up.weight    [out, r, ...]
  .alpha             []
  .lora_mid.weight   [r, r, ...], the core of a convolution in Tucker form (LyCORIS)
  .dora_scale        [out, 1, ...] or [1, in, 1, ...] (DoRA, arXiv 2402.09353)
  .diff              what is added to the weight, in full and without alpha, in place of down and up
  .diff_b            [out], what is added to the bias
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
DIFF, DIFF_BIAS = "diff", "diff_b"

Alpha = float | Callable[[str, int], float | None] | None
"""The alpha for modules that have none in the file: a number, a function of (diffusers path, rank), or None."""

# Prefixes before the network's module paths, in the spellings of PyTorch's wrappers, diffusers, PEFT, ComfyUI,
# checkpoints, kohya, OneTrainer and LyCORIS.
_PREFIX = re.compile(
    r"\A(?:(?:module|_orig_mod|unet|transformer|base_model\.model|model\.diffusion_model|diffusion_model)\.)*"
    r"(?:lora_unet_|lora_transformer_|lycoris_)?"
)
_TEXT_ENCODER = re.compile(r"(?:lora_te(\d?)_|text_encoder(?:_(\d))?\.)(.+)")
_HOST_TEXT_ENCODER = "text_encoders."  # ComfyUI's own names, which depend on the model
_ADAPTER = r"(\.(?!(weight|bias)(\.|$))[^.]+)?"  # a name that PEFT gives an adapter, such as default
_PARTS = {
    part: re.compile(f"(?P<path>.+)(?:{pattern})")
    for part, pattern in {
        DOWN: rf"\.lora_A{_ADAPTER}(\.weight)?|(\.lora_|[._]lora\.|\.lora_linear_layer\.)down\.weight",
        UP: rf"\.lora_B{_ADAPTER}(\.weight)?|(\.lora_|[._]lora\.|\.lora_linear_layer\.)up\.weight",
        MID: r"\.lora_mid\.weight",
        ALPHA: r"\.alpha",
        DORA: rf"\.dora_scale|\.lora_magnitude_vector{_ADAPTER}(\.weight)?",
        DIFF: r"\.diff|\.w_norm",
        DIFF_BIAS: r"\.diff_b|\.b_norm",
    }.items()
}
_OTHER_KINDS = {
    "LoHa": re.compile(r".+\.hada_[wt]\d\w*"),
    "LoKr": re.compile(r".+\.lokr_[wt]\d\w*"),
    "OFT": re.compile(r".+\.oft_(blocks|diag)"),
    "GLoRA": re.compile(r".+\.[ab][12]\.weight"),
    "replaced weight": re.compile(r".+\.(set_weight|reshape_weight)"),
}


class LoraName(NamedTuple):
    """The name of a LoRA tensor: the module's path as spelled in the file, and the kohya name of the part."""

    path: str
    part: str


@dataclass(frozen=True)
class LoraModule:
    """One module of a LoRA: its path as spelled in the file, and its tensors by kohya part name.

    It has down and up, or a difference of the weight, or only one of the bias.
    """

    path: str
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """The rank r of the product up @ down; 0 without one."""
        return self.tensors[DOWN].shape[0] if DOWN in self.tensors else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [out, in, ...] of the product up @ down, or of the difference; () if only the bias has one."""
        if DOWN not in self.tensors:
            return tuple(self.tensors[DIFF].shape) if DIFF in self.tensors else ()
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
    """Return the kohya name of a module from its path in any spelling: "mid_block.x" gives "lora_unet_mid_block_x".

    Text encoders keep their kohya names, and "text_encoder_2.x" gives "lora_te2_x". ComfyUI's own names of text
    encoders are left as they are, because kohya has none for some of these.
    """
    path = network_path(path)
    if path.startswith(_HOST_TEXT_ENCODER):
        return path
    text = _TEXT_ENCODER.fullmatch(path)
    if text is not None:
        return f"lora_te{text[1] or text[2] or ''}_{text[3].replace('.', '_')}"
    return "lora_unet_" + path.replace(".", "_")


def text_encoder_number(path: str) -> int | None:
    """Return 1, 2 or 3 if a module's path, in any spelling, is in the text encoder of that number; None otherwise."""
    text = _TEXT_ENCODER.fullmatch(network_path(path))
    return None if text is None else int(text[1] or text[2] or 1)


def is_text_encoder_name(name: str) -> bool:
    """Return whether a tensor or module of a LoRA is for a text encoder, by its name in the file."""
    return text_encoder_number(name) is not None or network_path(name).startswith(_HOST_TEXT_ENCODER)


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
        if not module.rank:
            continue
        known = alpha(network_path(module.path), module.rank) if callable(alpha) else alpha
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


def network_path(path: str) -> str:
    """Return a module's path within the network: in diffusers' current spelling, or in kohya's form without dots.

    The path of a text encoder's module keeps its prefix.
    """
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
    tensors = {part: state_dict[name] for part, name in names.items()}
    for part, tensor in tensors.items():
        if tensor.is_complex():
            raise ValueError(f"{path} has {part} of {tensor.dtype}, which is no weight: the LoRA is damaged")
    if tensors.keys() <= {DIFF, DIFF_BIAS}:
        return LoraModule(path, tensors)
    absent = [part for part in (DOWN, UP) if part not in names]
    if absent:
        raise ValueError(f"{path} has no {' and no '.join(absent)}: the LoRA is damaged")
    if DIFF in tensors:
        raise ValueError(f"{path} has both a LoRA and a difference of its weight, of which ComfyUI applies only one")
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
