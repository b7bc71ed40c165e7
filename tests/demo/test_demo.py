"""The demo, as a person runs it: what it writes, what it claims, and what it does when it is not good enough."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from trajectory_consistency.trainer.demo import __main__ as demo_main
from trajectory_consistency.trainer.demo.methods import METHODS
from trajectory_consistency.trainer.models.unet.checkpoint import TINY_PATH

pytestmark = pytest.mark.slow

LABELS = [method.label for method in METHODS]


def run_demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trajectory_consistency.trainer.demo", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True)


def read_metrics(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo-out"
    done = run_demo(out)
    assert done.returncode == 0, done.stderr
    assert "distilling" in done.stderr and "img/s" in done.stderr
    return out


def test_it_writes_the_grid_the_lora_and_the_metrics(result: Path) -> None:
    with Image.open(result / "grid.png") as grid:
        assert grid.width > 8 * 64 and grid.height > len(LABELS) * 64
    with safe_open(result / "tcd-lora.safetensors", "pt") as lora:
        assert lora.metadata()["tcd.target_time"] == "s"
    assert not result.with_name("demo-out.unfinished").exists()
    metrics = read_metrics(result)
    assert set(LABELS) | {"Fresh data"} <= set(metrics)
    assert all({"to_world", "to_teacher", "accuracy", "difference"} <= set(metrics[label]) for label in LABELS)


@pytest.mark.parametrize("steps", ["2 steps", "4 steps", "8 steps", "32 steps"])
def test_with_the_target_time_pictures_are_nearer_to_the_teachers_own_than_those_of_others(
    result: Path, steps: str
) -> None:
    metrics = read_metrics(result)
    found = {name: metrics[f"{name}, {steps}"]["difference"] for name in ("LCM", "TCD", "TCD S+")}
    assert min(found, key=found.__getitem__) == "TCD S+", found


def test_with_the_target_time_any_number_of_steps_draws_the_same_picture(result: Path) -> None:
    metrics = read_metrics(result)
    found = [metrics[f"TCD S+, {steps} steps"]["difference"] for steps in (2, 4, 8, 32)]
    assert max(found) < 1.5 * min(found)
    assert metrics["Teacher, 50 steps"]["difference"] == 0 < min(found)
    assert max(found) < metrics["LCM, 32 steps"]["difference"] / 2


def test_four_steps_show_what_the_caption_mentions(result: Path) -> None:
    metrics = read_metrics(result)
    assert metrics["TCD S+, 4 steps"]["accuracy"] >= metrics["Teacher, 50 steps"]["accuracy"] - 0.05


@pytest.mark.host
@pytest.mark.parametrize("steps", ["1 step", "2 steps", "4 steps"])
def test_comfyui_draws_the_same(result: Path, steps: str) -> None:
    assert read_metrics(result)[f"ComfyUI, TCD S+, {steps}"]["relative difference of latents"] <= 1e-4


def test_the_embedded_teacher_is_small_enough_to_ship() -> None:
    assert TINY_PATH.stat().st_size <= 8e6


def test_it_is_the_same_each_time_and_takes_the_place_of_the_last(tmp_path: Path) -> None:
    out = tmp_path / "demo-out"
    measured = []
    for _ in range(2):
        done = run_demo(out, "--steps", "2", "--samples", "8")
        assert done.returncode == 0, done.stderr
        measured.append(read_metrics(out))
        (out / "metrics.json").write_text("{}", encoding="utf-8")
    assert measured[0] == measured[1] != {}
    assert [path.name for path in tmp_path.iterdir()] == ["demo-out"]


@pytest.mark.parametrize(
    ("of_pixels", "of_latents", "message"),
    [
        (18.0, 1e-7, "TCD S+ differ by 18.0 from those of the teacher in 50 steps (expected: less than 16.8;"),
        (float("nan"), 1e-7, "TCD S+ differ by nan"),
        (10.0, 1e-3, "1.0e-03 from"),
        (10.0, float("nan"), "nan from"),
    ],
)
def test_one_that_is_not_good_enough_fails_and_keeps_the_old_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    of_pixels: float,
    of_latents: float,
    message: str,
) -> None:
    metrics = {
        "Teacher, 4 steps": {"difference": 14.0},
        "TCD S+, 4 steps": {"difference": of_pixels},
        "ComfyUI": {"relative difference of latents": of_latents},
    }
    out = tmp_path / "demo-out"
    out.mkdir()
    (out / "metrics.json").write_text("{}", encoding="utf-8")

    def checks(*_: Any, **__: Any) -> None:
        demo_main._check_latents(metrics)
        demo_main._check_student(metrics)

    monkeypatch.setattr(demo_main, "demo", checks)
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(out)])
    assert demo_main.main() == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["metrics.json"]


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    done = run_demo(tmp_path)
    assert done.returncode == 2 and "choose another with --out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
