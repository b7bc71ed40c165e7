"""The sampler of tcd/ as the host's SAMPLER: called as the host calls k-diffusion's functions."""

from functools import cache
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...tcd import Noise, sample_tcd, seeded_noise
from .clock import schedule_of
from .noise import noise_items
from .target_time import with_target_time


def tcd_sampler(gamma: float) -> comfy.samplers.KSAMPLER:
    """Return a SAMPLER: strategic stochastic sampling (arXiv 2402.19159) with stochasticity gamma in [0, 1]."""
    return comfy.samplers.KSAMPLER(sample_with_tcd, extra_options={"gamma": gamma}, inpaint_options={})


def sample_with_tcd(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    gamma: float,
) -> Tensor:
    """Sample from noisy x [B, C, ...] along sigmas [N + 1], in the way that the host calls k-diffusion's samplers."""
    extra_args = extra_args or {}
    options = extra_args.get("model_options", {})
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    schedule = schedule_of(model_sampling)

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        arguments = {**extra_args, "model_options": with_target_time(options, schedule, sigma, sigma_s, len(x))}
        return model(x, sigma.to(x) * x.new_ones(len(x)), **arguments)

    with tqdm(total=max(len(sigmas) - 1, 0), disable=disable) as bar:

        def report(i: int, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
            if callback is not None:
                callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})
            bar.update()

        return sample_tcd(
            denoise,
            x,
            sigmas,
            schedule=schedule,
            gamma=gamma,
            noise=_noise(model, extra_args.get("seed"), scale=getattr(model_sampling, "noise_scale", 1.0)),
            report=report,
        )


def _noise(model: Any, seed: int | None, *, scale: float) -> Noise:
    """Noise by the host's seed, at the scale of the model's own: newer hosts know flow models trained on s * eps."""
    if seed is None:  # the caller wants any noise
        seed = int(torch.randint(2**63 - 1, ()))

    @cache  # not before it is needed: a run at gamma = 0 never does
    def source() -> Noise:
        unit = seeded_noise(seed, items=noise_items(getattr(model, "noise", None), seed))
        return unit if scale == 1 else lambda sigma_next, like: scale * unit(sigma_next, like)

    return lambda sigma_next, like: source()(sigma_next, like)
