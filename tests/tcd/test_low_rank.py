"""The term of a LoRA beside a layer: values and gradients against plain autograd, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from trajectory_consistency.tcd.low_rank import is_frozen_linear, linear_with_low_rank, low_rank

SCALE = 0.7


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def frozen_linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 6, bias=bias, dtype=torch.float64).requires_grad_(False)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (2, 0, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_with_low_rank_is_the_sum_of_both(shape: Sequence[int], bias: bool) -> None:
    layer, x, down, up = frozen_linear(bias), drawn(*shape), drawn(2, 5), drawn(6, 2) + 1
    expected = layer(x) + SCALE * (x @ down.t() @ up.t())
    assert torch.allclose(linear_with_low_rank(x, layer, down, up, SCALE), expected, rtol=0, atol=1e-12)
    assert torch.allclose(layer(x) + low_rank(x, down, up, SCALE, layer), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("needed", ["x down up", "x", "down", "up", "down up"])
def test_its_gradients_are_those_of_finite_differences(needed: str) -> None:
    layer = frozen_linear()
    values = {"x": drawn(2, 3, 5), "down": drawn(2, 5), "up": drawn(6, 2)}
    for name in needed.split():
        values[name].requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x, down, up: linear_with_low_rank(x, layer, down, up, SCALE), tuple(values.values())
    )


def test_weights_of_another_dtype_are_cast_and_not_kept() -> None:
    layer, x = frozen_linear(), drawn(2, 4, 5).float().requires_grad_(True)
    down, up = drawn(2, 5).float(), drawn(6, 2).float()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        y = linear_with_low_rank(x, layer, down, up, SCALE)
    assert y.dtype == torch.float32 and sum(saved.shape == layer.weight.shape for saved in kept) == 1
    assert any(saved.data_ptr() == layer.weight.data_ptr() for saved in kept)
    (of_x,) = torch.autograd.grad(y.sum(), x)
    expected = (layer.weight.float() + SCALE * up @ down).sum(0)
    assert torch.allclose(of_x, expected.expand_as(x), rtol=0, atol=1e-5)


def test_its_output_may_be_written_over() -> None:
    layer, x, down, up = frozen_linear(), drawn(2, 3, 5), drawn(2, 5).requires_grad_(True), drawn(6, 2)
    linear_with_low_rank(x, layer, down, up, SCALE).mul_(2).sum().backward()
    expected = 2 * SCALE * up.sum(0)[:, None] * x.sum((0, 1))
    assert down.grad is not None and torch.allclose(down.grad, expected)


def test_a_convolution_gets_the_sum_of_its_own_and_a_low_rank_one() -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False, dtype=torch.float64)
    x, down, up = drawn(2, 3, 8, 8), drawn(2, 3, 3, 3), drawn(4, 2, 1, 1)
    merged = SCALE * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    expected = nn.functional.conv2d(x, merged, None, stride=2, padding=1)
    assert torch.allclose(low_rank(x, down, up, SCALE, layer), expected, rtol=0, atol=1e-12)


def test_only_a_plain_linear_without_gradients_is_computed_together() -> None:
    class Quantised(nn.Linear):
        """Computes something else from its weight."""

    assert is_frozen_linear(frozen_linear())
    assert not is_frozen_linear(nn.Linear(2, 2)), "its own gradient would be lost"
    assert not is_frozen_linear(Quantised(2, 2).requires_grad_(False))
    assert not is_frozen_linear(nn.Conv1d(2, 2, 1).requires_grad_(False))
