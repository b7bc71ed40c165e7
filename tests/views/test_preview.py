"""Previews: drawn from the file that is exported, beside the teacher and the start, without a trace in the training."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tiny_base import drawn_by_hand, small_config, write_base, write_inputs
from trajectory_consistency.tcd.distill import StepRecord
from trajectory_consistency.trainer import run
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.files.metadata import lora_metadata
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.views import preview
from trajectory_consistency.trainer.views.grid import Row, draw_grid
from trajectory_consistency.trainer.views.preview_prompts import load_picture, picture_names

PROMPTS = ["a red circle", "a red circle, \u00e0 gauche"]
STEPS, SEEDS = (1, 4), (3,)


def inputs(folder: Path) -> dict[str, dict[str, object]]:
    """A base, and pictures, and another VAE in the place of the base's own."""
    values = write_inputs(folder)
    values["base"]["vae"] = str(write_base(folder / "other.safetensors", seed=1))
    return values


def previewed(folder: Path, **training: object) -> Config:
    values = inputs(folder)
    values["preview"] = {"prompts": PROMPTS, "seeds": SEEDS, "steps": STEPS, "every": 2, "eta": 0.5, "cfg": 1.0}
    values["method"] = {"guidance_min": 2.0, "guidance_max": 4.0}
    return small_config(values, steps=3, **training)


class Tracker:
    """Notes what it is told and shown, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __call__(self, record: StepRecord) -> None:
        self.seen.append(("step", record.step))

    def show(self, step: int, grid: Path) -> None:
        assert grid.is_file()
        self.seen.append((grid.name, step))


TRACKER = Tracker()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = previewed(tmp_path_factory.mktemp("previewed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "start_trackers", lambda config: [TRACKER])
        run.run(config)
    return config


def test_a_tracker_is_shown_the_grid_of_a_step_after_its_numbers(done: Config) -> None:
    shown = [("step", 1), ("step", 2), ("step-000002.jpg", 2), ("step", 3), ("step-000003.jpg", 3)]
    assert TRACKER.seen == shown


def shown(config: Config, when: str, which: int, steps: int) -> torch.Tensor:
    folder = config.output_folder / "previews"
    return load_picture(preview.picture_path(folder, when, picture_names(PROMPTS, SEEDS)[which], steps))


def drawn(config: Config, lora: Path | None, which: int, steps: int, gamma: float, cfg: float) -> torch.Tensor:
    """The picture that a person gets who loads the base, and a file, and samples."""
    prompt, seed = divmod(which, len(SEEDS))
    return drawn_by_hand(config.base, lora, PROMPTS[prompt], SEEDS[seed], steps=steps, gamma=gamma, cfg=cfg, side=64)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.int() - other.int()).abs().max() <= 1)


@pytest.mark.parametrize("which", [0, 1])
def test_pictures_are_those_of_the_file_of_their_step(done: Config, which: int) -> None:
    half_way = done.output_folder / "previews" / "tcd-lora-step-000002.safetensors"
    for steps in STEPS:
        assert same(shown(done, "step-000000", which, steps), drawn(done, None, which, steps, 0.5, 1.0))
        assert same(shown(done, "step-000002", which, steps), drawn(done, half_way, which, steps, 0.5, 1.0))
        assert same(shown(done, "step-000003", which, steps), drawn(done, done.lora_path, which, steps, 0.5, 1.0))
    assert not same(shown(done, "step-000000", which, 4), shown(done, "step-000003", which, 4))


def test_the_teachers_picture_is_guided_and_has_no_adapter(done: Config) -> None:
    assert same(shown(done, "teacher", 1, 50), drawn(done, None, 1, 50, 0.0, 3.0))


def test_guidance_is_from_the_negative_prompt(tmp_path: Path) -> None:
    config = previewed(tmp_path)
    config = replace(config, method=replace(config.method, negative_prompt="(blurry:1.2)"))
    checkpoint, device = open_checkpoint(config.base), torch.device("cpu")
    (expected,) = checkpoint.load_text_encoder(device).encode(["(blurry:1.2)"])
    found = run._preview_prompts(config, checkpoint, device).uncond
    torch.testing.assert_close(found.tensors["context"], expected.tensors["context"], rtol=1e-4, atol=1e-4)


def test_training_is_the_same_to_the_last_bit_without_previews(done: Config, tmp_path: Path) -> None:
    plain = small_config(inputs(tmp_path) | {"method": {"guidance_min": 2.0, "guidance_max": 4.0}}, steps=3)
    one, other = load_file(done.lora_path), load_file(run.run(plain))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (plain.output_folder / "previews").exists()


def test_the_grid_has_the_teacher_and_in_groups_the_start_and_the_step(
    done: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawn_rows = done.output_folder / "previews", []
    wanted = SimpleNamespace(names=picture_names(PROMPTS, SEEDS), captions=["one", "other"])

    def seen(rows: list[Row], *arguments: Any, **options: Any) -> Image.Image:
        drawn_rows[:] = rows
        return draw_grid(rows, *arguments, **options)

    monkeypatch.setattr(preview, "draw_grid", seen)
    for step in (0, 2, 3):
        preview.write_grid(folder, wanted, done, step)
        expected = [("Teacher\n50 steps, cfg 3", "teacher", 50, False)]
        for steps, sampled in zip(STEPS, ("1 step", "4 steps"), strict=True):
            expected.append((f"{sampled}\nbefore training", "step-000000", steps, True))
            expected += [(f"{sampled}\nafter {step}", f"step-{step:06}", steps, False)] if step else []
        assert [(row.label, row.starts_group) for row in drawn_rows] == [
            (label, first) for label, *_, first in expected
        ]
        for row, (_, when, steps, _) in zip(drawn_rows, expected, strict=True):
            assert all(same(row.pictures[k], shown(done, when, k, steps)) for k in range(2)), row.label
    assert not (folder / "tcd-lora-step-000003.safetensors").exists(), "the last file is the run's own"


@pytest.fixture
def redrawn(done: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Start a run's previews once more, with other settings, and return what was drawn: the steps of each drawing."""
    folder = tmp_path / "out"
    shutil.copytree(done.output_folder, folder)
    real, counts = preview.sample_previews, []

    def counted(*arguments: Any, steps: int, cfg: float, **options: Any) -> Any:
        counts.append(f"{steps} at {cfg:g}")
        return real(*arguments, steps=steps, cfg=cfg, **options)

    monkeypatch.setattr(preview, "sample_previews", counted)

    def start(**changed: Any) -> list[str]:
        counts.clear()
        values = {**asdict(replace(done, preview=replace(done.preview, **changed))), "output": {"folder": str(folder)}}
        config = from_mapping(values)
        device = torch.device("cpu")
        checkpoint = open_checkpoint(config.base)
        student = run.load_student(config, checkpoint, device, torch.float32)
        wanted = run._preview_prompts(config, checkpoint, device)
        preview.Previews(student, checkpoint, wanted, config, lora_metadata(config, checkpoint)).start()
        assert not shown_anywhere_missing(config)
        return list(counts)

    return start


def shown_anywhere_missing(config: Config) -> list[Path]:
    folder, names = config.output_folder / "previews", picture_names(config.preview.prompts, config.preview.seeds)
    wanted = [("teacher", 50), *(("step-000000", steps) for steps in config.preview.steps)]
    paths = [preview.picture_path(folder, when, name, steps) for when, steps in wanted for name in names]
    return [path for path in [*paths, preview.grid_path(folder, 0)] if not path.is_file()]


def test_a_run_that_goes_on_draws_of_the_start_what_is_not_there_in_the_same_settings(
    redrawn: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert redrawn() == []
    assert redrawn(steps=(1, 2, 4)) == ["2 at 1"]
    next((tmp_path / "out" / "previews" / "teacher").iterdir()).unlink()
    assert redrawn() == ["50 at 3"]
    assert redrawn(seeds=(3, 4)) == ["50 at 3", "1 at 1", "4 at 1"]
    assert redrawn() == []
    assert redrawn(cfg=2.0) == ["50 at 3", "1 at 2", "4 at 2"]
    assert redrawn(cfg=2.0, width=72) == ["50 at 3", "1 at 2", "4 at 2"]
    assert redrawn(cfg=2.0, width=72, every=7) == []


def test_previews_are_no_reason_to_refuse_a_run_that_goes_on(done: Config, tmp_path: Path) -> None:
    from trajectory_consistency.trainer.config.settings import changes, from_mapping

    values = write_inputs(tmp_path)
    assert not changes(from_mapping(values), from_mapping(values | {"preview": {"prompts": ["other"]}}))


def test_a_finished_run_has_a_report_with_every_picture_in_it(done: Config) -> None:
    page = (done.output_folder / "report.html").read_text(encoding="utf-8")
    times = 3  # before the first step, after the second and after the last; and the teacher's
    assert page.count("data:image/jpeg;base64,") == len(PROMPTS) * len(SEEDS) * (times + 1) * len(STEPS)
