"""The counts of a step's work: operations whose work is known, and the tables for small models."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

COUNTED = Path(__file__).parent / "bench" / "counted"
sys.path += [str(COUNTED), str(COUNTED.parent)]

from counting import H100, counting  # noqa: E402

META = torch.device("meta")


def drawn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, device=META, dtype=torch.bfloat16, requires_grad=grad)


def test_a_product_and_its_gradient() -> None:
    x, weight = drawn(8, 16, grad=True), drawn(32, 16)
    with counting() as result:
        result.part = "forward"
        y = functional.linear(x, weight)
        result.part = "backward"
        y.backward(torch.empty_like(y))
    forward, backward = result.of("forward"), result.of("backward")
    assert forward.flops == backward.flops == 2 * 8 * 16 * 32
    assert (forward.kernels, backward.kernels) == (1, 1), "no gradient of the weight"
    assert forward.moved == 2 * (8 * 16 + 16 * 32 + 8 * 32)
    assert forward.seconds == max(forward.flops / H100.flops, forward.moved / H100.bandwidth)


def test_attention_is_one_operation_with_two_products_and_four_in_its_gradient() -> None:
    query, key = drawn(2, 4, 16, 8, grad=True), drawn(2, 4, 12, 8, grad=True)
    original = functional.scaled_dot_product_attention
    with counting() as result:
        functional.scaled_dot_product_attention(query, key, key).sum().backward()
    works = result.by_operation()
    assert works["attention"].flops == 4 * (2 * 4 * 16 * 12 * 8) and works["attention"].kernels == 1
    assert works["attention_backward"].flops == 8 * (2 * 4 * 16 * 12 * 8)
    assert result.of(products=True).kernels == 2
    assert functional.scaled_dot_product_attention is original


def test_a_view_is_no_work_and_a_sum_in_place_reads_and_writes() -> None:
    x, y = drawn(4, 6), drawn(4, 6)
    with counting() as result:
        x.view(6, 4).t()[:2].flatten(0)
        drawn(3, 3)
        x.add_(y)
    flat = result.by_operation()["clone"]  # a transposed matrix has to be copied to be flat
    assert (flat.kernels, flat.flops) == (1, 0)
    assert result.by_operation()["add_"].moved == 3 * 2 * 24 and result.of().kernels == 2


def test_a_product_added_in_place_has_flops() -> None:
    with counting() as result:
        drawn(4, 6).addmm_(drawn(4, 5), drawn(5, 6))
    assert result.of(products=True).flops == 2 * 4 * 5 * 6


def printed(script: str) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, COUNTED / f"{script}.py", "tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps: list[dict[str, Any]] = json.loads(done.stdout)
    return steps


def test_the_steps_of_a_small_unet() -> None:
    plain, recomputed = printed("unets")
    assert plain["TFLOP"] == pytest.approx(sum(plain[part] for part in ("teacher", "target", "student", "gradient")))
    assert plain["target"] == pytest.approx(plain["student"] / 2), "for half of the rows"
    assert 0.5 * plain["student"] < recomputed["gradient"] - plain["gradient"] <= plain["student"]
    assert recomputed["utilisation"] < plain["utilisation"] < 1
    assert 0 < plain["ms of products"] < plain["ms"]


def test_the_orders_of_work() -> None:
    (ratios,) = printed("orders")
    assert all(0 < value < 1 for name, value in ratios.items() if name != "step"), ratios
