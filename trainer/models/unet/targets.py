"""Which layers of the UNet get a LoRA: kinds of layers, and groups of kinds."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UserError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
# The same 14 kinds as the target modules of diffusers' LCM-LoRA training script: all attention, feed-forward and
# convolution layers of the blocks, and the projections of the time embedding into the blocks.
TARGETS = (*_ATTENTION, "proj_in", "proj_out", *_FEED_FORWARD, *_CONVOLUTION, "time_emb_proj")
GROUPS = {"all": TARGETS, "attention": _ATTENTION, "feed_forward": _FEED_FORWARD, "convolution": _CONVOLUTION}


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
