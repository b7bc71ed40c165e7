"""Strategic stochastic sampling (arXiv 2402.19159): the sampling loop, and its noise as a function of the seed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .schedule import Schedule
from .trajectory import Level, jump, renoise

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, C, ...], sigma [], sigma_s []) -> x0 [B, C, ...]; sigma_s is the sigma of the target time, for TCF(S+)."""

Noise = Callable[[Tensor, Tensor], Tensor]
"""(sigma_next [], like [B, C, ...]) -> z ~ N(0, I), with the shape, dtype and device of `like`."""

Report = Callable[[int, Tensor, Tensor, Tensor], None]
"""(step, x [B, C, ...], sigma [], x0 [B, C, ...]) -> None; the tensors are not changed afterwards."""


# 2^64 / golden ratio, as in Fibonacci hashing. Multiplying by it spreads neighboring levels over all seeds. It is odd,
# so different levels give different seeds.
_LEVEL_MULTIPLIER = 0x9E3779B97F4A7C15
# The same for items, from another number, so that item k of one seed has not the noise of item k - 1 of the next seed:
# the first bits of sqrt(2) behind the point, made odd.
_ITEM_MULTIPLIER = 0x6A09E667F3BCC909


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
    """Sample from x [B, C, ...] at sigmas[0] down to sigmas[-1]; sigmas [N + 1] descend, in the schedule's scale.

    Strategic stochastic sampling of arXiv 2402.19159: each step predicts x0 at t, reports it, jumps to
    s = (1 - gamma) t', and renoises from s to the next time t'.
    gamma = 0 is deterministic, gamma = 1 is multistep consistency sampling. A step to sigma = 0 returns x0. With fewer
    than two sigmas there is no step, and x is returned.

    Arithmetic is in float32, or in float64 if x is float64. The result has the dtype of x, and x is not changed. The
    callables receive sigmas as 0-dim CPU tensors.

    Raises ValueError if gamma is not in [0, 1], or sigmas are not finite, non-negative and descending.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is {gamma!r}, but must be from 0.0 to 1.0")
    dtype = x.dtype
    x = x.to(_at_least_float32(dtype))
    sigmas = _checked_sigmas(sigmas)
    targets = schedule.target_sigma(sigmas[1:], gamma)
    levels, target_levels = _levels(schedule, sigmas), _levels(schedule, targets)
    for i, (sigma, sigma_next, sigma_s) in enumerate(zip(sigmas, sigmas[1:], targets, strict=False)):
        t, s, t_next = levels[i], target_levels[i], levels[i + 1]
        x0 = denoise(x, sigma, sigma_s).to(x.dtype)
        if report is not None:
            report(i, x, sigma, x0)
        # If sigma_next is 0, sigma_s is 0 too, and the jump returns x0. The host expects a result without noise, and it
        # has already restored the region outside an inpainting mask in x0.
        x = jump(x, x0, t, s)
        if sigma_s < sigma_next:
            x = renoise(x, s, t_next, noise(sigma_next, x))
    return x.to(dtype)


def _levels(schedule: Schedule, sigmas: Tensor) -> list[Level]:
    # Python floats rather than 0-dim tensors, so that the arithmetic of a step launches kernels only for x.
    alpha, sigma = (torch.as_tensor(part).tolist() for part in schedule.level(sigmas))
    return [Level(*pair) for pair in zip(alpha, sigma, strict=True)]


def seeded_noise(seed: int, *, items: Sequence[int] | None = None) -> Noise:
    """Return a noise source whose noise for item k at sigma_next depends only on (seed, k, sigma_next).

    items: the item number k of each image; by default its place in the batch. An image therefore gets the same noise on
    every device, in every batch, and in a split schedule. Noise is drawn in float32 on the CPU.

    Known collisions: a level visited twice repeats its noise; seeds 2^32 apart are equal, because torch's CPU generator
    keeps the low 32 bits (true of the host's initial noise as well).

    Raises ValueError unless seed is in 0 .. 2^64 - 1. Drawing raises ValueError if items and images differ in number.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, but must be from 0 to 2^64 - 1 ({2**64 - 1})")

    def noise(sigma_next: Tensor, like: Tensor) -> Tensor:
        level = int(sigma_next.to("cpu", torch.float32).view(torch.int32)) * _LEVEL_MULTIPLIER
        drawn = torch.empty(like.shape, dtype=torch.float32)
        for k, image in zip(range(len(drawn)) if items is None else items, drawn, strict=True):
            # + 1, as in ComfyUI's own noise sampler, because ComfyUI draws the initial noise from `seed` itself.
            image.normal_(generator=_cpu_generator(seed + 1 + k * _ITEM_MULTIPLIER + level))
        return drawn.to(like)

    return noise


def _cpu_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**64)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked_sigmas(sigmas: Tensor) -> Tensor:
    # Moved to the CPU once, so that comparing, looking up and seeding do not wait for the device in every step.
    sigmas = sigmas.detach().to("cpu", _at_least_float32(sigmas.dtype))
    descending = sigmas.ndim == 1 and sigmas.isfinite().all() and (sigmas >= 0).all() and (sigmas.diff() <= 0).all()
    if not descending:
        raise ValueError(f"sigmas is {sigmas.tolist()}, but must be a list of finite, descending levels, none below 0")
    return sigmas
