"""What a step trains on: a function of (seed, step, row), read one part ahead, and each process only its own rows."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tiny_base import random_dataset, small_config, write_inputs
from trajectory_consistency.tcd import DiscreteSchedule, scaled_linear_alpha_bar
from trajectory_consistency.tcd.distill import Examples
from trajectory_consistency.tcd.distill import examples as distill_examples
from trajectory_consistency.trainer.config.settings import Config
from trajectory_consistency.trainer.training.examples import Prefetcher, read_examples
from trajectory_consistency.trainer.training.processes import Processes

SCHEDULE = DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(write_inputs(tmp_path), steps=3, batch=6, seed=3)


def tensors(rows: Examples) -> list[torch.Tensor]:
    parts = [rows.latents, rows.eps, rows.times, rows.guidance, dict(rows.cond.tensors), dict(rows.uncond.tensors)]
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(("count", "accumulate"), [(1, 2), (2, 1), (3, 2)])
def test_however_a_step_is_divided_its_rows_are_the_same(config: Config, count: int, accumulate: int) -> None:
    whole = read_examples(config, random_dataset(), SCHEDULE, 1, slice(0, 6))
    parts = [part for rank in range(count) for part in Processes(rank, count).micro_batches(6, accumulate)]
    divided = [read_examples(config, random_dataset(), SCHEDULE, 1, part) for part in parts]
    for several, expected in zip(zip(*map(tensors, divided), strict=True), tensors(whole), strict=True):
        assert torch.equal(torch.cat(several), expected)
    target_rows = torch.cat([each.target_rows + part.start for each, part in zip(divided, parts, strict=True)])
    assert torch.equal(target_rows, whole.target_rows)


def test_captions_are_dropped_as_often_as_the_configuration_says(config: Config) -> None:
    for rate in (0.0, 1.0):
        changed = replace(config, data=replace(config.data, caption_dropout=rate))
        rows = read_examples(changed, random_dataset(), SCHEDULE, 0, slice(0, 6))
        dropped = [torch.equal(rows.cond.tensors["context"][k], rows.uncond.tensors["context"][0]) for k in range(6)]
        assert dropped == [rate == 1.0] * 6


def test_a_process_draws_the_noise_of_its_own_rows_alone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = distill_examples.generator

    def watched(seed: int, purpose: str, step: int = 0) -> torch.Generator:
        drawn.append(purpose)
        return real(seed, purpose, step)

    monkeypatch.setattr(distill_examples, "generator", watched)
    read_examples(config, random_dataset(), SCHEDULE, 0, slice(2, 4))
    assert drawn == ["loss", "noise of row 2", "noise of row 3"]


def test_the_noise_of_each_row_and_step_is_new_and_normal(config: Config) -> None:
    rows = [read_examples(config, random_dataset(), SCHEDULE, 0, slice(0, 6)).eps]
    rows += [read_examples(config, random_dataset(), SCHEDULE, step, slice(0, 6)).eps for step in (1, 2)]
    noise = torch.stack(rows)
    assert abs(noise.mean().item()) < 0.05 and abs(noise.std().item() - 1) < 0.05
    assert len({tuple(row[0, 0, :3].tolist()) for step in rows for row in step}) == 18


class Watched:
    """A data set that notes which thread read which rows, and can fail."""

    def __init__(self, failing: int = -1) -> None:
        self.dataset, self.failing = random_dataset(), failing
        self.read: list[tuple[int, slice, bool]] = []

    def batch(self, step: int, size: int, part: slice, **options: Any) -> Any:
        self.read.append((step, part, threading.current_thread() is threading.main_thread()))
        if step == self.failing:
            raise OSError("the disk is gone")
        return self.dataset.batch(step, size, part, **options)


def test_each_part_is_read_once_while_the_one_before_is_trained_on(config: Config) -> None:
    watched, parts = Watched(), [slice(0, 3), slice(3, 6)]
    prefetcher = Prefetcher(config, watched, SCHEDULE, parts)  # type: ignore[arg-type]
    for step in range(3):
        for number, part in enumerate(parts):
            got = prefetcher.get(step, number)
            expected = read_examples(config, random_dataset(), SCHEDULE, step, part)
            assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(expected), strict=True))
    prefetcher.close()
    assert [(step, part) for step, part, _ in watched.read] == [(step, part) for step in range(3) for part in parts]
    assert [main for _, _, main in watched.read] == [True] + [False] * 5, "all but the first are read ahead"


def test_what_reading_ahead_raises_is_raised_where_the_part_is_asked_for(config: Config) -> None:
    prefetcher = Prefetcher(config, Watched(failing=1), SCHEDULE, [slice(0, 6)])  # type: ignore[arg-type]
    prefetcher.get(0, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        prefetcher.get(1, 0)
    prefetcher.close()


def test_a_run_that_resumes_reads_from_its_step(config: Config) -> None:
    prefetcher = Prefetcher(config, random_dataset(), SCHEDULE, [slice(0, 6)])
    expected = read_examples(config, random_dataset(), SCHEDULE, 2, slice(0, 6))
    assert all(torch.equal(a, b) for a, b in zip(tensors(prefetcher.get(2, 0)), tensors(expected), strict=True))
    prefetcher.close()


def test_gradients_are_exchanged_in_place_and_in_buckets_of_32_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    def all_reduce(flat: torch.Tensor) -> None:
        sent.append(flat)
        flat.mul_(3)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    million = 2**20
    given = [
        torch.full((size,), float(value)) for value, size in enumerate((3 * million, 4 * million, 9 * million, 1, 1), 1)
    ]
    given += [torch.full((2, 3), 6.0, dtype=torch.float64)]
    memory = [tensor.data_ptr() for tensor in given]
    Processes(0, 2).all_reduce(given)
    assert [(flat.numel(), flat.dtype) for flat in sent] == [
        (7 * million, torch.float32),
        (9 * million, torch.float32),
        (2, torch.float32),
        (6, torch.float64),
    ], "together up to 32 MB of one dtype, and what is larger by itself"
    assert [tensor.data_ptr() for tensor in given] == memory
    for value, tensor in enumerate(given, 1):
        assert (tensor == 3 * value).all()
