"""The sampler of tcd/ in the two forms that the host uses: a function like k-diffusion's samplers, and a SAMPLER."""

from functools import cache
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...tcd.sampling import Noise, sample_tcd, seeded_noise
from .batch_index import batch_indices
from .model_schedule import schedule_of
from .target_time import with_target_time


def tcd_sampler(gamma: float) -> comfy.samplers.KSAMPLER:
    """Return a SAMPLER for strategic stochastic sampling (arXiv 2402.19159) with stochasticity gamma in [0, 1]."""
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
    """Sample from noisy x [B, C, ...] along sigmas [N + 1]; the host calls this like a k-diffusion sampler."""
    extra_args = extra_args or {}
    options = extra_args.get("model_options", {})
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    schedule = schedule_of(model_sampling)

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        arguments = {**extra_args, "model_options": with_target_time(options, schedule, sigma, sigma_s)}
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
            noise=_host_noise(model, extra_args.get("seed"), scale=getattr(model_sampling, "noise_scale", 1.0)),
            report=report,
        )


def _host_noise(model: Any, seed: int | None, *, scale: float) -> Noise:
    """Return noise from the host's seed, multiplied by `scale`: some flow models are trained on scale * eps.

    If seed is None, a random seed is used.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))

    @cache  # built at the first draw: the search for batch indices is slow, and not needed if gamma = 0
    def noise_source() -> Noise:
        unit = seeded_noise(seed, items=batch_indices(getattr(model, "noise", None), seed))
        return unit if scale == 1 else lambda sigma_next, like: scale * unit(sigma_next, like)

    return lambda sigma_next, like: noise_source()(sigma_next, like)
