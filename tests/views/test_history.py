"""The numbers of a run: one row to a step in files that go on with a run, and losses by t and by t - s."""

import csv
import io
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from tiny_base import small_config, write_inputs
from trajectory_consistency.tcd.distill import StepRecord
from trajectory_consistency.trainer.config.settings import LogConfig
from trajectory_consistency.trainer.errors import RunError, UserError
from trajectory_consistency.trainer.views import trackers
from trajectory_consistency.trainer.views.history import (
    BIN_COUNT,
    History,
    LossByTime,
    bin_edges,
    loss_bins,
    read_log,
    read_loss_by_time,
)


def record(step: int, loss: float = 1.0) -> StepRecord:
    """Four pictures of which two are in one bin of t and of t - s."""
    t, s = torch.tensor([999, 979, 499, 19]), torch.tensor([0, 19, 399, 0])
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0]) * loss
    return StepRecord(step, loss, 1e-4 / step, 0.5, t, s, 1000, losses, 4, 2.0)


def losses_by_time(folder: Path, since: int = 0) -> LossByTime:
    losses = read_loss_by_time(folder, since)
    assert losses is not None
    return losses


def test_each_step_is_a_row_with_every_number(tmp_path: Path) -> None:
    history = History(tmp_path)
    for step in (1, 2, 3):
        history(record(step, loss=1 / step))
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == pytest.approx([1, 1 / 2, 1 / 3], rel=1e-8)
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-4, 5e-5, 1e-4 / 3], rel=1e-8)
    assert {(row["norm"], row["images_per_second"]) for row in rows} == {("0.5", "2")}


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    first = History(tmp_path)
    for step in range(1, 6):
        first(record(step, loss=9.0))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("6,9.0,0.0")  # it was killed while it wrote
    again = History(tmp_path)
    for step in (4, 5):
        again(record(step, loss=1.0))
    assert [(row.step, row.loss) for row in read_log(tmp_path)] == [(1, 9), (2, 9), (3, 9), (4, 1), (5, 1)]
    loss, count, _ = losses_by_time(tmp_path)
    assert count.sum() == 5 * 4 and loss[4, 1] == pytest.approx(5 * (3 * 9 + 2 * 1) / 5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("name", ["log.csv", "loss_by_time.csv"])
def test_a_full_disk_is_an_error_that_names_the_file_and_the_remedy(tmp_path: Path, name: str) -> None:
    history = History(tmp_path)
    history(record(1))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(RunError, match=rf"{name} could not be written: .*No space left.*; make room on the disk, then"):
        history(record(2))


def test_losses_are_means_by_t_and_by_the_length_of_the_jump(tmp_path: Path) -> None:
    history = History(tmp_path)
    history(record(1))
    history(record(2, loss=3.0))
    loss, count, edges = losses_by_time(tmp_path)
    assert edges == list(range(0, 1001, 100))
    assert loss.shape == count.shape == (BIN_COUNT, BIN_COUNT)
    found = {tuple(place): (loss[*place].item(), count[*place].item()) for place in count.nonzero().tolist()}
    assert found == {(9, 9): (4.0, 4.0), (4, 1): (10.0, 2.0), (0, 0): (14.0, 2.0)}
    late, _, _ = losses_by_time(tmp_path, since=1)
    assert late[9, 9] == 6.0 and late[1, 1].isnan()
    assert [(row.t, row.gap, row.pictures) for row in loss_bins(record(1))] == [
        (0, 0, 1),
        (400, 100, 1),
        (900, 900, 2),
    ]
    assert read_loss_by_time(tmp_path, since=2) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 0.5), (math.inf, 0.5), (1.0, math.inf), (1.0, math.nan)])
def test_a_step_that_was_skipped_is_a_row_but_counts_in_no_loss(tmp_path: Path, loss: float, norm: float) -> None:
    history = History(tmp_path)
    history(record(1))
    history(record(2, loss=loss)._replace(norm=norm))
    assert [(row.step, row.skipped) for row in read_log(tmp_path)] == [(1, False), (2, True)]
    mean, count, _ = losses_by_time(tmp_path)
    assert count.sum() == 4 and mean[9, 9] == 2.0
    assert {name for name in trackers.scalars(record(2, loss=loss)._replace(norm=norm)) if " by " in name} == set()


@pytest.mark.parametrize("num_times", [1000, 1001, 100, 4096])
def test_the_bins_are_tenths_of_any_clock(tmp_path: Path, num_times: int) -> None:
    every = torch.arange(num_times)
    steps = [
        record(1)._replace(t=every, s=s, num_times=num_times, losses=every.double())
        for s in (torch.zeros_like(every), every)
    ]
    edges = bin_edges(num_times)
    assert edges[0] == 0 and edges[-1] == num_times and len(edges) == BIN_COUNT + 1
    sizes = [end - low for low, end in pairwise(edges)]
    assert max(sizes) - min(sizes) <= 1
    history = History(tmp_path)
    for step in steps:
        history(step)
    loss, count, read = losses_by_time(tmp_path)
    assert read == edges and count.diagonal()[1:].tolist() == count[1:, 0].tolist() == sizes[1:]
    assert count[0, 0] == 2 * sizes[0] and count.sum() == 2 * num_times
    for k, (low, end) in enumerate(pairwise(edges)):
        assert loss[k, k] == loss[k, 0] == pytest.approx((low + end - 1) / 2)


def test_a_folder_without_files_has_no_rows(tmp_path: Path) -> None:
    assert read_log(tmp_path) == [] and read_loss_by_time(tmp_path) is None


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = small_config(write_inputs(tmp_path))
    board = trackers.TensorBoard(config.output_folder / "tensorboard")
    for step in (1, 2):
        board(record(step, loss=1 / step))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "grid.png")
    board.show(2, tmp_path / "grid.png")
    board.writer.close()
    events = reader.EventAccumulator(str(config.output_folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    (shown,) = events.Images("previews")
    assert (shown.step, shown.width, shown.height) == (2, 40, 30)
    with Image.open(io.BytesIO(shown.encoded_image_string)) as image:
        assert image.convert("RGB").getcolors() == [(40 * 30, (255, 0, 0))]
    named = {f"loss by t/{low:03}-{low + 99}" for low in (0, 400, 900)}
    named |= {f"loss by t - s/{low:03}-{low + 99}" for low in (0, 100, 900)}
    assert set(events.Tags()["scalars"]) == named | {"loss", "learning rate", "gradient norm", "images per second"}


def test_what_is_asked_for_and_not_installed_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    trackers.check_installed(LogConfig())
    with pytest.raises(UserError, match=r"log\.tensorboard is set, but tensorboard is not installed: pip install"):
        trackers.check_installed(LogConfig(tensorboard=True))
    with pytest.raises(UserError, match=r"log\.wandb_project is set, but wandb is not installed: pip install wandb"):
        trackers.check_installed(LogConfig(wandb_project="mine"))


def test_weights_and_biases_gets_every_number_under_a_name_that_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wandb:
        started: list[dict[str, object]] = []
        logged: list[tuple[dict[str, object], int]] = []

        def init(self, **settings: object) -> "Wandb":
            self.started.append(settings)
            return self

        def log(self, values: dict[str, object], step: int) -> None:
            self.logged.append((values, step))

        def Image(self, path: str) -> str:  # noqa: N802  (W&B's name)
            return f"the picture {path}"

    monkeypatch.setitem(sys.modules, "wandb", Wandb())  # type: ignore[arg-type]
    values = {**write_inputs(tmp_path), "log": {"wandb_project": "mine"}}
    for _ in range(2):
        (observer,) = trackers.start_trackers(small_config(values))
        observer(record(3))
    first, second = Wandb.started
    assert first["project"] == "mine" and first["resume"] == "allow" and first["id"] == second["id"]
    assert Wandb.logged[0] == (trackers.scalars(record(3)), 3)
    observer.show(3, tmp_path / "grid.jpg")
    assert Wandb.logged[-1] == ({"previews": f"the picture {tmp_path / 'grid.jpg'}"}, 3)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("log.csv", b"1,0.5,x,1,1", "could not convert string to float: 'x'"),
        ("log.csv", b"1.5,0.5,0.1,1,1", "invalid literal for int"),
        ("log.csv", b"1,0.5,0.1,1,\xff", "codec can't decode"),
        ("loss_by_time.csv", b"1,900,100,0,2,0.5", "step 1, t 900, gap 100"),
        ("loss_by_time.csv", b"1,1000,100,1000,2,0.5", "step 1, t 1000"),
        ("loss_by_time.csv", b"1,900,-1,1000,2,0.5", "gap -1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(b"step and more\n" + line + b"\n")
    with pytest.raises(UserError, match=f"{name} is damaged .*{message}.*: repair or remove it"):
        read_log(tmp_path) if name == "log.csv" else read_loss_by_time(tmp_path)


def test_a_damaged_log_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step and more\nx,1,1,1,1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"log\.csv is damaged"):
        History(tmp_path)(record(2))
    assert (tmp_path / "log.csv").read_text(encoding="utf-8").endswith("x,1,1,1,1\n")
