"""Strategic stochastic sampling (arXiv 2402.19159): the loop, and noise that depends on nothing but the seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .schedule import Schedule
from .trajectory import Level, jump, renoise

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
    sigmas = _checked(sigmas)
    targets = schedule.target(sigmas[1:], gamma)
    levels, target_levels = _levels(schedule, sigmas), _levels(schedule, targets)
    for i, (sigma, sigma_next, sigma_s) in enumerate(zip(sigmas, sigmas[1:], targets, strict=False)):
        t, s, t_next = levels[i], target_levels[i], levels[i + 1]
        x0 = denoise(x, sigma, sigma_s).to(x.dtype)
        if report is not None:
            report(i, x, sigma, x0)
        x = jump(x, x0, t, s)
        if sigma_s < sigma_next:
            x = renoise(x, s, t_next, noise(sigma_next, x))
    return x.to(dtype)


def _levels(schedule: Schedule, sigmas: Tensor) -> list[Level]:
    # As plain numbers: a step then costs a few operations on x, and none on tensors of one number.
    alpha, sigma = (torch.as_tensor(part).tolist() for part in schedule.level(sigmas))
    return [Level(*each) for each in zip(alpha, sigma, strict=True)]


def seeded_noise(seed: int, *, items: Sequence[int] | None = None) -> Noise:
    """Return a noise source whose draw for item k at sigma_next depends on (seed, k, sigma_next) alone.

    items: the k of each image in the batch; without them, its place there. So an image gets the same noise on every
    device, in every batch and wherever its schedule was split. Each draw is float32 on the CPU. Alike are: item k of a
    seed and item 0 of seed + k; a level and itself when visited again; seeds 2^32 apart, of which torch's CPU generator
    keeps the low half (as in the initial noise).

    Raises ValueError unless seed is in 0 .. 2^64 - 1; its draw does if there are not as many items as images.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, but must be from 0 to 2^64 - 1 ({2**64 - 1})")

    def noise(sigma_next: Tensor, like: Tensor) -> Tensor:
        level = int(sigma_next.to("cpu", torch.float32).view(torch.int32)) * 0x9E3779B97F4A7C15
        drawn = torch.empty(like.shape, dtype=torch.float32)
        for k, image in zip(range(len(drawn)) if items is None else items, drawn, strict=True):
            image.normal_(generator=_generator(seed + 1 + k + level))
        return drawn.to(like)

    return noise


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**64)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked(sigmas: Tensor) -> Tensor:
    # On the CPU, once: steps then compare, look up and seed without waiting for the device each time.
    sigmas = sigmas.detach().to("cpu", _at_least_float32(sigmas.dtype))
    descending = sigmas.ndim == 1 and sigmas.isfinite().all() and (sigmas >= 0).all() and (sigmas.diff() <= 0).all()
    if not descending:
        raise ValueError(f"sigmas is {sigmas.tolist()}, but must be a list of finite, descending levels, none below 0")
    return sigmas
