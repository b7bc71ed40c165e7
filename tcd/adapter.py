"""An adapter for a frozen network: LoRA layers, an optional target-time embedding, and switching between weight sets.

The adapter replaces the `forward` of a layer by one that also adds the output of the LoRA in use. The network's weights
are neither copied nor changed, and its modules keep their names. Teacher, student and average are therefore one network
in memory, and assigning one attribute, `Adapter.state`, switches between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .low_rank import is_frozen_linear, linear_with_low_rank, low_rank
from .target_time import TargetTime

OFF = "off"
"""The state without an adapter: the network is the teacher."""
STUDENT, AVERAGE, FILE = "student", "average", "file"
"""The states with the weights in training, with their moving average, and with weights loaded from a LoRA file."""


class Lora(nn.Module):
    """A low-rank update, (alpha / rank) up(down(x)), of one Linear or convolution (arXiv 2106.09685).

    down: [rank, in] for a Linear, [rank, in, *kernel] for a convolution. up: [out, rank] or [out, rank, 1, ...].
    Both are stored in float32 and cast to the dtype of x, the base's dtype, for the product. Products in float32 would
    be much slower on a GPU, and the cast changes the gradient no more than the rounding in the base does.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down.float()), nn.Parameter(up.float())
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    def forward(self, x: Tensor, layer: Any, plain: Callable[[], Tensor] | None) -> Tensor:
        """Return layer(x) with the update; plain: computes layer(x) without it, None for a frozen Linear."""
        down, up, scale = self.down.to(x.dtype), self.up.to(x.dtype), self.alpha / self.rank
        if plain is None:
            return linear_with_low_rank(x, layer, down, up, scale)
        y = plain()
        return y + low_rank(x, down, up, scale, layer).to(y.dtype)


class AdapterWeights(nn.Module):
    """One set of adapter weights: LoRA for some layers of a network, and optionally an embedding of the target time."""

    def __init__(self, loras: Mapping[str, Lora], target_time: TargetTime | None = None) -> None:
        """loras: LoRA by the path of its layer in the network."""
        super().__init__()
        self.paths = tuple(loras)
        # Registered first. The order of the parameters is the order in which the gradient norm is summed, so changing
        # it changes the last bits of a training run.
        self.target_time = target_time
        self.loras = nn.ModuleList(loras.values())

    def items(self) -> Iterator[tuple[str, Lora]]:
        """Yield (path of the layer, its LoRA)."""
        for path, lora in zip(self.paths, self.loras, strict=True):
            assert isinstance(lora, Lora)
            yield path, lora

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights (not copies) by name: `PATH.down`, `PATH.up` and `target_time.NAME`."""
        named: dict[str, Tensor] = {}
        for path, lora in self.items():
            named |= {f"{path}.down": lora.down, f"{path}.up": lora.up}
        if self.target_time is not None:
            named |= {f"target_time.{name}": tensor for name, tensor in self.target_time.named_parameters()}
        return named


class Adapter:
    """The adapter of one network: several sets of weights by name; `state` is the name of the set in use, or OFF.

    time_layer: the path of the last Linear of the MLP that embeds t. The embedding of the target time is added to its
    output.
    """

    def __init__(
        self,
        network: nn.Module,
        time_layer: str,
        is_frozen_linear: Callable[[nn.Module], bool] = is_frozen_linear,
    ) -> None:
        """Change nothing yet: a layer's `forward` is replaced when the first weights for it are added.

        is_frozen_linear: whether a layer computes as a torch Linear without gradients (low_rank.py).
        """
        # The references to the network, here and in a layer's `forward`, are weak. Strong ones would form a cycle, and
        # the network would stay in memory until the next garbage collection.
        self._network, self.time_layer, self.is_frozen_linear = ref(network), time_layer, is_frozen_linear
        self.weights: dict[str, AdapterWeights] = {}
        self.state = OFF
        self.times: tuple[Tensor, Tensor] | None = None
        """Network times (t, s), [B] each, for the embedding in the next call; None for a call without a target time."""
        self._loras: dict[str, dict[str, Lora]] = {}
        """path of a layer -> state -> LoRA, for the layers whose `forward` is replaced."""

    @property
    def network(self) -> nn.Module:
        """The network; the adapter does not keep it alive."""
        network = self._network()
        assert network is not None
        return network

    def add(self, state: str, weights: AdapterWeights) -> AdapterWeights:
        """Add a set of weights as `state`, move each LoRA to its layer's device, and make it the set in use.

        Raises KeyError if `state` is OFF or already exists, AttributeError if the network has no layer at a path, and
        ValueError if something else has replaced the `forward` of a layer.
        """
        if state in (OFF, *self.weights):
            raise KeyError(f"the adapter has {state} already")
        for path, lora in weights.items():
            lora.to(_device(self.network.get_submodule(path)))
            self._replace_forward(path)[state] = lora
        if weights.target_time is not None:
            weights.target_time.to(_device(self.network.get_submodule(self.time_layer)))
            self._replace_forward(self.time_layer)
        self.weights[state] = weights
        self.state = state
        return weights

    def remove(self, state: str) -> None:
        """Remove a set of weights, and restore the `forward` of layers that have no weights left.

        If it was the set in use, the state becomes OFF. Raises KeyError if there is no such state.
        """
        weights = self.weights.pop(state)
        for path in weights.paths:
            del self._loras[path][state]
        embedding_left = any(each.target_time is not None for each in self.weights.values())
        for path, loras in list(self._loras.items()):
            if not loras and not (embedding_left and path == self.time_layer):
                self.network.get_submodule(path).__dict__.pop("forward")
                del self._loras[path]
        if self.state == state:
            self.state = OFF

    def eject(self) -> None:
        """Remove all sets of weights: the network is again as it was loaded."""
        for state in list(self.weights):
            self.remove(state)

    @contextmanager
    def using(self, state: str) -> Iterator[None]:
        """Use `state` within the block, then return to the previous state, also after an exception.

        Raises KeyError if there is no such state.
        """
        if state != OFF and state not in self.weights:
            raise KeyError(f"the adapter has no {state}: it has {', '.join(self.weights) or 'nothing'}")
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before

    def off(self) -> Any:
        """Use no adapter within the block, so that the network is the teacher: the same as using(OFF)."""
        return self.using(OFF)

    @property
    def target_time(self) -> TargetTime | None:
        """The target-time embedding of the set in use; None if it has none."""
        return None if self.state == OFF else self.weights[self.state].target_time

    def _replace_forward(self, path: str) -> dict[str, Lora]:
        """Return the layer's LoRA by state; on the first call for a layer, replace its `forward`."""
        if path not in self._loras:
            layer = self.network.get_submodule(path)
            if "forward" in vars(layer):
                raise ValueError(f"{path} has a replaced forward already, such as another adapter's: remove that first")
            self._loras[path] = {}
            # The instance attribute takes precedence over the class's method; state_dict, hooks and FSDP do not see it.
            layer.forward = _AdaptedForward(self, layer, self._loras[path], is_time=path == self.time_layer)
        return self._loras[path]


class _AdaptedForward:
    """Replaces the `forward` of one layer: adds the outputs of the LoRA and of the embedding in use."""

    def __init__(self, adapter: Adapter, layer: nn.Module, loras: Mapping[str, Lora], *, is_time: bool) -> None:
        self.adapter, self.layer, self.loras, self.is_time = adapter, ref(layer), loras, is_time

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.layer()
        plain = partial(type(layer).forward, layer, x, *args, **kwargs)
        lora = self.loras.get(self.adapter.state)
        if lora is None:
            y: Tensor = plain()
        else:
            y = lora(x, layer, None if self.adapter.is_frozen_linear(layer) else plain)
        if self.is_time:
            embedding = self.adapter.target_time
            if embedding is not None and self.adapter.times is not None:
                y = y + _for_rows(embedding(*self.adapter.times), y)
        return y


def _for_rows(embedded: Tensor, y: Tensor) -> Tensor:
    """Return an embedding [B, width] of B examples in the shape and dtype of y [R, ..., width].

    Networks for videos may embed a time for each of F frames: y is [B F, width] or [B, F, width].
    """
    rows = embedded.repeat_interleave(len(y) // len(embedded), dim=0)
    return rows.view(len(y), *[1] * (y.ndim - 2), -1).to(y.dtype)


def new_weights(
    network: nn.Module,
    paths: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    target_time: TargetTime | None = None,
) -> AdapterWeights:
    """Return trainable weights for the layers at `paths`, initialized to change nothing: down is random, up is zero.

    For layers on the meta device, the weights are on the meta device too. Raises ValueError if a layer is neither a
    Linear nor an ungrouped, non-transposed convolution that pads with zeros, and AttributeError if the network has
    no layer at a path.
    """
    generator = torch.Generator().manual_seed(seed)
    loras = {path: _new_lora(path, network.get_submodule(path), rank, alpha, generator) for path in paths}
    return AdapterWeights(loras, target_time)


def layer_shape(layer: Any) -> tuple[int, ...] | None:
    """Return the shape of a layer's weight, [out, in, ...], or None if the layer cannot have a LoRA.

    The shape comes from the layer's attributes, not from its weight tensor: a quantised weight may be stored in another
    shape. Layers are recognized by attributes, not by class: quantised layers and layers that cast their weight when it
    is used have their own classes.
    """
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    if hasattr(layer, "kernel_size") and hasattr(layer, "in_channels") and getattr(layer, "groups", 0) == 1:
        other_kind = getattr(layer, "transposed", False) or getattr(layer, "padding_mode", "zeros") != "zeros"
        return None if other_kind else (int(layer.out_channels), int(layer.in_channels), *layer.kernel_size)
    return None


def layer_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the weight shape [out, in, ...] of each layer that can have a LoRA, by its path in the network."""
    shapes = {path: layer_shape(module) for path, module in network.named_modules()}
    return {path: shape for path, shape in shapes.items() if shape is not None}


def _new_lora(path: str, layer: Any, rank: int, alpha: float, generator: torch.Generator) -> Lora:
    shape = layer_shape(layer)
    if shape is None:
        raise ValueError(f"{path} is a {type(layer).__name__}, which has no LoRA: use Linear layers and convolutions")
    device = _device(layer)
    down = torch.empty(rank, *shape[1:], device=device if device.type == "meta" else "cpu")
    up = torch.zeros(shape[0], rank, *[1] * (len(shape) - 2), device=down.device)
    if device.type != "meta":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # as torch initializes nn.Linear
    return Lora(down, up, alpha)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
