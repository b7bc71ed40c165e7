"""The host's CONDITIONING of one caption: kept as tensors and JSON values, and prepared for a call of the network.

CONDITIONING is a list of entries [context, options]. Only a single entry without areas, masks, controls and the like
can be trained on: it is then an input of the network, and nothing that the host's sampler itself acts on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
from torch import Tensor

Conditioning = Any
"""The host's CONDITIONING."""

Scalar = str | int | float | bool | None

ModelConds = dict[str, Any]
"""The arguments of the host's apply_model for one row, by name: objects of comfy.conds."""

_CONTEXT = "cross_attn"  # the host's own name for the first part of an entry

READ_BY_HOST = frozenset({"attention_mask"})
"""Entries that some models read before a call: they stay on the CPU, as on a GPU every read would wait for it."""

_REFUSED = {
    "area": "an area of the picture",
    "control": "a ControlNet",
    "default": "a default for areas",
    "end_percent": "a range of steps",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
    "mask": "a mask of the picture",
    "reference_latents": "reference latents",
    "start_percent": "a range of steps",
    "strength": "a strength of its area",
}


def to_tensors(conditioning: Conditioning) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Return the named tensors and the JSON values of a CONDITIONING with one entry, to be stored.

    Tensors that were made in inference mode are copied if this is called outside of it, because autograd cannot use
    them. Raises ValueError if the network alone cannot use the conditioning, or it has other values.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"the CONDITIONING has {len(conditioning)} entries, but training needs one: do not combine conditionings"
        )
    context, options = conditioning[0]
    entries = {**options, _CONTEXT: context}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}
    for name, value in entries.items():
        if name in _REFUSED and value is not None:
            raise ValueError(f"the CONDITIONING has {name}, {_REFUSED[name]}: leave out the node that adds it")
        if isinstance(value, Tensor):
            tensors[name] = value.clone() if value.is_inference() else value
        elif value is None or isinstance(value, str | int | float):
            scalars[name] = value
        else:
            raise ValueError(
                f"the CONDITIONING has {name}, a {type(value).__name__}, but training can keep only tensors, numbers "
                "and texts: leave out the node that adds it"
            )
    return tensors, scalars


def from_tensors(tensors: Mapping[str, Tensor], scalars: Mapping[str, Scalar]) -> Conditioning:
    """Return the CONDITIONING from which `to_tensors` made these tensors and JSON values."""
    entries: dict[str, Any] = {**tensors, **scalars}
    return [[entries.pop(_CONTEXT), entries]]


def model_conds(model: Any, conditioning: Conditioning, x: Tensor, prompt_type: str) -> ModelConds:
    """Return what the host's sampler would pass to the network for a CONDITIONING with one entry.

    model: the host's BaseModel. x: latents [1, C, ...]. prompt_type: "positive" or "negative". In some families, layers
    of the network take part in this, so the adapter must be in the state of the call.
    """
    converted = comfy.sampler_helpers.convert_cond(conditioning)
    (encoded,) = comfy.samplers.encode_model_conds(model.extra_conds, converted, x, x.device, prompt_type)
    # Older hosts ask for the device as well.
    return {
        name: cond.process_cond(batch_size=len(x), area=None, device=x.device)
        for name, cond in encoded["model_conds"].items()
    }


def equal_rows(rows: Sequence[ModelConds]) -> list[list[int]]:
    """Return the indices of the rows that fit into one call without padding: of equal names, shapes and constants.

    The host itself would repeat a short context to the length of a longer one, where the network allows it.
    """
    groups: list[list[int]] = []
    for index, row in enumerate(rows):
        fitting = (group for group in groups if _fit(rows[group[0]], row))
        group = next(fitting, None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return groups


def _fit(row: ModelConds, other: ModelConds) -> bool:
    return row.keys() == other.keys() and all(
        cond.can_concat(other[name]) and cond.size() == other[name].size() for name, cond in row.items()
    )
