"""Apply a LoRA file to a model, with the host's own patcher."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import comfy.lora

from ...tcd import Coverage, TargetTime, coverage, kohya_name, split_target_time, to_kohya
from ...tcd.lora_keys import format_shape
from ..lora_file import LoraFile
from .lora_files import read_tensors
from .model_name import model_name
from .target_time import install_target_time

_log = logging.getLogger("trajectory-consistency")


class _PatchTarget(NamedTuple):
    """The patcher's key and the shape of a weight, or of a slice of a fused weight."""

    key: Any
    shape: tuple[int, ...]


def apply_lora(model: Any, lora: LoraFile, strength: float, *, allow_partial: bool = False) -> Any:
    """Return a clone of the model with the LoRA applied; the model itself if strength is 0.

    Every module of the file must be in the model with the same shape; otherwise ValueError is raised before any tensor
    is read. With allow_partial, one such module is enough, and a warning lists the modules that were not applied.
    """
    if strength == 0:
        return model
    targets = _patch_targets(model)
    fit = coverage(lora.lora_tensors, {name: target.shape for name, target in targets.items()})
    _check_coverage(fit, lora, model_name(model), allow_partial)
    keys = {module: targets[module].key for module in fit.matched}
    _check_no_duplicates(keys.items(), lora)
    _check_target_time(lora, model)
    tensors, embedding = split_target_time(read_tensors(lora))
    tensors = to_kohya(tensors, lora.alpha_from_metadata)
    tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in keys}
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(tensors, keys), strength)
    if lora.target_input:
        target_time = TargetTime.from_state_dict(embedding, lora.target_input)
        install_target_time(patched, lora.name, target_time, strength)
    return patched


def _patch_targets(model: Any) -> dict[str, _PatchTarget]:
    """Return the weights that the host can patch, by kohya name; a weight may have several names."""
    weights = model.model.state_dict()
    targets = {}
    # The {} is needed: the host's function adds to its default argument, which keeps the keys of earlier models.
    for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        weight, part = (key, None) if isinstance(key, str) else key[:2]
        if weight in weights:
            shape = list(weights[weight].shape)
            if part is not None:  # a slice of a fused weight: (axis, start, length)
                shape[part[0]] = part[2]
            targets[kohya_name(name)] = _PatchTarget(key, tuple(shape))
    return targets


def _check_coverage(fit: Coverage, lora: LoraFile, model: str, allow_partial: bool) -> None:
    if fit.complete:
        return
    if not fit.matched or not allow_partial:
        hint = ". Set allow_partial to apply what fits" if fit.matched else ""
        raise ValueError(
            f"{lora.name} does not fit the model, and nothing was applied: the file is for {lora.base_model()}, the "
            f"model is {model}. {fit.describe()}{hint}"
        )
    _log.warning("%s was applied in part: %s", lora.name, fit.describe())


def _check_target_time(lora: LoraFile, model: Any) -> None:
    """Raise ValueError if the file has a target-time embedding that does not fit the network's embedding of t."""
    shape = lora.target_time_shape
    weight = model.model.state_dict().get("diffusion_model.time_embed.0.weight")
    own = None if weight is None else (weight.shape[1], weight.shape[0])
    if shape and shape != own:
        raise ValueError(
            f"{lora.name} does not fit the model, and nothing was applied: its embedding of the target time is "
            f"{format_shape(shape)}, but the model's own, of t, is {format_shape(own) if own else 'of another kind'}"
        )


def _check_no_duplicates(keys: Iterable[tuple[str, Any]], lora: LoraFile) -> None:
    """Raise ValueError if two modules of the file, in different spellings, patch the same weight."""
    first: dict[Any, str] = {}
    for module, key in keys:
        if first.setdefault(key, module) != module:
            raise ValueError(f"{lora.name} was not applied: {first[key]} and {module} are the same weight")
