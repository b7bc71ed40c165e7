"""The host's fused functions: their gradients within differentiable_kernels, and the host as it was after it."""

from __future__ import annotations

import sys
from typing import Any

import comfy.model_management
import comfy_kitchen
import pytest
import torch
from torch import Tensor

from trajectory_consistency.nodes.host.training import differentiable_kernels, kernels

SHAPE = (1, 2, 6, 8)  # [B, heads, tokens, channels]


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments for each fused function of comfy_kitchen that a network uses: the first needs a gradient."""
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    rotation = torch.randn(1, 1, SHAPE[2], SHAPE[3] // 2, 2, 2, generator=generator)
    scale, shift = (torch.randn(SHAPE[3], generator=generator) for _ in range(2))
    return {
        "adaln": (x, scale, shift),
        "rms_adaln": (x, scale, shift),
        "apply_rope": (x, other, rotation),
        "apply_rope1": (x, rotation),
        "apply_rope_split_half": (x, other, rotation),
        "apply_rope_split_half1": (x, rotation),
        "rms_rope": (x, other, rotation, scale),
        "rms_rope1": (x, rotation, scale),
        "rms_rope_split_half": (x, other, rotation, scale),
        "rms_rope_split_half1": (x, rotation, scale),
    }


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def state() -> dict[str, Any]:
    return {**vars(comfy_kitchen), "in_training": comfy.model_management.in_training}


@pytest.mark.parametrize("name", calls())
def test_a_fused_function_has_a_gradient_where_one_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, *others = calls()[name]
    plain = first(getattr(comfy_kitchen, name)(x, *others))
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first(getattr(comfy_kitchen, name)(x, *others)).sum().backward()
    fused = []
    monkeypatch.setattr(comfy_kitchen, name, lambda *args: fused.append(args) or plain)
    with differentiable_kernels():
        function = getattr(comfy_kitchen, name)
        output = first(function(x, *others))
        output.square().sum().backward()
        assert not fused and torch.allclose(output, plain, atol=1e-6)
        with torch.no_grad():
            function(x, *others)
        function(x.detach(), *others)
        assert len(fused) == 2, "where no gradient is needed, it is the fused function"
    direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    monkeypatch.undo()
    with torch.no_grad():
        step = [first(getattr(comfy_kitchen, name)(x + h * direction, *others)).double() for h in (1e-2, -1e-2)]
    difference = (step[0].square().sum() - step[1].square().sum()) / 2e-2
    assert x.grad is not None and torch.isclose((x.grad * direction).sum().double(), difference, rtol=5e-3)


def test_every_fused_function_of_normalization_and_rotation_is_covered() -> None:
    """A new one in a newer comfy_kitchen must be added to the calls above."""
    names = {name for name in comfy_kitchen.__all__ if name.startswith(("adaln", "apply_rope", "rms_"))}
    assert {name for name in names if not name.endswith("_")} == calls().keys()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_host_is_restored_also_after_an_exception(error: type[BaseException]) -> None:
    before = state()
    with pytest.raises(error), differentiable_kernels():
        assert comfy.model_management.in_training
        with differentiable_kernels():
            pass
        assert comfy.model_management.in_training, "the inner block restores what the outer one set"
        assert comfy_kitchen.apply_rope is not before["apply_rope"]
        raise error
    assert state() == before


def test_a_host_without_the_flag_is_left_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(comfy.model_management, "in_training")
    with differentiable_kernels():
        assert not hasattr(comfy.model_management, "in_training")
    assert not hasattr(comfy.model_management, "in_training")


def test_a_host_without_comfy_kitchen_has_only_the_flag_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._kitchen.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "comfy_kitchen", None)  # which makes importing it fail
        with differentiable_kernels():
            assert comfy.model_management.in_training
    kernels._kitchen.cache_clear()
    before = comfy_kitchen.apply_rope
    with differentiable_kernels():
        assert comfy_kitchen.apply_rope is not before
