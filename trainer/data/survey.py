"""Inspect all samples before anything is computed: count them by source and bucket, and collect all problems."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple, TypeVar

from torch import Tensor
from tqdm import tqdm

from ...tcd.distill.order import BatchOrder, Group
from ..config.settings import Config, DataConfig
from ..errors import UserError
from ..models.seam import LatentFormat
from . import pictures
from .buckets import Buckets, CropPlan, Size
from .samples import Sample
from .sources import PromptFile, open_sources
from .store import digest

BROKEN, UNREADABLE, SMALL = "do not decode", "cannot be read", "are smaller than every bucket"
"""Problems of samples; like NO_CAPTION, each completes a message "3 of 9 pictures ..."."""
_NAMES_SHOWN = 5
T = TypeVar("T")
U = TypeVar("U")


class GroupKey(NamedTuple):
    """What the pictures of a group have in common."""

    source: int
    """Index of the source."""
    repeats: int
    """How often an epoch shows each picture, relative to the other pictures of the source: 10 in a folder 10_name."""
    bucket: Size


class Inspection(NamedTuple):
    """The result of inspecting one sample."""

    sample: Sample
    problems: tuple[str, ...] = ()
    """Why the sample cannot be used; empty if it can."""
    key: bytes = b""
    """Digest of the image file's bytes; empty if there are problems."""
    crop: CropPlan | None = None
    """How the picture is resized and cropped; None if it is already cached or has problems."""
    pixels: Tensor | None = None
    """The resized and cropped picture, uint8 [3, H, W], if requested and `crop` is not None."""
    reason: str = ""
    """The cause of the last problem, if it is known: what the decoder or the system said."""


@dataclass
class Survey:
    """Counts of usable pictures and of problems, over all inspected samples."""

    groups: Counter[GroupKey] = field(default_factory=Counter)
    """Number of usable pictures."""
    seen: int = 0
    """Number of samples, usable or not."""
    problems: Counter[str] = field(default_factory=Counter)
    """Number of samples with each problem."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of files that are left out for each reason, and of samples with each other note."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Names of the first few samples with each problem or note."""

    @property
    def pictures(self) -> int:
        """Total number of usable pictures."""
        return sum(self.groups.values())

    def count(self, inspection: Inspection) -> None:
        """Count a sample, its problems and its note, but not its bucket."""
        sample = inspection.sample
        self.seen += not sample.left_out
        for problem in inspection.problems:
            reason = inspection.reason if problem == inspection.problems[-1] else ""
            self._count(self.problems, problem, f"{sample.name} ({reason})" if reason else sample.name)
        if sample.note:
            self._count(self.notes, sample.note, sample.name)

    def merge(self, other: Survey) -> None:
        """Add the counts from a different part of the data."""
        self.groups.update(other.groups)
        self.problems.update(other.problems)
        self.notes.update(other.notes)
        self.seen += other.seen
        for problem, names in other.names.items():
            self.names[problem] = [*self.names.get(problem, []), *names][:_NAMES_SHOWN]

    def complaints(self) -> str:
        """Return all problems in one line, or an empty string if there are none."""
        return "; ".join(
            f"{count} of {self.seen} pictures {problem}: {_join_names(self.names.get(problem, []), count)}"
            for problem, count in sorted(self.problems.items())
        )

    def remarks(self) -> str:
        """Return what is no problem, such as files that are left out, in one line; an empty string if there is none."""
        return "; ".join(
            f"{note}: {count} ({_join_names(self.names.get(note, []), count)})"
            for note, count in sorted(self.notes.items())
        )

    def report_lines(self) -> list[str]:
        """Return a line of all problems and one of all notes, without those that would be empty."""
        parts = (("left out", self.complaints()), ("noted", self.remarks()))
        return [f"{title}: {text}" for title, text in parts if text]

    def refusal(self) -> str:
        """Return the message that no picture is left, with all reasons."""
        reasons = "; ".join(filter(None, (self.complaints(), self.remarks())))
        return f"no picture is left to train on: {reasons or 'there is none in the data'}"

    def _count(self, counter: Counter[str], what: str, name: str) -> None:
        counter[what] += 1
        names = self.names.setdefault(what, [])
        if len(names) < _NAMES_SHOWN:
            # A name that is not valid Unicode could not be printed.
            names.append(name.encode("utf-8", "backslashreplace").decode())


def survey(config: Config, part: int = 0, parts: int = 1) -> Survey:
    """Read and decode the pictures of every `parts`-th file from `part` on, and count them and their problems.

    Raises UserError if a source cannot be opened, and if there are problems, unless `data.skip_bad` is set.
    """
    found, buckets = Survey(), configured_buckets(config.data)
    for number, source in enumerate(open_sources(config.data)):
        if isinstance(source, PromptFile):
            count = len(source.captions()[part::parts]) * config.data.draw.per_prompt
            found.groups[GroupKey(number, 1, drawn_bucket(config.data))] += count
            found.seen += count
            continue
        bar = tqdm(source.samples(part, parts), desc="reading pictures", unit="img", leave=False, delay=2)
        for inspection in parallel_map(lambda sample: inspect_sample(sample, buckets), bar):
            found.count(inspection)
            if inspection.crop is not None:
                found.groups[GroupKey(number, inspection.sample.repeats, inspection.crop.bucket)] += 1
    raise_for_problems(found, config.data)
    return found


def raise_for_problems(found: Survey, data: DataConfig) -> None:
    """Raise a UserError that lists all problems, if there are any and `data.skip_bad` is not set."""
    if found.problems and not data.skip_bad:
        raise UserError(f"{found.complaints()}. Repair them, or set data.skip_bad to leave them out")


def inspect_sample(
    sample: Sample, buckets: Buckets, *, is_cached: Callable[[bytes], bool] = lambda key: False, pixels: bool = False
) -> Inspection:
    """Read, decode and fit a sample's picture, and report its problems.

    is_cached: (digest of the file) -> whether the picture is cached; if it is, it is not decoded.
    pixels: whether to return the resized and cropped picture.
    """
    if sample.left_out:
        return Inspection(sample)
    problems = (sample.problem,) if sample.problem else ()
    try:
        data = sample.read()
    except OSError as error:
        return Inspection(sample, (*problems, UNREADABLE), reason=error.strerror or str(error))
    if not data and problems:  # there is no picture, so "do not decode" would add nothing
        return Inspection(sample, problems)
    key = digest(data)
    if is_cached(key) and not problems:
        return Inspection(sample, key=key)
    try:
        image = pictures.decode(data)
    except pictures.BrokenPictureError as error:
        return Inspection(sample, (*problems, BROKEN), reason=str(error))
    crop = buckets.fit(pictures.size_of(image))
    if crop is None or problems:
        return Inspection(sample, problems if crop else (*problems, SMALL))
    return Inspection(sample, (), key, crop, pictures.pixels(image, crop) if pixels else None)


def parallel_map(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Yield `function` of each item, in order, computed in threads and at most a few items ahead."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        running: deque[Future[U]] = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def configured_buckets(data: DataConfig) -> Buckets:
    """Return the bucket rule of a configuration."""
    return Buckets(data.resolution, data.bucket_step, not data.buckets, data.upscale)


def check_bucket_sizes(data: DataConfig, latents: LatentFormat) -> None:
    """Raise UserError unless the sides of all buckets are multiples of the latent stride."""
    latents.check_size("data.resolution", data.resolution)
    latents.check_size("data.bucket_step", data.bucket_step)


def drawn_bucket(data: DataConfig) -> Size:
    """Return the bucket of the pictures that the teacher draws, a square."""
    side = data.resolution // data.bucket_step * data.bucket_step
    return Size(side, side)


def make_groups(data: DataConfig, counts: Iterable[tuple[GroupKey, int]]) -> tuple[Group, ...]:
    """Return the groups with each picture's repeats per epoch, as configured or derived from the sources' weights.

    The numbers are exact, and what one group's share of the first epoch is rounded down by goes to the next.
    counts: the number of pictures of each group.
    """
    counts = list(counts)
    shown: Counter[int] = Counter()
    for key, count in counts:
        shown[key.source] += key.repeats * count
    sources = {number: source for number, (_, source) in enumerate(data.named_sources) if shown[number]}
    weights = sum(_exact(source.weight) for source in sources.values())
    pictures = sum(count for _, count in counts)
    factors = {
        number: _exact(source.weight) / weights * pictures / shown[number] if weights else _exact(source.repeats)
        for number, source in sources.items()
    }
    groups, before = [], Fraction(0)
    for key, count in counts:
        repeats = key.repeats * factors[key.source]
        groups.append(Group(key.bucket, count, repeats, before % 1))
        before += count * repeats
    return tuple(groups)


def _exact(setting: float) -> Fraction:
    """Return the number as it is written in a configuration: 3/10 for 0.3."""
    return Fraction(str(setting))


def data_report(found: Survey, config: Config) -> str:
    """Return the number of usable pictures of each source, the problems of the others, and all notes, as text."""
    lines = []
    for number, (_, source) in enumerate(config.data.named_sources):
        counts: Counter[int] = Counter({1: 0})
        for key, count in found.groups.items():
            counts[key.repeats] += count if key.source == number else 0
        lines.append(f"{counts.total():>9} pictures  {source.path}")
        repeated = sorted((repeats, count) for repeats, count in counts.items() if count and repeats > 1)
        lines += [f"{count:>20} of them in folders {repeats}_...: {repeats} times each" for repeats, count in repeated]
    return "\n".join(lines + found.report_lines())


def bucket_table(found: Survey, config: Config, batch: int) -> str:
    """Return a table of each bucket's pictures and steps per epoch.

    The column "filling" counts the rows that complete the last batch of a bucket by repeating earlier ones.
    """
    counts = sorted(found.groups.items())
    groups = make_groups(config.data, counts)
    lines = [f"{'bucket':>11} {'pictures':>9} {'shown':>9} {'steps':>7} {'filling':>8}"]
    for bucket in sorted({group.bucket for group in groups}, key=lambda size: size[1] / size[0]):
        own = tuple(group for group in groups if group.bucket == bucket)
        held, shown, steps = (
            sum(group.pictures for group in own),
            sum(group.shown(1) for group in own),
            BatchOrder(own, batch, 0).steps(0),
        )
        lines.append(f"{bucket!s:>11} {held:>9} {shown:>9} {steps:>7} {steps * batch - shown:>8}")
    return "\n".join(lines)


def _join_names(names: list[str], count: int) -> str:
    """Join the names in one line, and say how many of `count` are missing from it."""
    more = count - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")
