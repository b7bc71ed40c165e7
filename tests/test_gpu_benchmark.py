"""The benchmark for a GPU, in its dry run on a CPU, and the two measures whose right value is known."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

GPU = Path(__file__).parent / "bench" / "gpu"
sys.path += [str(GPU), str(GPU.parent)]

from gradients import relative_and_cosine  # noqa: E402
from measure import busy_share  # noqa: E402


def dry_run(out: Path, *parts: str) -> dict[str, Any]:
    """The results of a dry run."""
    done = subprocess.run(
        [sys.executable, GPU, "--dry", "--out", out, *parts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return results


def test_the_parts_of_the_trainer_give_their_figures(tmp_path: Path) -> None:
    found = dry_run(tmp_path / "gpu.json", "unets", "orders", "waits", "gradients")
    step = found["unets: tiny 64 px batch 2, gradient_checkpointing"]
    assert step["images/s"] > 0 and step["TFLOP/s"] > 0 and step["estimated GB"] > 0
    assert found["unets: tiny 64 px batch 2, channels last"]["TFLOP/s"] > 0
    assert found["orders: ours / separate, time"] > 0
    assert 0 <= found["waits: tiny 64 px batch 2, share of the time without work for the device"] < 1
    assert len(found["waits: the longest kernels, share of the time"]) == 10
    early, later = (found[f"gradients: tiny 64 px, huber_c 0.03, after {steps} steps"] for steps in (1, 2))
    assert 0 < early["relative error"] < 1 and 0 < later["relative error"] < 1
    assert early != later


def test_without_time_every_case_is_named_as_skipped(tmp_path: Path) -> None:
    found = dry_run(tmp_path / "gpu.json", "--minutes", "0", "orders", "waits", "gradients", "world")
    skipped = [name for name, value in found.items() if value == "skipped: no time left"]
    assert [name.split(":")[0] for name in skipped] == ["orders", "waits", "gradients", "gradients", "world"]


def test_an_unknown_part_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, GPU, "--dry", "--out", tmp_path / "gpu.json", "fly"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "there is no part fly" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("intervals", "share"),
    [
        ([], 0.0),
        ([(0, 10)], 1.0),
        ([(0, 4), (6, 10)], 0.8),
        ([(6, 10), (0, 4), (1, 3), (2, 5)], 0.9),  # in any order, one within another, and overlapping
    ],
)
def test_the_share_of_the_time_that_intervals_cover(intervals: list[tuple[float, float]], share: float) -> None:
    assert busy_share(intervals) == pytest.approx(share)


def test_error_and_angle_of_a_gradient_in_pieces() -> None:
    exact = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    turned = [torch.tensor([-4.0]), torch.tensor([[0.0, 3.0]])]
    assert relative_and_cosine(exact, exact) == {"relative error": 0.0, "cosine": 1.0}
    assert relative_and_cosine(turned, exact) == {"relative error": round(math.sqrt(2), 5), "cosine": 0.0}
