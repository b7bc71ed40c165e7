"""Converts between LoRA files and the weights of a model's adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...tcd import AdapterWeights, Lora, LoraModule, coverage, kohya_name
from ...tcd.adapter import FILE, layer_shapes
from ...tcd.lora_keys import ALPHA, DOWN, UP
from ...tcd.lora_weights import copy_modules, lora_tensors
from ..config.settings import Config
from ..errors import UserError
from ..lora_file import by_layer, check_plain_lora, read_lora
from ..models.seam import Model
from ..user_path import user_path


def load_weights(model: Model, path: Path) -> AdapterWeights:
    """Read a LoRA file as float32, frozen weights for the layers of `model`, without adding them to its adapter.

    Modules for a text encoder are left out.

    Raises UserError if the file is not a plain LoRA, or a module of it does not fit this model.
    """
    file = read_lora(path)
    modules, shapes = file.network_modules, layer_shapes(model.network)
    layers = _layers_by_name(model, shapes)
    if not modules:
        raise UserError(f"{path} has weights for a text encoder alone, and none for the network")
    for module in modules.values():
        check_plain_lora(f"{path}: {module.path}", module.tensors)
    tensors = {f"{name}.{part}": tensor for name, module in modules.items() for part, tensor in module.tensors.items()}
    fit = coverage(tensors, {name: shapes[layer] for name, layer in layers.items()})
    if not fit.complete:
        raise UserError(f"{path} is not a LoRA for this model: {fit.describe()}; use a base of its family")
    loras = {layer: _lora(module, shapes[layer]) for layer, module in by_layer(modules, layers, path).items()}
    return AdapterWeights(loras, file.target_time).requires_grad_(False)


@contextmanager
def using_file(model: Model, path: Path) -> Iterator[None]:
    """Use the weights of a LoRA file within the block, and restore the adapter's previous state after it.

    Raises UserError as `load_weights` does.
    """
    before = model.adapter.state
    model.adapter.add(FILE, load_weights(model, path))
    try:
        yield
    finally:
        model.adapter.remove(FILE)
        model.adapter.state = before


def initial_weights(model: Model, config: Config) -> AdapterWeights:
    """Return the student's weights at the start of training: new ones, or the weights of adapter.start_from.

    For a model on the meta device they have no data, and the file is only checked. Raises UserError if adapter.targets
    has unknown names, or the file of adapter.start_from is missing or does not fit the adapter.
    """
    adapter = config.adapter
    weights = model.new_weights(
        rank=adapter.rank,
        alpha=adapter.alpha,
        seed=config.training.seed,
        targets=adapter.targets,
        target_input=config.method.embedded_input,
    )
    if adapter.start_from:
        path = user_path(adapter.start_from)
        if not path.is_file():
            raise UserError(f"adapter.start_from is {path}, where there is no file")
        start_from(model, weights, path)
    return weights


@torch.no_grad()
def start_from(model: Model, weights: AdapterWeights, path: Path) -> None:
    """Copy the weights of a LoRA file into trainable `weights`; if these are on the meta device, only check the file.

    If the file has no target-time embedding, the embedding of `weights` keeps its initial values.

    Raises UserError if the file is not a LoRA, or differs from `weights` in modules, shapes, alpha or target input.
    """
    file = read_lora(path)
    layers = _layers_by_name(model, weights.paths)
    found = by_layer(file.modules, {name: layers.get(name, name) for name in file.modules}, path)
    for module in found.values():
        check_plain_lora(f"adapter.start_from is {path}: {module.path}", module.tensors)
    try:
        copy_modules(found, file.target_time, weights)
    except ValueError as error:
        raise UserError(f"adapter.start_from is {path}, {error}") from error


def file_tensors(model: Model, weights: AdapterWeights) -> dict[str, Tensor]:
    """Return adapter weights as the tensors of a LoRA file for `model`: down, up and alpha of each module."""
    return lora_tensors(weights, model.lora_key)


def _layers_by_name(model: Model, layers: Iterable[str]) -> dict[str, str]:
    """Return the paths of layers by every name that files give them, as kohya_name spells it."""
    return {kohya_name(name): layer for layer in layers for name in model.lora_names(layer)}


def _lora(module: LoraModule, shape: tuple[int, ...]) -> Lora:
    # Some tools store the halves for a Linear as 1 x 1 convolutions, or the reverse; the product is the same.
    down = module.tensors[DOWN].reshape(module.rank, *shape[1:])
    up = module.tensors[UP].reshape(shape[0], module.rank, *[1] * (len(shape) - 2))
    return Lora(down, up, float(module.tensors[ALPHA]))
