"""Each family of models that the host loads, sampled in the host on small networks and compared with a reference.

The references share neither network nor formulas with the nodes: the networks are those of diffusers, and the sampler
is diffusers' TCDScheduler, or the step of the paper as written below if the model has no timesteps. They share only the
noise drawn for a seed.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import MINI_SD3, MINI_SDXL, MINI_WAN
from diffusers import AutoencoderKLWan, SD3Transformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from graphs import LATENT_SCALE, MINI, Graph, Node, latents, relative_error, saved
from reference import condition, sigma_table, tcd_scheduler_sample
from torch import Tensor

from trajectory_consistency.tcd import seeded_noise, timestep_grid
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer

pytestmark = pytest.mark.host

GRID = [(steps, eta) for steps in (1, 2, 4) for eta in (0.0, 0.3, 1.0)]
SEED = 7
TOLERANCE = 1e-4  # float32, and two builds of torch

Network = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w] at sigma, sigma []) -> x0, in the host's scale."""


def in_the_host(
    server: ComfyServer, checkpoint: str, *, patch: str = "", latent: str = "EmptyLatentImage", **options: Any
) -> dict[tuple[int, float], Tensor]:
    """Return the latents of SamplerCustom with the pack's nodes, by (steps, eta), in the scale of its output.

    patch: a node that replaces the model's sampling, and its options. shape: sizes of the conditioning. length: number
    of frames of a video.
    """
    shape, length = options.pop("shape", {}), options.pop("length", None)
    size = {"width": 64, "height": 64, "batch_size": 1} | ({"length": length} if length else {})
    graph = Graph()
    model = graph.checkpoint(checkpoint)[0]
    if patch:
        model = graph.add(patch, model=model, **options)[0]
    shared = {
        "model": model,
        "seed": SEED,
        "positive": graph.condition(0, **shape)[0],
        "negative": graph.condition(1, **shape)[0],
        "latent": graph.add(latent, **size)[0],
    }
    saves: dict[tuple[int, float], Node] = {}
    for steps, eta in GRID:
        sigmas = graph.sigmas(model, steps=steps)[0]
        saves[steps, eta] = graph.save(graph.sampler_custom(eta=eta, sigmas=sigmas, **shared)[0])
    outputs = server.run(graph)
    return {key: saved(server, outputs, node) / LATENT_SCALE for key, node in saves.items()}


def initial_noise(*channels: int) -> Tensor:
    """Return the host's initial noise for a number of channels, 4 by default, and of frames."""
    return torch.randn(1, *(channels or (4,)), 8, 8, generator=torch.Generator().manual_seed(SEED))


def conditioned(width: int, pooled: int) -> tuple[Tensor, Tensor]:
    """Return the embedding [1, 77, width] and the vector [1, pooled] of TestConditioning at its seed 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 77, width, generator=generator), torch.randn(1, pooled, generator=generator)


def agree(found: dict[tuple[int, float], Tensor], expected: Callable[..., Tensor], tolerance: float) -> None:
    errors = {(steps, eta): relative_error(found[steps, eta], expected(steps=steps, eta=eta)) for steps, eta in GRID}
    assert max(errors.values()) < tolerance, errors


# Models with timesteps, compared with diffusers' scheduler


@pytest.mark.parametrize(
    ("sampling", "zero_snr", "prediction", "tolerance"),
    [
        ("v_prediction", False, "v_prediction", TOLERANCE),
        # The host uses sigma = 4518.76 instead of infinity, an error of 2e-4 in alpha.
        ("v_prediction", True, "v_prediction", 1e-3),
        ("x0", False, "sample", TOLERANCE),
    ],
)
def test_sd15(
    server: ComfyServer, unet: UNet2DConditionModel, sampling: str, zero_snr: bool, prediction: str, tolerance: float
) -> None:
    found = in_the_host(server, MINI, patch="ModelSamplingDiscrete", sampling=sampling, zsnr=zero_snr)

    def expected(steps: int, eta: float) -> Tensor:
        start, grid = initial_noise(), timestep_grid(steps)
        options = {"eta": eta, "seed": SEED, "prediction": prediction, "zero_snr": zero_snr}
        return tcd_scheduler_sample(unet, start, grid, **options) / LATENT_SCALE

    agree(found, expected, tolerance)


def test_sdxl(server: ComfyServer, mini_sdxl: UNet2DConditionModel) -> None:
    shape = {"width": 2048, "pooled": 1280}
    found = in_the_host(server, MINI_SDXL, shape=shape)
    context, pooled = conditioned(**shape)
    size = torch.tensor([[64.0, 64, 0, 0, 64, 64]])  # original size, crop and target size
    network = partial(mini_sdxl, added_cond_kwargs={"text_embeds": pooled, "time_ids": size})

    def expected(steps: int, eta: float) -> Tensor:
        options = {"eta": eta, "seed": SEED, "context": context}
        return tcd_scheduler_sample(network, initial_noise(), timestep_grid(steps), **options) / 0.13025

    agree(found, expected, TOLERANCE)


# Models without timesteps, or with fewer of them, compared with the step of the paper


@torch.no_grad()
def by_the_paper(
    network: Network,
    x: Tensor,
    sigmas: Tensor,
    targets: Tensor,
    alpha: Callable[[Any], Any],
    noise_scale: float = 1.0,
) -> Tensor:
    """Strategic stochastic sampling along sigmas [N + 1] with targets [N], in a scale x = alpha(sigma) x0 + sigma eps.

    noise_scale: the std of the noise in the model's training.
    """
    draw = seeded_noise(SEED)
    for i, (sigma, after, s) in enumerate(zip(sigmas, sigmas[1:], targets, strict=False)):
        x0 = network(x, sigma)
        if i == len(sigmas) - 2:
            return x0
        eps = (x - alpha(sigma) * x0) / sigma
        ratio = alpha(after) / alpha(s)
        fresh = (after**2 - (ratio * s) ** 2).clamp(min=0).sqrt() * noise_scale
        x = ratio * (alpha(s) * x0 + s * eps) + fresh * draw(after, x)
    raise AssertionError("no step")


def flow(steps: int, eta: float, *, shift: float) -> tuple[Tensor, Tensor]:
    """Return the sigmas [N + 1] of a flow model with this shift, and the targets [N]."""
    times = torch.arange(steps, -1, -1) / steps
    sigmas = shift * times / (1 + (shift - 1) * times)
    return sigmas, (1 - eta) * sigmas[1:]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sd3(server: ComfyServer, mini_sd3: SD3Transformer2DModel, scale: float) -> None:
    patch: dict[str, Any] = {"patch": "ModelNoiseScale", "noise_scale": scale} if scale != 1 else {}
    if patch and patch["patch"] not in server.get(f"/object_info/{patch['patch']}"):
        pytest.skip("this ComfyUI is too old for a scale of the noise")
    shape = {"width": 4096, "pooled": 2048}
    found = in_the_host(server, MINI_SD3, latent="EmptySD3LatentImage", shape=shape, **patch)
    context, pooled = conditioned(**shape)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * mini_sd3(x, context, pooled, 1000 * sigma.expand(1)).sample

    def expected(steps: int, eta: float) -> Tensor:
        sigmas, targets = flow(steps, eta, shift=3)
        latent = by_the_paper(network, scale * initial_noise(16), sigmas, targets, lambda sigma: 1 - sigma, scale)
        return latent / 1.5305 + 0.0609

    agree(found, expected, TOLERANCE)


def test_wan(server: ComfyServer, mini_wan: WanTransformer3DModel) -> None:
    found = in_the_host(server, MINI_WAN, latent="EmptyHunyuanLatentVideo", length=9, shape={"width": 4096})
    context, _ = conditioned(4096, 0)
    mean, std = (
        torch.tensor(inspect.signature(AutoencoderKLWan).parameters[name].default).view(16, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * mini_wan(x, 1000 * sigma.expand(1), context).sample

    def expected(steps: int, eta: float) -> Tensor:
        sigmas, targets = flow(steps, eta, shift=8)
        return by_the_paper(network, initial_noise(16, 3), sigmas, targets, lambda sigma: 1 - sigma) * std + mean

    agree(found, expected, TOLERANCE)


@pytest.mark.usefixtures("mini_wan")
def test_a_video_depends_on_eta_and_seed(server: ComfyServer) -> None:
    graph = Graph()
    model = graph.checkpoint(MINI_WAN)[0]
    inputs = {
        "model": model,
        "sigmas": graph.sigmas(model)[0],
        "positive": graph.condition(0, width=4096)[0],
        "negative": graph.condition(1, width=4096)[0],
        "latent": graph.add("EmptyHunyuanLatentVideo", width=64, height=48, length=9, batch_size=2)[0],
    }
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    nodes = [graph.sampler_custom(seed=SEED, sampler=euler, **inputs)]
    nodes += [graph.sampler_custom(seed=seed, eta=eta, **inputs) for eta, seed in ((0.0, SEED), (0.3, SEED), (0.3, 8))]
    saves = [graph.save(node[0]) for node in nodes]
    # The same run again, with a new condition node so that the host does not answer from its cache.
    again = graph.sampler_custom(seed=SEED, eta=0.3, **inputs | {"positive": graph.condition(0, width=4096)[0]})
    expected, still, one, other, same = latents(server, graph, *saves, graph.save(again[0]))
    assert one.shape == (2, 16, 3, 6, 8)
    assert one.isfinite().all() and other.isfinite().all()
    assert relative_error(still, expected) < 1e-5
    assert torch.equal(one, same)
    assert relative_error(one, still) > 0.01, "eta has an effect"
    assert relative_error(one, other) > 0.01, "the seed has an effect"
    assert relative_error(one[0], one[1]) > 0.01, "the videos of a batch have different noise"


def test_stable_cascade(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    found = in_the_host(server, MINI, patch="ModelSamplingStableCascade", shift=2.0)
    offset = 0.008
    start = math.cos(offset / (1 + offset) * math.pi / 2)

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = (1 + sigma**2) ** -0.5
        t = torch.acos(alpha * start) / (math.pi / 2) * (1 + offset) - offset  # the cosine schedule, inverted
        return x - sigma * unet(alpha * x, t, condition()).sample

    def expected(steps: int, eta: float) -> Tensor:
        highest = (0.9999 / 0.0001) ** 0.5  # the host clamps alpha_bar here
        times = torch.arange(steps, -1, -1, dtype=torch.float64) / steps * highest / (1 + highest)
        sigmas = (times / (1 - times)).float()
        lower = (1 - eta) * times[1:]
        x = (1 + sigmas[0] ** 2).sqrt() * initial_noise()
        targets = (lower / (1 - lower)).float()
        return by_the_paper(network, x, sigmas, targets, torch.ones_like) / LATENT_SCALE

    agree(found, expected, TOLERANCE)


def test_sd15_with_50_timesteps(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    found = in_the_host(server, MINI, patch="ModelSamplingDiscrete", sampling="lcm", zsnr=False)
    known, table = np.arange(19, 1000, 20), sigma_table()[19::20]

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        t = int(known[(table - sigma).abs().argmin()])
        x0 = x - sigma * unet(x / (1 + sigma**2).sqrt(), t, condition()).sample
        keep = 0.25 / ((10 * t) ** 2 + 0.25)  # the skip connection of latent consistency models
        return keep * x + math.sqrt(1 - keep) * x0

    def expected(steps: int, eta: float) -> Tensor:
        grid = timestep_grid(steps)
        sigmas = torch.tensor([*(float(table[t // 20]) for t in grid), 0.0])
        lower = [math.floor((1 - eta) * t + 1e-6) for t in grid[1:]]
        targets = torch.tensor([*np.exp(np.interp(lower, known, table.log())), 0.0], dtype=torch.float32)
        start = (1 + sigmas[0] ** 2).sqrt() * initial_noise()
        return by_the_paper(network, start, sigmas, targets, torch.ones_like) / LATENT_SCALE

    agree(found, expected, TOLERANCE)
