"""An embedding of the target time s, which is added to the network's embedding of t: TCF(S+) of arXiv 2402.19159."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

PREFIX = "tcd_target_time."
"""The prefix of the embedding's tensors in a LoRA file."""

TargetInput = Literal["s", "t-s"]
"""The quantity that is embedded: the target time s, or the length t - s of the jump."""


class TargetTime(nn.ModuleDict):
    """out(SiLU(in(sinusoid(s)))), to be added to a network's embedding of t; `out` is initialized to zero.

    channels: width of the sinusoid; in a UNet it equals the number of base channels. width: width of the network's
    embedding of t. target_input: what is embedded, s or t - s.
    """

    def __init__(self, channels: int, width: int, *, target_input: TargetInput = "s") -> None:
        super().__init__({"in": nn.Linear(channels, width), "out": nn.Linear(width, width)})
        self.channels, self.target_input = channels, target_input
        for parameter in self["out"].parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def seeded(
        cls, channels: int, width: int, *, target_input: TargetInput, seed: int, device: torch.device
    ) -> "TargetTime":
        """Build an embedding whose random weights depend on the seed alone; no global generator of the CPU moves."""
        with torch.random.fork_rng(devices=[]), device:
            torch.manual_seed(seed)  # nn.Linear initializes itself from the global generator
            return cls(channels, width, target_input=target_input)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], target_input: str) -> "TargetTime":
        """Build from a file's tensors, named without the prefix and of any dtype; the parameters are float32.

        Raises ValueError if the names or shapes do not form an embedding, or target_input is not a TargetInput.
        """
        channels, width = embedding_shape(tensors)
        with torch.device("meta"):  # so that nothing is drawn from the global random generator
            embedding = cls(channels, width, target_input=checked_target_input(target_input))
        copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
        embedding.load_state_dict(copies, assign=True)
        return embedding

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """Embed network times t and s, [B] each, as [B, width]."""
        time = t - s if self.target_input == "t-s" else s
        hidden = self["in"](sinusoid(time, self.channels))
        embedded: Tensor = self["out"](functional.silu(hidden))
        return embedded


def sinusoid(timesteps: Tensor, channels: int) -> Tensor:
    """Embed timesteps [B] as [B, channels], float32: the position embedding of arXiv 1706.03762.

    As in Stable Diffusion, the cosines come first, then the sines.
    """
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000) / half))
    angles = timesteps.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def split_target_time(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a file's tensors into (LoRA, embedding); names in the second dict are without the prefix."""
    embedding = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}, embedding


def embedding_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (channels, width) of an embedding from its tensors, named without the prefix; meta tensors are enough.

    Raises ValueError if the names or shapes do not form an embedding.
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


def checked_target_input(value: str) -> TargetInput:
    """Return `value`, the metadata tcd.target_time of a file, if it is "s" or "t-s"; otherwise raise ValueError."""
    for known in get_args(TargetInput):
        if value == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(
        f"its embedding of the target time has the input {value!r}, but this version knows only "
        f"{' and '.join(get_args(TargetInput))}: update this pack"
    )
