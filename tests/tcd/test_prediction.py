"""Conversions between what a network predicts and x0, against the definition of each prediction."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from trajectory_consistency.tcd import Level, Prediction, from_x0, to_x0, vp_level

VP = vp_level(torch.tensor(0.3, dtype=torch.float64))
VE = Level(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64))
FLOW = Level(torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
PURE_NOISE = vp_level(torch.tensor(0.0, dtype=torch.float64))
CLEAN = vp_level(torch.tensor(1.0, dtype=torch.float64))

CASES = [("eps", VP), ("eps", VE), ("eps", FLOW), ("v", VP), ("x0", VP), ("x0", FLOW), ("flow", FLOW)]


def randn(seed: int) -> Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perfect_output(prediction: Prediction, x0: Tensor, eps: Tensor, t: Level) -> Tensor:
    """What a network that knows x0 and eps outputs, by the definition of its prediction."""
    return {"eps": eps, "v": t.alpha * eps - t.sigma * x0, "x0": x0, "flow": eps - x0}[prediction]


@pytest.mark.parametrize(("prediction", "t"), CASES)
def test_a_perfect_network_gives_the_x0_that_was_noised(prediction: Prediction, t: Level) -> None:
    x0, eps = randn(0), randn(1)
    x = t.alpha * x0 + t.sigma * eps
    torch.testing.assert_close(to_x0(perfect_output(prediction, x0, eps, t), x, t, prediction), x0)


@pytest.mark.parametrize(("prediction", "t"), CASES)
def test_from_x0_inverts_to_x0_for_any_output(prediction: Prediction, t: Level) -> None:
    output, x = randn(0), randn(1)
    torch.testing.assert_close(from_x0(to_x0(output, x, t, prediction), x, t, prediction), output)


def test_v_and_flow_hold_where_there_is_no_signal() -> None:
    output, x = randn(0), randn(1)
    torch.testing.assert_close(to_x0(output, x, PURE_NOISE, "v"), -output)
    torch.testing.assert_close(to_x0(output, x, Level(torch.tensor(0.0), torch.tensor(1.0)), "flow"), x - output)


def test_eps_at_zero_terminal_snr_is_refused_for_one_item_of_a_batch() -> None:
    alpha_bar = torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    with pytest.raises(ValueError, match="zero terminal SNR: use a v or x0 model"):
        to_x0(randn(0), randn(1), vp_level(alpha_bar), "eps")


def test_a_level_on_a_device_is_not_looked_at() -> None:
    """The meta device stands for a GPU, which would have to be waited for."""
    x, level = torch.empty(2, 4, 3, 5, device="meta"), vp_level(torch.empty(2, 1, 1, 1, device="meta"))
    for prediction in get_args(Prediction):
        assert to_x0(x, x, level, prediction).shape == from_x0(x, x, level, prediction).shape == x.shape


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_from_x0_without_noise_is_refused(prediction: Prediction) -> None:
    with pytest.raises(ValueError, match=f"sigma is 0: {prediction}"):
        from_x0(randn(0), randn(1), CLEAN, prediction)
    assert torch.equal(from_x0(randn(0), randn(1), CLEAN, "x0"), randn(0))


@pytest.mark.parametrize("convert", [to_x0, from_x0])
def test_an_unknown_prediction_is_refused_with_the_choices(convert) -> None:
    with pytest.raises(ValueError, match="'epsilon', but must be one of eps, v, x0, flow"):
        convert(randn(0), randn(1), VP, "epsilon")
