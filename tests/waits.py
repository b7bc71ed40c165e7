"""Counts for what the CPU would wait in a training step on a GPU: on the meta device in its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("meta")
aten = torch.ops.aten


@contextmanager
def counted_waits(*, numbers_are_one: bool = False) -> Iterator[list[str]]:
    """Give a list of the operations within the block for which the CPU would wait until the GPU has done all its work.

    numbers_are_one: numbers that are read from the meta device are 1, and counted; otherwise they are an error.
    """
    found: list[str] = []
    with _Operations(found, numbers_are_one), _Creations(found):
        yield found


class _Operations(TorchDispatchMode):
    """Finds copies between devices that are not only queued, and numbers that are read."""

    def __init__(self, found: list[str], numbers_are_one: bool) -> None:
        super().__init__()
        self.found, self.numbers_are_one = found, numbers_are_one

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if self.numbers_are_one and function is aten._local_scalar_dense.default and arguments[0].is_meta:
            self.found.append(str(function))
            return 1
        devices = {tensor.device.type for tensor in tensors_of(arguments, options)}
        if function is aten._to_copy.default and "device" in options:
            devices.add(torch.device(options["device"]).type)
        if len(devices) > 1 and not is_queued(function, arguments, options):
            self.found.append(str(function))
            if function is aten._to_copy.default and torch.device(options["device"]).type == "cpu":
                return torch.zeros_like(arguments[0], device="cpu")  # there are no data to read
        return function(*arguments, **options)


class _Creations(TorchFunctionMode):
    """Finds tensors that are made on the GPU from Python's numbers, which are copied to it."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        if function in (torch.tensor, torch.as_tensor, torch.asarray):
            copies = not isinstance(arguments[0], Tensor)
        else:  # an index of lists
            copies = function is Tensor.__getitem__ and any(isinstance(each, list) for each in parts_of(arguments[1]))
        if copies and made.is_meta:
            self.found.append(function.__name__)
        return made


def parts_of(index: object) -> tuple[object, ...]:
    """Return the parts of an index, one for each dimension."""
    return index if isinstance(index, tuple) else (index,)


def tensors_of(*values: object) -> list[Tensor]:
    """Return the tensors in nested values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_queued(function: Any, arguments: Any, options: Any) -> bool:
    """Return whether a copy between devices is only queued, or what comes from the CPU is one number."""
    if function is aten._to_copy.default:
        return bool(options.get("non_blocking"))
    if function is aten.copy_.default:
        return len(arguments) > 2 and bool(arguments[2])
    return all(tensor.ndim == 0 for tensor in tensors_of(arguments, options) if tensor.device.type == "cpu")
