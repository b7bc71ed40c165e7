"""LoRA beside the layers of a frozen network, and the embedding of the target time, behind one switch.

The network's own weights are neither copied nor changed, and its modules keep their names: a layer's `forward` is
replaced by one that adds the LoRA of the weights in use. So student, teacher and average are one network in memory,
and switching between them assigns one attribute, however many layers there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional

from .target_time import TargetTime

OFF = "off"
"""The state in which the network is the one that was loaded."""
STUDENT, AVERAGE, FILE = "student", "average", "file"
"""The weights in training, their moving average, and those of a file that is compared or drawn with."""

_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


class Lora(nn.Module):
    """The product of a low-rank update, (alpha / rank) up(down(x)), beside a Linear or a convolution.

    down: [r, in] or, for a convolution, [r, in, ...] with its kernel; up: [out, r] or [out, r, 1 ...]. Both are kept in
    float32 and multiplied in the dtype of x, which is the base's: rounding them to it moves the gradient no more than
    the base's own rounding does, and float32 products would run at a fraction of a GPU's speed.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down.float()), nn.Parameter(up.float())
        self.alpha = alpha

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    def forward(self, x: Tensor, layer: Any) -> Tensor:
        """Return what is added to layer(x)."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if down.ndim == 2:
            hidden = functional.linear(functional.linear(x, down), up)
        else:
            convolve = _CONVOLUTIONS[down.ndim]
            hidden = convolve(convolve(x, down, None, layer.stride, layer.padding, layer.dilation), up)
        return hidden * (self.alpha / self.rank)


class AdapterWeights(nn.Module):
    """One set of weights for a network: a LoRA for each of some layers, and perhaps an embedding of the target time."""

    def __init__(self, loras: Mapping[str, Lora], target_time: TargetTime | None = None) -> None:
        """loras: by the layer's path in the network."""
        super().__init__()
        self.paths = tuple(loras)
        # Before the LoRA, which is the order of the modules in the network, and so of the sums over all parameters.
        self.target_time = target_time
        self.loras = nn.ModuleList(loras.values())

    def items(self) -> Iterator[tuple[str, Lora]]:
        """Each layer's path and its LoRA."""
        for path, lora in zip(self.paths, self.loras, strict=True):
            assert isinstance(lora, Lora)
            yield path, lora

    def tensors(self) -> dict[str, Tensor]:
        """The weights themselves by name: `PATH.down`, `PATH.up`, and `target_time.NAME` of the embedding."""
        named: dict[str, Tensor] = {}
        for path, lora in self.items():
            named |= {f"{path}.down": lora.down, f"{path}.up": lora.up}
        if self.target_time is not None:
            named |= {f"target_time.{name}": tensor for name, tensor in self.target_time.named_parameters()}
        return named


class Adapter:
    """The adapter of one network: named sets of weights, of which `state` names the one in use, or OFF.

    time_layer: the path of the layer whose output the embedding of the target time is added to, the last Linear of the
    MLP that embeds t.
    """

    def __init__(self, network: nn.Module, time_layer: str) -> None:
        """Change nothing yet: layers are taken over as weights for them are added."""
        # Weak references, here and in a layer's `forward`: without a cycle a network is freed as soon as it is dropped.
        self._network, self.time_layer = ref(network), time_layer
        self.weights: dict[str, AdapterWeights] = {}
        self.state = OFF
        self.times: tuple[Tensor, Tensor] | None = None
        """What the network is told of t and s, [B] each, in the call that follows; None: no target time."""
        self._places: dict[str, dict[str, Lora]] = {}

    @property
    def network(self) -> nn.Module:
        """The network, which whoever has the adapter keeps."""
        network = self._network()
        assert network is not None
        return network

    def add(self, state: str, weights: AdapterWeights) -> AdapterWeights:
        """Add a set of weights, on the devices of the layers beside which they are, and use it.

        Raises KeyError for a state that is there, and AttributeError for a path that is not in the network.
        """
        if state in (OFF, *self.weights):
            raise KeyError(f"the adapter has {state} already")
        for path, lora in weights.items():
            lora.to(_device(self.network.get_submodule(path)))
            self._place(path)[state] = lora
        if weights.target_time is not None:
            weights.target_time.to(_device(self.network.get_submodule(self.time_layer)))
            self._place(self.time_layer)
        self.weights[state] = weights
        self.state = state
        return weights

    def remove(self, state: str) -> None:
        """Drop a set of weights; layers that none is left for get their own `forward` back."""
        weights = self.weights.pop(state)
        for path in weights.paths:
            del self._places[path][state]
        told = any(each.target_time is not None for each in self.weights.values())
        for path, loras in list(self._places.items()):
            if not loras and not (told and path == self.time_layer):
                self.network.get_submodule(path).__dict__.pop("forward")
                del self._places[path]
        if self.state == state:
            self.state = OFF

    def eject(self) -> None:
        """Drop all weights: the network is as it was loaded."""
        for state in list(self.weights):
            self.remove(state)

    @contextmanager
    def using(self, state: str) -> Iterator[None]:
        """Within the block the network is in `state`, and in the one before after it, whatever happens.

        Raises KeyError for a state that is not there.
        """
        if state != OFF and state not in self.weights:
            raise KeyError(f"the adapter has no {state}: it has {', '.join(self.weights) or 'nothing'}")
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before

    def off(self) -> Any:
        """Within the block the network is the teacher; the same as using(OFF)."""
        return self.using(OFF)

    @property
    def target_time(self) -> TargetTime | None:
        """The embedding in use, if there is one."""
        return None if self.state == OFF else self.weights[self.state].target_time

    def _place(self, path: str) -> dict[str, Lora]:
        """The LoRA of a layer by state; with the first its `forward` is replaced."""
        if path not in self._places:
            layer = self.network.get_submodule(path)
            self._places[path] = {}
            # An attribute of the instance: state_dict, hooks and FSDP see the layer as it was.
            layer.forward = _Beside(self, layer, self._places[path], is_time=path == self.time_layer)
        return self._places[path]


class _Beside:
    """The `forward` of a layer with an adapter."""

    def __init__(self, adapter: Adapter, layer: nn.Module, loras: Mapping[str, Lora], *, is_time: bool) -> None:
        self.adapter, self.layer, self.loras, self.is_time = adapter, ref(layer), loras, is_time

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.layer()
        y: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        lora = self.loras.get(self.adapter.state)
        if lora is not None:
            y = y + lora(x, layer).to(y.dtype)
        if self.is_time:
            embedding = self.adapter.target_time
            if embedding is not None and self.adapter.times is not None:
                y = y + embedding(*self.adapter.times).to(y.dtype)
        return y


def new_weights(
    network: nn.Module,
    paths: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    target_time: TargetTime | None = None,
) -> AdapterWeights:
    """Return trainable weights for the layers at `paths` that change nothing yet: down is random, up is zero.

    Where the layers have no data (the meta device), neither have the weights. Raises ValueError for a layer that is
    neither a Linear nor a convolution without groups, and AttributeError for a path that is not in the network.
    """
    generator = torch.Generator().manual_seed(seed)
    loras = {path: _new_lora(path, network.get_submodule(path), rank, alpha, generator) for path in paths}
    return AdapterWeights(loras, target_time)


def layer_shape(layer: Any) -> tuple[int, ...] | None:
    """The weight's shape [out, in, ...] as a layer uses it, however it is stored; None where no LoRA can be beside it.

    Layers are told by their attributes, as quantised and cast-on-use ones are of other classes than torch's.
    """
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    if hasattr(layer, "kernel_size") and hasattr(layer, "in_channels") and getattr(layer, "groups", 0) == 1:
        transposed = getattr(layer, "transposed", False)
        return None if transposed else (int(layer.out_channels), int(layer.in_channels), *layer.kernel_size)
    return None


def _new_lora(path: str, layer: Any, rank: int, alpha: float, generator: torch.Generator) -> Lora:
    shape = layer_shape(layer)
    if shape is None:
        raise ValueError(f"{path} is a {type(layer).__name__}, which has no LoRA: use Linear layers and convolutions")
    device = _device(layer)
    down = torch.empty(rank, *shape[1:], device=device if device.type == "meta" else "cpu")
    up = torch.zeros(shape[0], rank, *[1] * (len(shape) - 2), device=down.device)
    if device.type != "meta":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # as torch's own layers begin
    return Lora(down, up, alpha)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
