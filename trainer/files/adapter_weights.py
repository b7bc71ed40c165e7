"""Adapter weights from a LoRA file, and as the tensors of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...tcd import AdapterWeights, Lora, LoraModule, coverage, kohya_name, lora_modules
from ...tcd.adapter import FILE, layer_shape
from ...tcd.lora_keys import ALPHA, DOWN, UP
from ...tcd.target_time import PREFIX
from ..errors import UserError
from ..models.seam import Model
from .adapter_file import AdapterFile, read_adapter


def load_weights(model: Model, path: Path) -> AdapterWeights:
    """Read a LoRA file as weights for `model`, float32 and frozen; they are not added to its adapter.

    Raises UserError if the file is not a plain LoRA all of which fits this model.
    """
    file = read_adapter(path)
    layers = {kohya_name(layer): layer for layer in layer_shapes(model)}
    shapes = {kohya_name(layer): shape for layer, shape in layer_shapes(model).items()}
    try:
        fit = coverage(file.lora, shapes)
        modules, _ = lora_modules(file.lora)
    except ValueError as error:
        raise UserError(f"{path} is not a LoRA for this model: {error}") from error
    if not fit.complete:
        raise UserError(f"{path} is not a LoRA for this model: {fit.describe()}")
    loras = {layers[name]: _lora(path, module, shapes[name]) for name, module in modules.items()}
    return AdapterWeights(loras, file.target_time).requires_grad_(False)


@contextmanager
def file_in_use(model: Model, path: Path) -> Iterator[None]:
    """Within the block the weights of a file are in use, and those of before after it.

    Raises UserError as `load_weights` does.
    """
    before = model.adapter.state
    model.adapter.add(FILE, load_weights(model, path))
    try:
        yield
    finally:
        model.adapter.remove(FILE)
        model.adapter.state = before


@torch.no_grad()
def start_from(weights: AdapterWeights, path: Path) -> None:
    """Fill weights in training with those of a file, which has the same modules, rank and alpha.

    Where the weights have an embedding of the target time and the file has none, it stays as it is: without effect.
    Raises UserError if the file has a different one, or is not a LoRA.
    """
    file = read_adapter(path)
    given, _ = lora_modules(file.lora)
    own = {kohya_name(layer): lora for layer, lora in weights.items()}
    strange = sorted(given.keys() ^ own.keys())
    if strange:
        raise UserError(
            f"adapter.start_from is {path}, with {len(given)} modules, and the adapter has {len(own)}; not in both are "
            f"{', '.join(strange[:3])} ...: use a LoRA for this base, and the adapter.targets that it was trained with"
        )
    for name, module in given.items():
        _fill(path, name, own[name], module)
    _fill_embedding(path, weights, file)


def file_tensors(model: Model, weights: AdapterWeights) -> dict[str, Tensor]:
    """The tensors of weights under the names that a file for `model` has, each module with its alpha."""
    tensors: dict[str, Tensor] = {}
    for layer, lora in weights.items():
        name = model.lora_key(layer)
        tensors |= {f"{name}.{DOWN}": lora.down.detach(), f"{name}.{UP}": lora.up.detach()}
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(lora.alpha))
    if weights.target_time is not None:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in weights.target_time.state_dict().items()}
    return tensors


def layer_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The weight shapes [out, in, ...] of all layers that a LoRA can be beside, by path."""
    found = {path: layer_shape(module) for path, module in model.network.named_modules()}
    return {path: shape for path, shape in found.items() if shape is not None}


def refuse_other_parts(name: str, parts: Mapping[str, Tensor]) -> None:
    """Raise UserError if a module has more than a plain LoRA's down, up and alpha."""
    others = sorted(parts.keys() - {DOWN, UP, ALPHA})
    if others:
        raise UserError(
            f"{name} has {', '.join(others)}, which is more than a plain LoRA: only kohya's names have that"
        )


def _lora(path: Path, module: LoraModule, shape: tuple[int, ...]) -> Lora:
    refuse_other_parts(f"{path}: {module.path}", module.tensors)
    # A 1 x 1 convolution's halves may stand beside a Linear, and the other way round: the product is the same.
    down = module.tensors[DOWN].reshape(module.rank, *shape[1:])
    up = module.tensors[UP].reshape(shape[0], module.rank, *[1] * (len(shape) - 2))
    return Lora(down, up, float(module.tensors[ALPHA]))


def _fill(path: Path, name: str, lora: Lora, module: LoraModule) -> None:
    found = {part: tuple(module.tensors[part].shape) for part in module.tensors.keys() - {ALPHA}}
    wanted = {DOWN: tuple(lora.down.shape), UP: tuple(lora.up.shape)}
    its_alpha = float(module.tensors[ALPHA])
    if found != wanted or its_alpha != lora.alpha:
        raise UserError(
            f"adapter.start_from is {path}, where {name} has {found} and alpha {its_alpha:g}, but the adapter has "
            f"{wanted} and alpha {lora.alpha:g}: use its adapter.rank, {module.rank}, and adapter.alpha, {its_alpha:g}"
        )
    if not lora.down.is_meta:
        lora.down.copy_(module.tensors[DOWN])
        lora.up.copy_(module.tensors[UP])


def _fill_embedding(path: Path, weights: AdapterWeights, file: AdapterFile) -> None:
    given, own = file.target_time, weights.target_time
    if given is None:
        return
    if own is None or own.target_input != given.target_input:
        raise UserError(
            f"adapter.start_from is {path}, whose network is told {given.target_input}: use "
            f'method.target_time = true and method.target_input = "{given.target_input}"'
        )
    if not next(own.parameters()).is_meta:
        own.load_state_dict(given.state_dict())
