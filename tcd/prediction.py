"""Conversions between a network's output and x0; the output is noise (eps), velocity (v), x0 itself or a flow.

All other code works with x0, so no sampler and no loss branches on the prediction type.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from .trajectory import Level

Prediction = Literal["eps", "v", "x0", "flow"]


def to_x0(output: Tensor, x: Tensor, t: Level, prediction: Prediction) -> Tensor:
    """Turn a network's output at (x, t) into its estimate of x0; tensors [B, C, H, W].

    eps: (x - sigma eps) / alpha, in any scale.
    v: alpha x - sigma v, only at variance preserving levels (arXiv 2202.00512).
    x0: the output itself.
    flow: x - sigma (eps - x0), only at rectified flow levels (alpha = 1 - sigma).

    Raises ValueError for an unknown prediction, and for eps at alpha = 0, where the noise does not determine x0.
    """
    _check(prediction)
    if prediction == "x0":
        return output
    if prediction == "v":
        return t.alpha * x - t.sigma * output
    if prediction == "flow":
        return x - t.sigma * output
    _require_nonzero(t.alpha, "alpha", "an eps prediction has no x0 at zero terminal SNR: use a v or x0 model")
    return (x - t.sigma * output) / t.alpha


def from_x0(x0: Tensor, x: Tensor, t: Level, prediction: Prediction) -> Tensor:
    """Turn an estimate of x0 at (x, t) into the network output that to_x0 maps to it; tensors [B, C, H, W].

    eps: (x - alpha x0) / sigma.   v: (alpha x - x0) / sigma.   x0: x0 itself.   flow: (x - x0) / sigma.

    Raises ValueError for an unknown prediction, and at sigma = 0 unless the prediction is x0.
    """
    _check(prediction)
    if prediction == "x0":
        return x0
    _require_nonzero(t.sigma, "sigma", f"{prediction} is undefined without noise")
    if prediction == "v":
        return (t.alpha * x - x0) / t.sigma
    if prediction == "flow":
        return (x - x0) / t.sigma
    return (x - t.alpha * x0) / t.sigma


def _check(prediction: str) -> None:
    choices = get_args(Prediction)
    if prediction not in choices:
        raise ValueError(f"prediction is {prediction!r}, but must be one of {', '.join(choices)}")


def _require_nonzero(value: Tensor | float, name: str, reason: str) -> None:
    """Raise ValueError for a zero among numbers and tensors on the CPU.

    On other devices nothing is checked, because reading the value would wait for the device. A division by 0 then
    gives an infinite result, which stops training.
    """
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if bool((torch.as_tensor(value) == 0).any()):
        raise ValueError(f"{name} is 0: {reason}")
