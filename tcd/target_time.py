"""The target time told to the network (TCF(S+) of arXiv 2402.19159), by an embedding beside the network's own of t.

Flows in: the timesteps t and s.  Flows out: what is added to the network's embedding of t.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

PREFIX = "tcd_target_time."

Told = Literal["s", "t-s"]
"""What is embedded: the target time, or how far before t it is."""


class TargetTime(nn.ModuleDict):
    """out(SiLU(in(sinusoid(s)))) for a UNet of Stable Diffusion's kind; `out` is zero at first, so nothing is changed.

    channels: of the sinusoid, as of the UNet's first convolution; width: of the UNet's embedding of t, after its MLP.
    """

    def __init__(self, channels: int, width: int, *, told: Told = "s") -> None:
        super().__init__({"in": nn.Linear(channels, width), "out": nn.Linear(width, width)})
        self.channels, self.told = channels, told
        for parameter in self["out"].parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], told: str) -> "TargetTime":
        """Build from the tensors of a file, under its names without the prefix; float32, whatever they are.

        Raises ValueError when they are not those of an embedding, and when `told` is no `Told`.
        """
        channels, width = shape_of(tensors)
        embedding = cls(channels, width, told=checked_told(told))
        embedding.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return embedding

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """Embed timesteps t and s, [B] each, as [B, width]."""
        time = t - s if self.told == "t-s" else s
        hidden = self["in"](sinusoid(time, self.channels))
        embedded: Tensor = self["out"](functional.silu(hidden))
        return embedded


def sinusoid(timesteps: Tensor, channels: int) -> Tensor:
    """Embed timesteps [B] as [B, channels] float32, as Stable Diffusion does: cosines, then sines."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000) / half))
    angles = timesteps.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def split_target_time(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part the tensors of a file: those of its LoRA, and those of its embedding, without the prefix."""
    embedding = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}, embedding


def shape_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The channels and the width of an embedding, from its tensors without the prefix, which may be without data.

    Raises ValueError when they are not those of an embedding.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width, channels = found["in.weight"] if len(found.get("in.weight", ())) == 2 else (0, 0)
    expected = {"in.weight": (width, channels), "in.bias": (width,), "out.weight": (width, width), "out.bias": (width,)}
    if found != expected or not width or channels % 2 or not channels:
        raise ValueError(
            f"its embedding of the target time has {found or 'no tensors'}, but must have in.weight [width, channels], "
            "in.bias [width], out.weight [width, width] and out.bias [width]: the file is damaged"
        )
    return channels, width


def checked_told(told: str) -> Told:
    """Return what a file says is embedded; raises ValueError when it is nothing that is known here."""
    for known in get_args(Told):
        if told == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(
        f"its embedding of the target time is told {told!r}, but only {' and '.join(get_args(Told))} are known here: "
        "update this pack"
    )
