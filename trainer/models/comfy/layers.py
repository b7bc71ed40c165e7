"""Which layers of a network get a LoRA, by rules that hold for every family: there is no list of names for each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import UserError

GROUPS = ("all", "attention", "feed_forward", "convolution")
_ATTENTION = re.compile(r"attn|attention|(^|[._])(to_)?(qkv|[qkvo])(_proj)?([._]|$)|proj_out|to_out")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|(^|[._])ff[._]|(^|[._])w[123]$")


def kind_of(path: str) -> str:
    """Return the last part of a layer's path that is no number, with the numbers after it, such as qkv or net.0."""
    parts = path.split(".")
    first = next((k for k in range(len(parts) - 1, -1, -1) if not parts[k].isdigit()), 0)
    return ".".join(parts[first:])


def chosen_layers(shapes: dict[str, tuple[int, ...]], targets: Sequence[str]) -> list[str]:
    """Return the paths of the layers that `targets`, groups and kinds, name, in the network's order.

    shapes: the weight shape of each layer that can have a LoRA, by path. Raises UserError for an unknown name.
    """
    kinds = dict.fromkeys(map(kind_of, shapes))
    unknown = [name for name in targets if name not in GROUPS and name not in kinds]
    if unknown or not targets:
        raise UserError(
            f"adapter.targets is {list(targets)}: use the groups {', '.join(GROUPS)}, or the kinds of this model, "
            f"{', '.join(kinds)}"
        )
    return [path for path, shape in shapes.items() if any(_is_in(path, shape, name) for name in targets)]


def _is_in(path: str, shape: tuple[int, ...], name: str) -> bool:
    match name:
        case "all":
            return True
        case "attention":
            return bool(_ATTENTION.search(path))
        case "feed_forward":
            return bool(_FEED_FORWARD.search(path)) and not _ATTENTION.search(path)
        case "convolution":
            return len(shape) > 2
    return kind_of(path) == name
