"""Strategic stochastic sampling (arXiv 2402.19159): the loop, and noise that depends on nothing but the seed."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .schedule import Schedule
from .trajectory import jump, renoise

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, C, ...], sigma [], sigma_s []) -> x0 [B, C, ...]; told the target sigma_s, which it may ignore."""

Noise = Callable[[Tensor, Tensor], Tensor]
"""(sigma_next [], like [B, C, ...]) -> z ~ N(0, I), of like's shape, dtype and device."""

Report = Callable[[int, Tensor, Tensor, Tensor], None]
"""(step, x [B, C, ...], sigma [], x0 [B, C, ...]) -> None; the tensors are not edited afterwards."""


def sample_tcd(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    schedule: Schedule,
    gamma: float,
    noise: Noise,
    report: Report | None = None,
) -> Tensor:
    """Sample along sigmas [N + 1], descending on the schedule's clock, from x [B, C, ...] at sigmas[0].

    Each step predicts x0 at t, reports it, jumps to s = (1 - gamma) t', and renoises from s to t'. gamma = 0 is
    deterministic, gamma = 1 is multistep consistency sampling. A step to sigma = 0 returns x0. With fewer than two
    sigmas there is no step, and x is returned.

    Arithmetic is in float32, or float64 if x is; the result has x's dtype, and x is left as it is. The sigmas that the
    callables receive are 0-dim and on the CPU.

    Raises ValueError if gamma is not in [0, 1] or sigmas is not finite, non-negative and descending.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma!r}, but must be from 0.0 to 1.0")
    dtype = x.dtype
    x = x.to(_at_least_float32(dtype))
    for i, (sigma, sigma_next) in enumerate(pairwise(_checked(sigmas))):
        sigma_s = schedule.target(sigma_next, gamma)
        x0 = denoise(x, sigma, sigma_s).to(x.dtype)
        if report is not None:
            report(i, x, sigma, x0)
        s = schedule.level(sigma_s)
        x = jump(x, x0, schedule.level(sigma), s)
        if sigma_s < sigma_next:
            x = renoise(x, s, schedule.level(sigma_next), noise(sigma_next, x))
    return x.to(dtype)


def seeded_noise(seed: int, *, first_index: int = 0) -> Noise:
    """Return a noise source whose draw for batch item k at sigma_next depends on (seed, k, sigma_next) alone.

    So an image gets the same noise on every device, in every batch and wherever its schedule was split; k counts from
    first_index. Each draw is float32 on the CPU. Alike are: item k of a seed and item 0 of seed + k; a level and itself
    when visited again; seeds 2^32 apart, of which torch's CPU generator keeps the low half (as in the initial noise).

    Raises ValueError unless seed is in 0 .. 2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, but must be from 0 to 2^64 - 1 ({2**64 - 1})")

    def noise(sigma_next: Tensor, like: Tensor) -> Tensor:
        level = int(sigma_next.to("cpu", torch.float32).view(torch.int32)) * 0x9E3779B97F4A7C15
        items = [_draw(seed + 1 + first_index + k + level, like.shape[1:]) for k in range(len(like))]
        return torch.stack(items).to(like)

    return noise


def _draw(seed: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed % 2**64)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked(sigmas: Tensor) -> Tensor:
    # On the CPU, once: steps then compare, look up and seed without waiting for the device each time.
    sigmas = sigmas.detach().to("cpu", _at_least_float32(sigmas.dtype))
    descending = sigmas.ndim == 1 and sigmas.isfinite().all() and (sigmas >= 0).all() and (sigmas.diff() <= 0).all()
    if not descending:
        raise ValueError(f"sigmas is {sigmas.tolist()}, but must be a list of finite, descending levels, none below 0")
    return sigmas
