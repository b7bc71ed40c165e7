"""A look at all the data before anything is computed: what there is, in which buckets, and what cannot be used.

Flows in: a configuration.  Flows out: a `Survey`, or one error that names everything that is wrong.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from torch import Tensor
from tqdm import tqdm

from ..config.settings import Config, DataConfig
from ..errors import UserError
from . import pictures
from .buckets import Buckets, Fit, Size
from .order import Group, Order
from .sources import Prompts, Sample, open_sources
from .store import digest

BROKEN, UNREADABLE, SMALL = "do not decode", "cannot be read", "are smaller than every bucket"
_NAMES_SHOWN = 5
T = TypeVar("T")
U = TypeVar("U")


class Look(NamedTuple):
    """What was seen of one sample."""

    sample: Sample
    problems: tuple[str, ...] = ()
    key: bytes = b""
    """The digest of the picture's bytes."""
    fit: Fit | None = None
    """None for a picture that was not decoded: it is known, or has problems."""
    pixels: Tensor | None = None
    """uint8 [3, height, width] of the bucket, where asked for."""


@dataclass
class Survey:
    """What a look at all samples has found."""

    groups: Counter[tuple[int, Size]] = field(default_factory=Counter)
    """How many pictures can be used, by source and bucket."""
    seen: int = 0
    """How many samples there were, good and bad."""
    problems: Counter[str] = field(default_factory=Counter)
    """How many samples have each problem."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first few of those."""

    @property
    def pictures(self) -> int:
        """How many pictures can be used."""
        return sum(self.groups.values())

    def note(self, look: Look) -> None:
        """Count a sample, and what is wrong with it."""
        self.seen += 1
        for problem in look.problems:
            self.problems[problem] += 1
            names = self.names.setdefault(problem, [])
            if len(names) < _NAMES_SHOWN:
                names.append(look.sample.name)

    def add(self, other: Survey) -> None:
        """Count what another look has found, at another part of the data."""
        self.groups.update(other.groups)
        self.problems.update(other.problems)
        self.seen += other.seen
        for problem, names in other.names.items():
            self.names[problem] = [*self.names.get(problem, []), *names][:_NAMES_SHOWN]

    def complaints(self) -> str:
        """Everything that is wrong, in one line; empty when nothing is."""
        return "; ".join(
            f"{count} of {self.seen} pictures {problem}: {_listed(self.names.get(problem, []), count)}"
            for problem, count in sorted(self.problems.items())
        )


def survey(config: Config, part: int = 0, parts: int = 1) -> Survey:
    """Read and decode every picture, of every `parts`-th file from `part` on, and keep nothing but what was found.

    Raises UserError, all together, for what cannot be used, unless it is to be skipped, and when nothing is left.
    """
    found, buckets = Survey(), buckets_of(config.data)
    for number, source in enumerate(open_sources(config.data)):
        if isinstance(source, Prompts):
            count = len(source.captions()[part::parts]) * config.data.draw.per_prompt
            found.groups[number, square(config.data)] += count
            found.seen += count
            continue
        bar = tqdm(source.samples(part, parts), desc="reading pictures", unit="img", leave=False, delay=2)
        for look in ahead(lambda sample: look_at(sample, buckets), bar):
            found.note(look)
            if look.fit is not None:
                found.groups[number, look.fit.bucket] += 1
    refuse(found, config.data)
    return found


def refuse(found: Survey, data: DataConfig) -> None:
    """Raise UserError when something was found that cannot be used and is not to be skipped."""
    if found.problems and not data.skip_bad:
        raise UserError(f"{found.complaints()}. Repair them, or set data.skip_bad to leave them out")


def look_at(
    sample: Sample, buckets: Buckets, *, known: Callable[[bytes], bool] = lambda key: False, pixels: bool = False
) -> Look:
    """Read a sample's picture and, unless its digest is known, decode and fit it."""
    problems = (sample.problem,) if sample.problem else ()
    try:
        data = sample.read()
    except OSError:
        return Look(sample, (*problems, UNREADABLE))
    if not data and problems:  # there is no picture to speak of
        return Look(sample, problems)
    key = digest(data)
    if known(key) and not problems:
        return Look(sample, key=key)
    try:
        image = pictures.decode(data)
    except pictures.BrokenPictureError:
        return Look(sample, (*problems, BROKEN))
    fit = buckets.fit(pictures.size_of(image))
    if fit is None or problems:
        return Look(sample, problems if fit else (*problems, SMALL))
    return Look(sample, (), key, fit, pictures.pixels(image, fit) if pixels else None)


def ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Map in several threads, in order, a few items ahead of what is asked for and no more."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        running: deque[Future[U]] = deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def buckets_of(data: DataConfig) -> Buckets:
    """The rule by which pictures get their buckets."""
    return Buckets(data.resolution, data.bucket_step, not data.buckets, data.upscale)


def square(data: DataConfig) -> Size:
    """The bucket of pictures that the teacher draws."""
    side = data.resolution // data.bucket_step * data.bucket_step
    return Size(side, side)


def order_groups(data: DataConfig, counts: Iterable[tuple[tuple[int, Size], int]]) -> tuple[Group, ...]:
    """Groups with how often an epoch shows each picture: as said, or so that the sources' shares are as their weights.

    counts: how many pictures there are, by source and bucket.
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
    """What each source gives, and what is left out, as text."""
    lines = []
    for number, (_, source) in enumerate(config.data.named_sources):
        count = sum(count for (which, _), count in found.groups.items() if which == number)
        lines.append(f"{count:>9} pictures  {source.path}")
    if found.problems:
        lines.append(f"left out: {found.complaints()}")
    return "\n".join(lines)


def bucket_table(found: Survey, config: Config, batch: int) -> str:
    """Pictures and steps of an epoch for each bucket, as text, and how many rows only fill last batches."""
    counts = sorted(found.groups.items())
    groups = order_groups(config.data, counts)
    lines = [f"{'bucket':>11} {'pictures':>9} {'shown':>9} {'steps':>7} {'filling':>8}"]
    for bucket in sorted({group.bucket for group in groups}, key=lambda size: size.width / size.height):
        own = tuple(group for group in groups if group.bucket == bucket)
        held, shown, steps = (
            sum(group.pictures for group in own),
            sum(group.shown(1) for group in own),
            Order(own, batch, 0).steps(0),
        )
        lines.append(f"{bucket!s:>11} {held:>9} {shown:>9} {steps:>7} {steps * batch - shown:>8}")
    return "\n".join(lines)


def _listed(names: list[str], count: int) -> str:
    more = count - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")
