"""Captions as the trainer keeps them, named tensors with rows, and as ComfyUI has them, one CONDITIONING each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..conditioning import Conditioning

_SIZE = ".size"  # suffix of the tensor [B, ndim - 1] with the sizes of the rows of a tensor, before they were padded
_VALUE = "value."  # prefix of the tensors [B] with a number that is no tensor in a CONDITIONING


def to_row(conditioning: Any) -> Conditioning:
    """Return the CONDITIONING of one caption as one row.

    Raises ValueError if it has values that training cannot keep.
    """
    from ....nodes.host.training import to_tensors

    tensors, values = to_tensors(conditioning)
    for name, tensor in tensors.items():
        if not tensor.ndim or len(tensor) != 1:
            raise ValueError(f"the CONDITIONING has {name} of shape {list(tensor.shape)}, but must have one row")
    numbers = {name: value for name, value in values.items() if value is not None}
    texts = [name for name, value in numbers.items() if isinstance(value, str)]
    if texts:
        raise ValueError(f"the CONDITIONING has the text {texts[0]}, but training can keep only tensors and numbers")
    # float64 keeps whole numbers and floats alike; True and False become 1 and 0.
    kept = {_VALUE + name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()}
    return Conditioning({**tensors, **kept})


def join(rows: Sequence[Conditioning]) -> Conditioning:
    """Join captions of one row each, padding each tensor with zeros to the largest size, and keep the rows' sizes.

    Raises ValueError if they do not all have the same names.
    """
    from ....nodes.host.training import READ_BY_HOST

    padded = []
    names = list(dict.fromkeys(name for row in rows for name in row.tensors))
    largest = {name: _largest([row.tensors[name] for row in rows if name in row.tensors]) for name in names}
    for row in rows:
        tensors = {name: _padded(tensor, largest[name]) for name, tensor in row.tensors.items()}
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items() if name in READ_BY_HOST or _is_value(name)}
        sizes = {name + _SIZE: torch.tensor([each.shape[1:]]) for name, each in row.tensors.items() if each.ndim > 1}
        padded.append(
            Conditioning({name: each for name, each in tensors.items() if name not in on_cpu}, on_cpu | sizes)
        )
    return Conditioning.cat(padded)


def to_conditionings(batch: Conditioning) -> list[Any]:
    """Return the CONDITIONING of each row of a joined batch, with each tensor cut to its row's own size."""
    from ....nodes.host.training import from_tensors

    sizes = {name.removesuffix(_SIZE): each.tolist() for name, each in batch.on_cpu.items() if name.endswith(_SIZE)}
    numbers = {name: each.tolist() for name, each in batch.on_cpu.items() if _is_value(name)}
    whole = {name: each for name, each in batch.on_cpu.items() if name not in numbers and not name.endswith(_SIZE)}
    conditionings = []
    for row in range(len(batch)):
        tensors = {}
        for name, tensor in {**batch.tensors, **whole}.items():
            lengths = sizes[name][row] if name in sizes else []
            tensors[name] = tensor[slice(row, row + 1), *map(slice, lengths)]
        values = {name.removeprefix(_VALUE): _number(each[row]) for name, each in numbers.items()}
        conditionings.append(from_tensors(tensors, values))
    return conditionings


def _is_value(name: str) -> bool:
    return name.startswith(_VALUE)


def _largest(tensors: Sequence[Tensor]) -> list[int]:
    return [max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor [1, ...] padded with zeros at the end of each dimension, to [1, *shape]."""
    padding = [amount for old, new in zip(tensor.shape[:0:-1], shape[::-1], strict=True) for amount in (0, new - old)]
    return torch.nn.functional.pad(tensor, padding)


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
