"""LoRA files: read, told, spelled another way, and merged into a checkpoint.

Flows in: a LoRA in any spelling.  Flows out: a new file, or a description; what was there is never written over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...tcd import LoraModule, TargetTime, coverage, kohya_name, lora_modules
from ...tcd.lora_keys import ALPHA, DOWN, UP
from ...tcd.target_time import PREFIX
from ..atomic import atomic_write
from ..errors import RunError, UserError
from ..models.unet import families as bases
from ..models.unet import ldm
from ..safetensors_file import read_safetensors
from .adapter_file import PEFT_SETTINGS, read_adapter
from .adapter_weights import refuse_other_parts

Spelling = Literal["kohya", "peft"]


class LoraFile(NamedTuple):
    """A LoRA as its file has it."""

    modules: Mapping[str, LoraModule]
    """By kohya's names."""
    target_time: TargetTime | None
    metadata: Mapping[str, str]
    family: bases.Family | None
    """None when it fits no family that is known here."""
    dtypes: tuple[torch.dtype, ...]


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA for a UNet.

    Raises UserError when the file is none.
    """
    file = read_adapter(path)
    modules, _ = lora_modules(file.lora)
    dtypes = Counter(
        tensor.dtype for module in modules.values() for key, tensor in module.tensors.items() if key != ALPHA
    )
    return LoraFile(modules, file.target_time, file.metadata, family_of(file.lora), tuple(dtypes))


def family_of(tensors: Mapping[str, Tensor]) -> bases.Family | None:
    """The family whose UNet has all modules of a LoRA, in their shapes."""
    for family in get_args(bases.Family):
        shapes = {kohya_name(path): shape for path, shape in bases.layer_shapes(family).items()}
        if coverage(tensors, shapes).complete:
            return family
    return None


def export(source: Path, target: Path, *, spelling: Spelling, dtype: torch.dtype) -> None:
    """Write the LoRA of `source` as `target`, in another spelling or dtype, with the same metadata.

    PEFT's names have no alpha beside them: it is multiplied into the up half, so that no reader can lose it.
    Raises UserError when `target` exists, or when `source` cannot be written so, and RunError when the file does not
    hold what was written.
    """
    _refuse_existing(target)
    lora = read_lora(source)
    tensors: dict[str, Tensor] = {}
    if spelling == "kohya":
        for name, module in lora.modules.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in module.tensors.items()}
        if lora.target_time is not None:
            tensors |= {f"{PREFIX}{name}": tensor for name, tensor in lora.target_time.state_dict().items()}
    else:
        _refuse_target_time(lora, source, "PEFT's names have none")
        paths = _paths(lora, source)
        for name, module in lora.modules.items():
            refuse_other_parts(name, module.tensors)
            tensors[f"unet.{paths[name]}.lora_A.weight"] = module.tensors[DOWN]
            tensors[f"unet.{paths[name]}.lora_B.weight"] = module.tensors[UP].float() * _scale(module)
    metadata = {key: value for key, value in lora.metadata.items() if key != PEFT_SETTINGS}
    _write(target, {key: _cast(key, value, dtype) for key, value in tensors.items()}, metadata)


def merge(
    source: Path, checkpoint: Path, target: Path, *, strength: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Write a whole checkpoint with the LoRA of `source` in its UNet; other weights stay as they are.

    dtype: of the floating-point weights; None leaves each as it is.
    Raises UserError when `target` exists, when the LoRA is not one for the checkpoint, when `strength` is not finite,
    and when a weight would not be; and RunError when the file does not hold what was written.
    """
    if not math.isfinite(strength):
        raise UserError(f"the strength is {strength}, and every weight would be no number: use one such as 1")
    _refuse_existing(target)
    lora = read_lora(source)
    _refuse_target_time(lora, source, "a checkpoint has none")
    paths = _paths(lora, source)
    tensors, metadata = read_safetensors(checkpoint)
    assert lora.family is not None  # or there were no paths
    weights = [f"{path}.weight" for path in paths.values()]
    config = bases.config(lora.family, "unet")
    stand_ins = {name: torch.empty(0) for name in weights}
    places = dict(zip(paths, ldm.unet_to_ldm(stand_ins, config), strict=True))
    for name, module in lora.modules.items():
        refuse_other_parts(name, module.tensors)
        key = places[name]
        if key not in tensors:
            raise UserError(f"{checkpoint} has no {key}: it is not a {lora.family} checkpoint, for which {source} is")
        down, up = module.tensors[DOWN].float(), module.tensors[UP].float()
        update = strength * _scale(module) * up.flatten(1) @ down.flatten(1)
        weight = tensors[key]
        if update.numel() != weight.numel():
            raise UserError(f"{checkpoint} has {key} in the shape {list(weight.shape)}, which does not fit {source}")
        tensors[key] = (weight.float() + update.view(weight.shape)).to(weight.dtype)
    if dtype is not None:
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    _write(target, tensors, metadata)


def describe(path: Path) -> str:
    """Say in words what a LoRA file holds.

    Raises UserError when it is not one.
    """
    lora = read_lora(path)
    ranks = Counter(module.rank for module in lora.modules.values())
    scales = Counter(round(_scale(module), 6) for module in lora.modules.values())
    lines = [
        f"{path}: a LoRA for {lora.family or 'a UNet of no family that is known here'}",
        f"modules   {len(lora.modules)}, such as {next(iter(lora.modules))}",
        f"rank      {_counted(ranks)}",
        f"scale     {_counted(scales)} (alpha / rank)",
        f"dtype     {', '.join(str(dtype).removeprefix('torch.') for dtype in lora.dtypes)}",
    ]
    if lora.target_time is not None:
        lines.append(f"target    the network gets the target time, as {lora.target_time.target_input}")
    told = {key: value for key, value in lora.metadata.items() if len(value) <= 200}
    return "\n".join([*lines, *(f"{key} = {value}" for key, value in sorted(told.items()))])


def _counted(numbers: Counter[Any]) -> str:
    return ", ".join(f"{number:g} ({count} modules)" for number, count in numbers.most_common())


def _paths(lora: LoraFile, source: Path) -> dict[str, str]:
    """The diffusers path of each of the LoRA's modules."""
    if lora.family is None:
        raise UserError(f"{source} is a LoRA for no family that is known here ({', '.join(get_args(bases.Family))})")
    paths = {kohya_name(path): path for path in bases.layer_shapes(lora.family)}
    return {name: paths[name] for name in lora.modules}


def _scale(module: LoraModule) -> float:
    return float(module.tensors[ALPHA]) / module.rank


def _refuse_target_time(lora: LoraFile, source: Path, why: str) -> None:
    if lora.target_time is not None:
        raise UserError(f"{source} has an embedding of the target time, and {why}: load the file itself in ComfyUI")


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if key.endswith(ALPHA) else tensor.to(dtype)


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists: choose another name, or remove it")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}: make it first")


def _write(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write finite tensors, and read them back before the file gets its name."""
    for key, value in tensors.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(
                f"{target} would have {key} with numbers that are not finite: use a dtype of a wider range, such as "
                "bfloat16, a smaller strength, or files that are whole"
            )
    whole = {key: value.contiguous() for key, value in tensors.items()}
    with atomic_write(target) as unfinished:
        save_file(whole, unfinished, metadata=dict(metadata))
        if not _holds(unfinished, whole):
            raise RunError(f"{target} was written, and read back it is another: it was removed; try another disk")


def _holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has exactly these tensors, to the last bit."""
    try:
        written, _ = read_safetensors(path)
    except UserError:  # cut off
        return False
    return written.keys() == tensors.keys() and all(
        (value.dtype, value.shape) == (tensors[key].dtype, tensors[key].shape)
        and torch.equal(_bytes(value), _bytes(tensors[key]))
        for key, value in written.items()
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)
