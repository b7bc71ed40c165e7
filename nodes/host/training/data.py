"""Training data from a graph: latents and captions as the host's nodes give them, or latents that the teacher draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....tcd.distill.order import BatchOrder, Group, dropped_captions
from ....tcd.distill.teacher_sampling import dpm_solver_sample
from ....tcd.randomness import generator
from .conditions import READ_BY_HOST, Conditioning, from_tensors, to_tensors
from .network import HostNetwork

_DRAW_STEPS = 25  # of DPM-Solver++(2M), as in the trainer

Pair = tuple[Tensor, Conditioning]
"""A latent, [C, ...], and its caption."""


@dataclass(frozen=True)
class Captions:
    """The CONDITIONING of each row of a batch."""

    rows: tuple[Conditioning, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Conditioning]:
        return iter(self.rows)

    def __getitem__(self, rows: Tensor) -> Captions:
        return Captions(tuple(self.rows[row] for row in rows.tolist()))

    def map(self, change: Callable[[Tensor], Tensor]) -> Captions:
        """Return the captions with a function applied to each tensor that the host does not read on the CPU.

        The results are not of inference mode.
        """
        return Captions(tuple(_map(row, change) for row in self.rows))


@dataclass(frozen=True)
class GraphData:
    """Latents with captions, in groups of latents of one shape."""

    latents: tuple[Tensor, ...]
    """For each group [n, C, ...]: the network's latents, float32 on the CPU."""
    captions: tuple[tuple[Conditioning, ...], ...]
    """For each group, n captions."""
    empty: Conditioning | None
    """The negative CONDITIONING, for the teacher's guidance; None if there is none to guide with."""

    @staticmethod
    def of(pairs: Sequence[Pair], empty: Conditioning | None) -> GraphData:
        """Group pairs by the shape of their latents."""
        groups: dict[tuple[int, ...], list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(tuple(pair[0].shape), []).append(pair)
        ordered = [groups[shape] for shape in sorted(groups)]
        return GraphData(
            tuple(torch.stack([latent for latent, _ in group]) for group in ordered),
            tuple(tuple(caption for _, caption in group) for group in ordered),
            empty,
        )

    def order(self, batch: int, seed: int) -> BatchOrder:
        """Return the pictures of each step; those of one step have one shape."""
        return BatchOrder(tuple(Group(tuple(each.shape[1:]), len(each), 1.0) for each in self.latents), batch, seed)

    def batch(
        self, order: BatchOrder, step: int, part: slice, caption_dropout: float
    ) -> tuple[Tensor, Captions, Captions]:
        """Return rows of a step's batch: latents, captions and empty captions."""
        rows = order.rows(step)[part].tolist()
        dropped = dropped_captions(order.size, caption_dropout, seed=order.seed, step=step)[part].tolist()
        captions = [self.captions[group][picture] for group, picture in rows]
        empty = captions if self.empty is None else [self.empty] * len(rows)
        shown = [
            no_caption if drop else caption for caption, no_caption, drop in zip(captions, empty, dropped, strict=True)
        ]
        latents = torch.stack([self.latents[group][picture] for group, picture in rows])
        return latents, Captions(tuple(shown)), Captions(tuple(empty))


def checked(conditioning: Conditioning) -> Conditioning:
    """Return the CONDITIONING itself, and no copy. Raises ValueError if training cannot use it."""
    to_tensors(conditioning)
    return conditioning


def pairs_of(model: Any, latents: Sequence[Mapping[str, Any]], captions: Sequence[Conditioning]) -> list[Pair]:
    """Return the network's latents with their captions.

    model: the host's BaseModel. latents: LATENTs of any batch size. captions: a CONDITIONING for each LATENT, with one
    entry for all of its latents or one for each, or a single CONDITIONING for all. Raises ValueError if numbers or
    shapes do not fit.
    """
    if len(captions) == 1 and len(captions[0]) == 1:
        captions = list(captions) * len(latents)
    if len(latents) != len(captions):
        raise ValueError(
            f"there are {len(latents)} latents and {len(captions)} positive CONDITIONINGs: give one CONDITIONING for "
            "each LATENT, or a single one for all"
        )
    return [pair for latent, caption in zip(latents, captions, strict=True) for pair in _pairs(model, latent, caption)]


class Drawing(NamedTuple):
    """How the teacher draws latents for captions without pictures."""

    width: int
    """In pixels."""
    height: int
    per_caption: int
    """Number of latents for each caption, each from different noise."""
    guidance: float
    seed: int
    at_once: int
    """Number of latents in one call."""


def drawn_pairs(
    network: HostNetwork,
    captions: Sequence[Conditioning],
    empty: Conditioning,
    drawing: Drawing,
    report: Callable[[int, int], None],
) -> list[Pair]:
    """Let the teacher draw latents for captions, and return both; the adapter must be off.

    report: called with the number of latents drawn so far, and of all. Raises ValueError if latents cannot have the
    size.
    """
    shape = _latent_shape(network.model.latent_format, drawing.width, drawing.height)
    wanted = [caption for caption in captions for _ in range(drawing.per_caption)]
    noise = [torch.randn(shape, generator=generator(drawing.seed, "drawing", number)) for number in range(len(wanted))]
    pairs: list[Pair] = []
    for start in range(0, len(wanted), drawing.at_once):
        rows = slice(start, start + drawing.at_once)
        conds = Captions(tuple(wanted[rows])).map(lambda tensor: tensor.to(network.device))
        unconds = Captions((empty,)).map(lambda tensor: tensor.to(network.device))
        x = torch.stack(noise[rows]).to(network.device)
        latents = dpm_solver_sample(network, conds, unconds, x, steps=_DRAW_STEPS, guidance=drawing.guidance)
        pairs += zip(latents.cpu(), wanted[rows], strict=True)
        report(len(pairs), len(wanted))
    return pairs


def _latent_shape(form: Any, width: int, height: int) -> tuple[int, ...]:
    """Return the shape of the latent of a picture, [C, h, w], or of a video of one frame, [C, 1, h, w].

    form: the host's latent format. Raises ValueError if a side, in pixels, is not a multiple of the latent's stride.
    """
    stride: int = form.spacial_downscale_ratio
    for name, side in {"width": width, "height": height}.items():
        if side % stride:
            raise ValueError(f"{name} is {side}: use a multiple of {stride}")
    frames = (1,) * (form.latent_dimensions - 2)
    return (form.latent_channels, *frames, height // stride, width // stride)


def _pairs(model: Any, latent: Mapping[str, Any], caption: Conditioning) -> list[Pair]:
    samples, form = latent["samples"], model.latent_format
    if latent.get("noise_mask") is not None:
        raise ValueError("a LATENT has a mask, which training cannot use: leave out the node that sets it")
    if getattr(samples, "is_nested", False):
        raise ValueError("a LATENT has several parts, such as video and sound, which training cannot use")
    if form.latent_dimensions == 3 and samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if samples.ndim != form.latent_dimensions + 2 or samples.shape[1] != form.latent_channels:
        raise ValueError(
            f"a LATENT has the shape {list(samples.shape)}, but the model's have {form.latent_channels} channels and "
            f"{form.latent_dimensions + 2} dimensions: encode the pictures with the model's own VAE"
        )
    if len(caption) not in (1, len(samples)):
        raise ValueError(
            f"a positive CONDITIONING has {len(caption)} entries for {len(samples)} latents: give one for each, and do "
            "not combine conditionings"
        )
    entries = list(caption) * len(samples) if len(caption) == 1 else caption
    normalized = model.process_latent_in(samples.float().clone())  # a clone has no inference mode
    return [(row.cpu(), checked([entry])) for row, entry in zip(normalized, entries, strict=True)]


def _map(conditioning: Conditioning, change: Callable[[Tensor], Tensor]) -> Conditioning:
    tensors, scalars = to_tensors(conditioning)
    changed = {name: tensor if name in READ_BY_HOST else change(tensor) for name, tensor in tensors.items()}
    return from_tensors(changed, scalars)
