"""Apply a LoRA file to a model, with the host's own patcher."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import comfy.lora
from torch import Tensor

from ...tcd import Coverage, TargetTime, coverage, kohya_name, split_target_time, to_kohya
from ...tcd.lora_metadata import BASE_FINGERPRINT_KEY, BASE_LORAS_KEY, BASE_NAME_KEY
from ..lora_file import LoraFile
from .lora_beside import add_beside
from .lora_files import read_tensors
from .model_name import file_fingerprint, model_file, model_name, model_shift
from .target_time import check_target_time, install_target_time

_log = logging.getLogger("trajectory-consistency")


class _PatchTarget(NamedTuple):
    """The patcher's key and the shape of a weight, or of a slice of a fused weight; and whether its layer has a bias.

    The bias of a fused weight does not count: the host cannot patch a slice of it.
    """

    key: Any
    shape: tuple[int, ...]
    has_bias: bool


def apply_lora(model: Any, lora: LoraFile, strength: float, *, allow_partial: bool = False) -> Any:
    """Return a clone of the model with the LoRA applied; the model itself if strength is 0.

    Weights are patched by the host, except quantised ones: there the LoRA is added beside the weight.

    Every module of the file must be in the model with the same shape; otherwise ValueError is raised before any tensor
    is read. With allow_partial, one such module is enough, and a warning lists the modules that were not applied.
    """
    if strength == 0:
        return model
    patched = with_lora(model, lora, strength, allow_partial=allow_partial)
    differences = lora.differences(model_name(model), model_shift(model.get_model_object("model_sampling")))
    if differences:
        _log.warning("%s is for another base: %s", lora.name, "; ".join(differences))
    elif other := _other_file(model, lora):
        _log.warning("%s %s", lora.name, other)
    if BASE_LORAS_KEY in lora.metadata:
        _log.info("%s was trained on a base with LoRAs, load them too: %s", lora.name, lora.metadata[BASE_LORAS_KEY])
    return patched


def with_lora(
    model: Any, lora: LoraFile, strength: float, *, allow_partial: bool = False, all_beside: bool = False
) -> Any:
    """Return a clone of the model with the LoRA applied as by `apply_lora`, which also says whether the base differs.

    all_beside: add the LoRA beside all weights, so that none is copied and changed.
    """
    weights = dict(model.model.named_parameters(remove_duplicate=False))
    targets = _patch_targets(model, weights)
    shapes = {name: target.shape for name, target in targets.items()}
    fit = coverage(lora.lora_tensors, shapes, {name for name, target in targets.items() if target.has_bias})
    _check_coverage(fit, lora, model_name(model), allow_partial)
    keys = {module: targets[module].key for module in fit.matched}
    _check_no_duplicates(keys.items(), lora)
    time_layer = None
    if lora.target_time_shape:
        time_layer = check_target_time(model, lora.name, lora.target_time_shape, lora.target_time_module)
    tensors, embedding = split_target_time(read_tensors(lora))
    try:
        tensors = to_kohya(tensors, lora.alpha)
    except ValueError as error:
        raise ValueError(f"{lora.name} was not applied: {error}") from None
    tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in keys}
    patched = model.clone()
    loaded = comfy.lora.load_lora(tensors, keys)
    patches = add_beside(patched, lora.name, loaded, weights, strength, everywhere=all_beside)
    patched.add_patches(patches, strength)
    if time_layer is not None and lora.target_input:
        target_time = TargetTime.from_state_dict(embedding, lora.target_input)
        install_target_time(patched, lora.name, time_layer, target_time, strength)
    return patched


def _other_file(model: Any, lora: LoraFile) -> str:
    """Return a message if the LoRA was trained on another file than the model's; what is not known is not compared."""
    file, trained_on = model_file(model), lora.metadata.get(BASE_FINGERPRINT_KEY)
    if file is None or trained_on is None or file_fingerprint(file) == trained_on:
        return ""
    name = lora.metadata.get(BASE_NAME_KEY, "a base")
    return (
        f"was trained on {name}, and the model is from a file with other content, {file.name}: if that is not the same "
        "model in another format or precision, the result may be worse"
    )


def _patch_targets(model: Any, weights: Mapping[str, Tensor]) -> dict[str, _PatchTarget]:
    """Return the weights that the host can patch, by kohya name; a weight may have several names.

    weights: the model's, by name. Their shapes are those of the layers, but a state_dict would have the shapes of
    packed tensors.
    """
    targets = {}
    # The {} is needed: the host's function adds to its default argument, which keeps the keys of earlier models.
    for name, key in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        weight, part = (key, None) if isinstance(key, str) else key[:2]
        if weight in weights:
            shape = list(weights[weight].shape)
            if part is not None:  # a slice of a fused weight: (axis, start, length)
                shape[part[0]] = part[2]
            has_bias = part is None and f"{weight.removesuffix('.weight')}.bias" in weights
            targets[kohya_name(name)] = _PatchTarget(key, tuple(shape), has_bias)
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


def _check_no_duplicates(keys: Iterable[tuple[str, Any]], lora: LoraFile) -> None:
    """Raise ValueError if two modules of the file, in different spellings, patch the same weight."""
    first: dict[Any, str] = {}
    for module, key in keys:
        if first.setdefault(key, module) != module:
            raise ValueError(f"{lora.name} was not applied: {first[key]} and {module} are the same weight")
