"""The equations of trajectory consistency; no other file repeats them.

Notation: x_t = alpha_t x0 + sigma_t eps. The scale may be variance preserving (alpha^2 + sigma^2 = 1), rectified flow
(alpha = 1 - sigma) or variance exploding (alpha = 1, as in the host), but all arguments of a call must have the same.
Nothing is cast: callers pass float32 or float64, and the arithmetic is in that dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A noise level: x = alpha * x0 + sigma * eps. Floats, or tensors [] or [B, 1, 1, 1] in float32 or float64."""

    alpha: Tensor | float
    sigma: Tensor | float


def add_noise(x0: Tensor, eps: Tensor, t: Level) -> Tensor:
    """Diffuse clean x0 with noise eps to level t; all [B, C, H, W].

    x_t = alpha_t x0 + sigma_t eps      (arXiv 2006.11239, equation 4, whose sqrt(alpha_bar_t) is alpha_t here)
    """
    return t.alpha * x0 + t.sigma * eps


def jump(x: Tensor, x0: Tensor, t: Level, s: Level) -> Tensor:
    """Follow the trajectory from x at level t to level s, given its clean end x0; all [B, C, H, W].

    x_s = alpha_s x0 + sigma_s eps, with eps = (x - alpha_t x0) / sigma_t

    This is the first-order trajectory consistency function of arXiv 2402.19159, which writes it as an exponential
    integrator. The form here has no logarithms, so it also holds at zero terminal SNR (alpha_t = 0). A jump from t to t
    returns x. If sigma_t = 0, the only allowed s is t, and the ratio sigma_s / sigma_t is set to 1.
    """
    ratio = _ratio(s.sigma, t.sigma)
    return ratio * x + (s.alpha - ratio * t.alpha) * x0


def renoise(x_s: Tensor, s: Level, t: Level, z: Tensor) -> Tensor:
    """Diffuse x_s from level s up to the noisier level t (s <= t) with fresh noise z; tensors [B, C, H, W].

    x_t = a x_s + sqrt(sigma_t^2 - a^2 sigma_s^2) z, with a = alpha_t / alpha_s

    This is the second half of a step of strategic stochastic sampling (arXiv 2402.19159). alpha_s must not be 0.
    """
    a = t.alpha / s.alpha  # computed first: a <= 1 even after rounding, so the variance below cannot become negative
    return a * x_s + (t.sigma**2 - (a * s.sigma) ** 2) ** 0.5 * z


def _ratio(sigma_s: Tensor | float, sigma_t: Tensor | float) -> Tensor | float:
    if isinstance(sigma_t, Tensor):
        return torch.where(sigma_t == 0, torch.ones_like(sigma_t), sigma_s / sigma_t)
    return sigma_s / sigma_t if sigma_t else 1.0
