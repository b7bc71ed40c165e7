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
from ...tcd.target_time import PREFIX
from ..config.settings import Config
from ..errors import UserError
from ..lora_file import LoraFile, by_layer, check_plain_lora, read_lora
from ..models.seam import Model


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
        path = Path(adapter.start_from).expanduser()
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
    own = dict(weights.items())
    layers = _layers_by_name(model, own)
    found = by_layer(file.modules, {name: layers.get(name, name) for name in file.modules}, path)
    unmatched = sorted(found.keys() ^ own.keys())
    if unmatched:
        raise UserError(
            f"adapter.start_from is {path}, with {len(file.modules)} modules, and the adapter has {len(own)}; not in "
            f"both are {', '.join(unmatched[:3])} ...: use a LoRA for this base, and the adapter.targets that it was "
            "trained with"
        )
    for layer, module in found.items():
        _copy_module(path, module.path, own[layer], module)
    _copy_embedding(path, weights, file)


def file_tensors(model: Model, weights: AdapterWeights) -> dict[str, Tensor]:
    """Return adapter weights as the tensors of a LoRA file for `model`: down, up and alpha of each module."""
    tensors: dict[str, Tensor] = {}
    for layer, lora in weights.items():
        name = model.lora_key(layer)
        tensors |= {f"{name}.{DOWN}": lora.down.detach(), f"{name}.{UP}": lora.up.detach()}
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(lora.alpha))
    if weights.target_time is not None:
        tensors |= {f"{PREFIX}{name}": tensor for name, tensor in weights.target_time.state_dict().items()}
    return tensors


def _layers_by_name(model: Model, layers: Iterable[str]) -> dict[str, str]:
    """Return the paths of layers by every name that files give them, as kohya_name spells it."""
    return {kohya_name(name): layer for layer in layers for name in model.lora_names(layer)}


def _lora(module: LoraModule, shape: tuple[int, ...]) -> Lora:
    # Some tools store the halves for a Linear as 1 x 1 convolutions, or the reverse; the product is the same.
    down = module.tensors[DOWN].reshape(module.rank, *shape[1:])
    up = module.tensors[UP].reshape(shape[0], module.rank, *[1] * (len(shape) - 2))
    return Lora(down, up, float(module.tensors[ALPHA]))


def _copy_module(path: Path, name: str, lora: Lora, module: LoraModule) -> None:
    check_plain_lora(f"adapter.start_from is {path}: {name}", module.tensors)
    found = {part: tuple(module.tensors[part].shape) for part in module.tensors.keys() - {ALPHA}}
    wanted = {DOWN: tuple(lora.down.shape), UP: tuple(lora.up.shape)}
    file_alpha = float(module.tensors[ALPHA])
    if found != wanted or file_alpha != lora.alpha:
        raise UserError(
            f"adapter.start_from is {path}, where {name} has {found} and alpha {file_alpha:g}, but the adapter has "
            f"{wanted} and alpha {lora.alpha:g}: use its adapter.rank, {module.rank}, and adapter.alpha, {file_alpha:g}"
        )
    if not lora.down.is_meta:
        lora.down.copy_(module.tensors[DOWN])
        lora.up.copy_(module.tensors[UP])


def _copy_embedding(path: Path, weights: AdapterWeights, file: LoraFile) -> None:
    given, own = file.target_time, weights.target_time
    if given is None:
        return
    if own is None or own.target_input != given.target_input:
        raise UserError(
            f"adapter.start_from is {path}, whose target-time embedding embeds {given.target_input}: use "
            f'method.target_time = true and method.target_input = "{given.target_input}"'
        )
    if not next(own.parameters()).is_meta:
        own.load_state_dict(given.state_dict())
