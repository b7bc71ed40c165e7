"""The way of a LoRA onto a model, by the host's own patcher."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import comfy.lora

from ...tcd import Coverage, TargetTime, coverage, kohya_name, split_target_time, to_kohya
from ...tcd.lora_keys import by
from ..lora_file import LoraFile
from .lora_files import read_tensors
from .model import model_name
from .target_time import put_target_time

_log = logging.getLogger("trajectory-consistency")


class _Target(NamedTuple):
    """A weight of the model, or a part of one, as the host's patcher is told of it; and its shape."""

    key: Any
    shape: tuple[int, ...]


def apply_lora(model: Any, lora: LoraFile, strength: float, *, allow_partial: bool = False) -> Any:
    """Return a clone of the model with the LoRA on it; the model itself if strength is 0.

    Raises ValueError, before a tensor is read, unless each module of the file is in the model with the same shape; with
    allow_partial, one of them is enough, and the log says once what is left out.
    """
    if strength == 0:
        return model
    targets = _targets(model)
    fit = coverage(lora.lora, {name: target.shape for name, target in targets.items()})
    _check(fit, lora, model_name(model), allow_partial)
    keys = {module: targets[module].key for module in fit.matched}
    _check_distinct(keys.items(), lora)
    _check_target_time(lora, model)
    tensors, embedding = split_target_time(read_tensors(lora))
    tensors = to_kohya(tensors, lora.alpha)
    tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in keys}
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(tensors, keys), strength)
    if lora.told:
        put_target_time(patched, lora.name, TargetTime.of(embedding, lora.told), strength)
    return patched


def _targets(model: Any) -> dict[str, _Target]:
    """Return the weights that the host can patch, by kohya name; where it has many names for one, each of them."""
    weights = model.model.state_dict()
    targets = {}
    for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items():  # {}: the default is shared by all calls
        weight, part = (key, None) if isinstance(key, str) else key[:2]
        if weight in weights:
            shape = list(weights[weight].shape)
            if part is not None:  # a fused weight: rows from part[1] on along axis part[0]
                shape[part[0]] = part[2]
            targets[kohya_name(name)] = _Target(key, tuple(shape))
    return targets


def _check(fit: Coverage, lora: LoraFile, model: str, allow_partial: bool) -> None:
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
    """Refuse an embedding of the target time that does not fit the network's own embedding of t."""
    shape = lora.target_time_shape
    weight = model.model.state_dict().get("diffusion_model.time_embed.0.weight")
    own = None if weight is None else (weight.shape[1], weight.shape[0])
    if shape and shape != own:
        raise ValueError(
            f"{lora.name} does not fit the model, and nothing was applied: its embedding of the target time is "
            f"{by(shape)}, and the model's of the time is {by(own) if own else 'of another kind'}"
        )


def _check_distinct(keys: Iterable[tuple[str, Any]], lora: LoraFile) -> None:
    first: dict[Any, str] = {}
    for module, key in keys:
        if first.setdefault(key, module) != module:
            raise ValueError(f"{lora.name} was not applied: {first[key]} and {module} are the same weight")
