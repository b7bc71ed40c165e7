"""Which layers of a UNet get a LoRA, and in which order: the same in each engine.

Layers are named by their paths in diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .errors import UserError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
# The same 14 kinds as the target modules of diffusers' LCM-LoRA training script: all attention, feed-forward and
# convolution layers of the blocks, and the projections of the time embedding into the blocks.
TARGETS = (*_ATTENTION, "proj_in", "proj_out", *_FEED_FORWARD, *_CONVOLUTION, "time_emb_proj")
GROUPS = {"all": TARGETS, "attention": _ATTENTION, "feed_forward": _FEED_FORWARD, "convolution": _CONVOLUTION}

# The order in which diffusers registers the parts of a UNet. New weights are drawn in this order.
_ORDER = (
    *("down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("proj_in", "transformer_blocks", "proj_out", "attn1", "attn2", "ff", "to_q", "to_k", "to_v", "to_out"),
    *("net", "conv1", "time_emb_proj", "conv2", "conv_shortcut", "conv", "proj"),
)


def kinds_of(targets: Sequence[str]) -> list[str]:
    """Return the kinds of layers for names of groups and kinds, without repetition, in the order of TARGETS.

    Raises UserError if a name is neither a group nor a kind, or if there are no names.
    """
    unknown = [name for name in targets if name not in GROUPS and name not in TARGETS]
    if unknown or not targets:
        raise UserError(
            f"adapter.targets is {list(targets)}: use the groups {', '.join(GROUPS)}, or the kinds {', '.join(TARGETS)}"
        )
    kinds = {kind for name in targets for kind in GROUPS.get(name, (name,))}
    return [kind for kind in TARGETS if kind in kinds]


def kind_of(path: str) -> str | None:
    """Return the kind of the layer at a path, such as to_q; None for a layer outside of the blocks."""
    return next((kind for kind in TARGETS if path.endswith(f".{kind}")), None)


def chosen_layers(paths: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Return the paths of the layers that `targets`, groups and kinds, name, in the order of diffusers' UNets.

    Raises UserError as `kinds_of` does.
    """
    kinds = kinds_of(targets)
    return sorted((path for path in paths if kind_of(path) in kinds), key=_place)


def _place(path: str) -> list[int]:
    return [int(part) if part.isdigit() else _ORDER.index(part) for part in path.split(".")]
