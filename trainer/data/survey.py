"""Inspect all samples before anything is computed: count them by source and bucket, and collect all problems."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor
from tqdm import tqdm

from ...tcd.distill.order import BatchOrder, Group
from ..config.settings import Config, DataConfig
from ..errors import UserError
from ..models.seam import LatentFormat
from . import pictures
from .buckets import Buckets, CropPlan, Size
from .sources import PromptFile, Sample, open_sources
from .store import digest

BROKEN, UNREADABLE, SMALL = "do not decode", "cannot be read", "are smaller than every bucket"
"""Problems of samples; like those in sources.py, each completes a message "3 of 9 pictures ..."."""
_NAMES_SHOWN = 5
T = TypeVar("T")
U = TypeVar("U")


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


@dataclass
class Survey:
    """Counts of usable pictures and of problems, over all inspected samples."""

    groups: Counter[tuple[int, Size]] = field(default_factory=Counter)
    """Number of usable pictures, by (index of the source, bucket)."""
    seen: int = 0
    """Number of samples, usable or not."""
    problems: Counter[str] = field(default_factory=Counter)
    """Number of samples with each problem."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Names of the first few samples with each problem."""

    @property
    def pictures(self) -> int:
        """Total number of usable pictures."""
        return sum(self.groups.values())

    def count(self, inspection: Inspection) -> None:
        """Count a sample and its problems, but not its bucket."""
        self.seen += 1
        for problem in inspection.problems:
            self.problems[problem] += 1
            names = self.names.setdefault(problem, [])
            if len(names) < _NAMES_SHOWN:
                names.append(inspection.sample.name)

    def merge(self, other: Survey) -> None:
        """Add the counts from a different part of the data."""
        self.groups.update(other.groups)
        self.problems.update(other.problems)
        self.seen += other.seen
        for problem, names in other.names.items():
            self.names[problem] = [*self.names.get(problem, []), *names][:_NAMES_SHOWN]

    def complaints(self) -> str:
        """Return all problems in one line, or an empty string if there are none."""
        return "; ".join(
            f"{count} of {self.seen} pictures {problem}: {_join_names(self.names.get(problem, []), count)}"
            for problem, count in sorted(self.problems.items())
        )


def survey(config: Config, part: int = 0, parts: int = 1) -> Survey:
    """Read and decode the pictures of every `parts`-th file from `part` on, and count them and their problems.

    Raises UserError if a source cannot be opened, and if there are problems, unless `data.skip_bad` is set.
    """
    found, buckets = Survey(), configured_buckets(config.data)
    for number, source in enumerate(open_sources(config.data)):
        if isinstance(source, PromptFile):
            count = len(source.captions()[part::parts]) * config.data.draw.per_prompt
            found.groups[number, drawn_bucket(config.data)] += count
            found.seen += count
            continue
        bar = tqdm(source.samples(part, parts), desc="reading pictures", unit="img", leave=False, delay=2)
        for inspection in parallel_map(lambda sample: inspect_sample(sample, buckets), bar):
            found.count(inspection)
            if inspection.crop is not None:
                found.groups[number, inspection.crop.bucket] += 1
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
    problems = (sample.problem,) if sample.problem else ()
    try:
        data = sample.read()
    except OSError:
        return Inspection(sample, (*problems, UNREADABLE))
    if not data and problems:  # there is no picture, so "do not decode" would add nothing
        return Inspection(sample, problems)
    key = digest(data)
    if is_cached(key) and not problems:
        return Inspection(sample, key=key)
    try:
        image = pictures.decode(data)
    except pictures.BrokenPictureError:
        return Inspection(sample, (*problems, BROKEN))
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


def make_groups(data: DataConfig, counts: Iterable[tuple[tuple[int, Size], int]]) -> tuple[Group, ...]:
    """Return the groups with each picture's repeats per epoch, as configured or derived from the sources' weights.

    counts: ((index of the source, bucket), number of pictures) of each group.
    """
    counts = list(counts)
    total: Counter[int] = Counter()
    for (number, _), count in counts:
        total[number] += count
    sources = [source for _, source in data.named_sources]
    weights = sum(sources[number].weight for number in total)
    repeats = {
        number: source.weight / weights * total.total() / total[number] if source.weight else source.repeats
        for number, source in enumerate(sources)
        if total[number]
    }
    return tuple(Group(bucket, count, repeats[number]) for (number, bucket), count in counts)


def data_report(found: Survey, config: Config) -> str:
    """Return the number of usable pictures of each source, and the problems of the others, as text."""
    lines = []
    for number, (_, source) in enumerate(config.data.named_sources):
        count = sum(count for (which, _), count in found.groups.items() if which == number)
        lines.append(f"{count:>9} pictures  {source.path}")
    if found.problems:
        lines.append(f"left out: {found.complaints()}")
    return "\n".join(lines)


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
