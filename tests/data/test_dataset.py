"""What training reads: the same rows however a step is divided, from memory or from files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny_base import random_dataset
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.trainer.checked_file import save_checked
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Batch, Dataset, Shard, Table, caption_of
from trajectory_consistency.trainer.data.store import ShardFiles
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint

SIZES = {Size(64, 64): 5, Size(64, 128): 7}


def shards(std: float, pooled: bool) -> tuple[list[Shard], Shard]:
    """A shard of pictures for each bucket, whose values say which they are, and one of captions; the first is empty."""
    pictures = []
    for k, (bucket, count) in enumerate(SIZES.items()):
        value = (100 * k + torch.arange(count).float()).view(-1, 1, 1, 1)
        mean = value.expand(-1, 4, bucket.height // 8, bucket.width // 8).contiguous().half()
        sizes = torch.stack([torch.tensor([100 * k + row, 9, 1, 2, *bucket]) for row in range(count)]).int()
        pictures.append({"mean": mean, "std": torch.full_like(mean, std), "sizes": sizes})
    which = torch.cat([torch.full((1,), -1.0)] + [100 * k + torch.arange(c) for k, c in enumerate(SIZES.values())])
    captions = {"context": which.view(-1, 1, 1).expand(-1, 77, 8).contiguous().half()}
    if pooled:
        captions["pooled"] = which.view(-1, 1).expand(-1, 6).contiguous().half()
    return pictures, captions


def join(captions: Sequence[Conditioning], framing: Framing) -> Conditioning:
    """Join as UNet checkpoints do; this uses nothing of a checkpoint except whether captions have `pooled`."""
    return UNetCheckpoint.collate(object.__new__(UNetCheckpoint), captions, framing)


def in_memory(std: float = 0.5, pooled: bool = True) -> Dataset:
    pictures, captions = shards(std, pooled)
    groups = tuple(Group(bucket, count, 1.0) for bucket, count in SIZES.items())
    index = [torch.tensor([(k, row, 0, 1 + 5 * k + row) for row in range(n)]) for k, n in enumerate(SIZES.values())]
    tables = [Table(each, pictures, [captions]) for each in index]
    return Dataset(groups, tables, caption_of(captions, 0), join)


def on_disk(folder: Path, std: float = 0.5, pooled: bool = True) -> Dataset:
    pictures, captions = shards(std, pooled)
    paths = [folder / f"{k}.safetensors" for k in range(3)]
    for path, tensors in zip(paths, [*pictures, captions], strict=True):
        save_checked(tensors, path)
    dataset = in_memory(std, pooled)
    tables = [Table(table.index, ShardFiles(paths[:2]), ShardFiles(paths[2:])) for table in dataset.tables]
    return replace(dataset, tables=tables)


def tensors(batch: Batch) -> list[torch.Tensor]:
    assert batch.cond.tensors.keys() == batch.uncond.tensors.keys() <= {"context", "pooled", "time_ids"}
    return [batch.latents, *batch.cond.tensors.values(), *batch.uncond.tensors.values()]


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize("step", [0, 3, 17])
def test_the_rows_of_a_step_are_the_same_however_they_are_divided(parts: int, step: int) -> None:
    dataset, each = in_memory(), 6 // parts
    whole = tensors(dataset.batch(step, 6, seed=1, caption_dropout=0.4))
    divided = [
        tensors(dataset.batch(step, 6, slice(k * each, (k + 1) * each), seed=1, caption_dropout=0.4))
        for k in range(parts)
    ]
    for k, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[k] for part in divided]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("pooled", [True, False])
def test_files_give_what_memory_gives(tmp_path: Path, pooled: bool) -> None:
    ours, theirs = in_memory(pooled=pooled), on_disk(tmp_path, pooled=pooled)
    assert len(ours) == len(theirs) == 12
    for step in range(8):
        pair = [tensors(each.batch(step, 4, seed=0, caption_dropout=0.3)) for each in (ours, theirs)]
        assert len(pair[0]) == (7 if pooled else 3)
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_every_picture_keeps_its_caption_and_its_sizes() -> None:
    dataset = in_memory(std=0.0)
    for step in range(12):
        batch = dataset.batch(step, 5, seed=0, caption_dropout=0.0)
        which = batch.latents[:, 0, 0, 0]
        tensors = batch.cond.tensors
        for named in (tensors["context"][:, 3, 3], tensors["pooled"][:, 2], tensors["time_ids"][:, 0]):
            assert torch.equal(named, which)
        height, width = batch.latents.shape[2:]
        assert torch.equal(tensors["time_ids"][:, 4:], torch.tensor([[8.0 * height, 8.0 * width]]).expand(5, -1))


def test_the_empty_caption_comes_with_the_sizes_of_the_pictures() -> None:
    batch = in_memory().batch(0, 5, seed=0, caption_dropout=0.0)
    assert len(batch.uncond) == 5 and (batch.uncond.tensors["context"] == -1).all()
    assert (batch.uncond.tensors["pooled"] == -1).all()
    assert torch.equal(batch.uncond.tensors["time_ids"], batch.cond.tensors["time_ids"])
    plain = in_memory(pooled=False).batch(0, 5, seed=0, caption_dropout=0.0)
    assert plain.cond.tensors.keys() == plain.uncond.tensors.keys() == {"context"}


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    dataset = random_dataset()
    first, again, other = (dataset.batch(7, 4, seed=seed, caption_dropout=0.5).latents for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_latents_are_drawn_from_the_posterior_anew_at_each_step_and_row() -> None:
    dataset = in_memory(std=0.5)
    batches = [dataset.batch(step, 12, seed=0, caption_dropout=0).latents for step in range(40)]
    noise = torch.cat([(batch - batch.mean((1, 2, 3), keepdim=True).round()).flatten() / 0.5 for batch in batches])
    assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
    firsts = torch.stack([batch[0, 0, 0, :8] - batch[0].mean() for batch in batches])
    assert len({tuple(row.tolist()) for row in firsts}) == 40
    rows = batches[0][:, 0, 0, :8] - batches[0].mean((1, 2, 3))[:, None]
    assert len({tuple(row.tolist()) for row in rows}) == 12


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_captions_are_dropped_as_often_as_asked(dropout: float) -> None:
    dataset = in_memory()
    dropped = [
        dataset.batch(step, 10, seed=0, caption_dropout=dropout).cond.tensors["context"][:, 0, 0] == -1
        for step in range(150)
    ]
    assert abs(torch.cat(dropped).float().mean().item() - dropout) < 0.04
