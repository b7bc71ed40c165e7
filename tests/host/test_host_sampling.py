"""TCDSampler and TCDSigmas in the real host, compared with diffusers' TCDScheduler on the same UNet."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from graphs import Graph, host_noise, latents, relative_error, sampled, saved
from reference import condition, sigma_table, tcd_scheduler_sample

from trajectory_consistency.tcd import FlowSchedule, sample_tcd, seeded_noise, timestep_grid, to_x0
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer

pytestmark = pytest.mark.host

TOLERANCE = 1e-4  # float32, and two builds of torch


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_equals_an_independent_tcd(server: ComfyServer, unet: UNet2DConditionModel, steps: int, eta: float) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    node = graph.sampler_custom(model=model, eta=eta, sigmas=graph.sigmas(model, steps=steps)[0], seed=7)
    found = latents(server, graph, graph.save(node[0]))[0]
    expected = tcd_scheduler_sample(unet, host_noise(7), timestep_grid(steps), eta=eta, seed=7)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction(server: ComfyServer, unet: UNet2DConditionModel, zero_snr: bool) -> None:
    graph = Graph()
    model = graph.add("ModelSamplingDiscrete", model=graph.checkpoint()[0], sampling="v_prediction", zsnr=zero_snr)[0]
    node = graph.sampler_custom(model=model, eta=0.0 if zero_snr else 0.3, seed=3)
    found = latents(server, graph, graph.save(node[0]))[0]
    expected = tcd_scheduler_sample(
        unet,
        host_noise(3),
        timestep_grid(4),
        eta=0.0 if zero_snr else 0.3,
        seed=3,
        prediction="v_prediction",
        zero_snr=zero_snr,
    )
    # At zero terminal SNR the host uses sigma = 4518.76 instead of infinity, an error of 2e-4 in alpha.
    assert relative_error(found, expected) < (1e-3 if zero_snr else TOLERANCE)


def test_flow_model(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    graph = Graph()
    model = graph.add("ModelSamplingSD3", model=graph.checkpoint()[0], shift=3.0)[0]
    sigmas = graph.add("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0)[0]
    node = graph.sampler_custom(model=model, sigmas=sigmas, eta=0.3, seed=5)
    shown, kept = graph.show(sigmas), graph.save(node[0])
    outputs = server.run(graph)

    levels = torch.tensor(outputs[shown.id]["values"])
    schedule = FlowSchedule()

    def denoise(x: torch.Tensor, sigma: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return to_x0(unet(x, sigma * 1000, condition()).sample, x, schedule.level(sigma), "flow")

    with torch.no_grad():
        expected = sample_tcd(denoise, host_noise(5), levels, schedule=schedule, gamma=0.3, noise=seeded_noise(5))
    assert relative_error(saved(server, outputs, kept), expected) < TOLERANCE


def test_sampler_custom_advanced_gives_the_same(server: ComfyServer) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    node = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=11)[0],
        guider=graph.add("BasicGuider", model=model, conditioning=graph.condition()[0])[0],
        sampler=graph.add("TCDSampler", eta=0.3)[0],
        sigmas=graph.sigmas(model)[0],
        latent_image=graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)[0],
    )
    advanced = latents(server, graph, graph.save(node[0]))[0]
    torch.testing.assert_close(advanced, sampled(server, seed=11))


def test_only_the_seed_determines_the_noise(server: ComfyServer) -> None:
    first, again, other = (sampled(server, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert relative_error(other, first) > 0.1


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_extreme_seeds(server: ComfyServer, unet: UNet2DConditionModel, seed: int) -> None:
    expected = tcd_scheduler_sample(unet, host_noise(seed), timestep_grid(4), eta=1.0, seed=seed)
    assert relative_error(sampled(server, seed=seed, eta=1.0), expected) < TOLERANCE


def test_the_seed_matters_only_at_eta_above_0(server: ComfyServer) -> None:
    # The second part starts from the same latent without initial noise, so a difference comes from injected noise.
    def second_half(eta: float, seed: int) -> torch.Tensor:
        graph = Graph()
        model = graph.checkpoint()[0]
        halves = graph.add("SplitSigmas", sigmas=graph.sigmas(model)[0], step=1)
        begun = graph.sampler_custom(model=model, eta=eta, sigmas=halves[0], seed=4)
        ended = graph.sampler_custom(
            model=model, eta=eta, sigmas=halves[1], seed=seed, add_noise=False, latent=begun[0]
        )
        return latents(server, graph, graph.save(ended[0]))[0]

    assert torch.equal(second_half(0.0, 4), second_half(0.0, 5))
    assert relative_error(second_half(0.3, 4), second_half(0.3, 5)) > 0.01


def test_an_image_does_not_depend_on_its_batch(server: ComfyServer) -> None:
    alone, pair, three = (sampled(server, seed=9, batch=batch) for batch in (1, 2, 3))
    assert relative_error(pair[:1], alone) < TOLERANCE
    assert relative_error(three[:2], pair) < TOLERANCE
    assert relative_error(three[2:], three[:1]) > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("split", [1, 3])
def test_a_split_schedule_equals_an_unsplit_one(server: ComfyServer, eta: float, split: int) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    sigmas = graph.sigmas(model)[0]
    halves = graph.add("SplitSigmas", sigmas=sigmas, step=split)
    begun = graph.sampler_custom(model=model, eta=eta, sigmas=halves[0], seed=6)
    ended = graph.sampler_custom(model=model, eta=eta, sigmas=halves[1], seed=6, add_noise=False, latent=begun[0])
    whole = graph.sampler_custom(model=model, eta=eta, sigmas=sigmas, seed=6)
    in_two, in_one = latents(server, graph, graph.save(ended[0]), graph.save(whole[0]))
    assert relative_error(in_two, in_one) < TOLERANCE


@pytest.mark.parametrize("timesteps", ["800", "900,500,100", "999, 0"])
def test_custom_timesteps(server: ComfyServer, unet: UNet2DConditionModel, timesteps: str) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    # With typed timesteps, steps and denoise must have no effect.
    sigmas = graph.sigmas(model, steps=50, denoise=0.0, timesteps=timesteps)[0]
    node = graph.sampler_custom(model=model, sigmas=sigmas, seed=8)
    found = latents(server, graph, graph.save(node[0]))[0]

    chosen = [int(word) for word in timesteps.split(",")]
    sigma = sigma_table()[chosen[0]]
    # Below sigma_max the host starts from latent + sigma * noise, in its own scale.
    x = host_noise(8) if chosen[0] == 999 else host_noise(8) * sigma / (1 + sigma**2).sqrt()
    expected = tcd_scheduler_sample(unet, x, chosen, eta=0.3, seed=8)
    assert relative_error(found, expected) < TOLERANCE


def test_denoise_starts_from_the_latent(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    picture = graph.sampler_custom(model=model, seed=1)
    sigmas = graph.sigmas(model, steps=2, denoise=0.5)[0]
    again = graph.sampler_custom(model=model, sigmas=sigmas, seed=2, latent=picture[0])
    before, after = latents(server, graph, graph.save(picture[0]), graph.save(again[0]))

    timesteps = timestep_grid(2, denoise=0.5)
    sigma = sigma_table()[timesteps[0]]
    x = (before + sigma * host_noise(2)) / (1 + sigma**2).sqrt()
    assert relative_error(after, tcd_scheduler_sample(unet, x, timesteps, eta=0.3, seed=2)) < TOLERANCE


def test_denoise_0_keeps_the_latent(server: ComfyServer) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    picture = graph.sampler_custom(model=model, seed=1)
    again = graph.sampler_custom(model=model, sigmas=graph.sigmas(model, denoise=0.0)[0], latent=picture[0])
    before, after = latents(server, graph, graph.save(picture[0]), graph.save(again[0]))
    assert torch.equal(before, after)


def test_the_region_that_a_mask_protects_is_kept(server: ComfyServer) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    picture = graph.sampler_custom(model=model, seed=1)
    nowhere = graph.add("SolidMask", value=0.0, width=64, height=64)[0]
    left_half = graph.add("SolidMask", value=1.0, width=32, height=64)[0]
    mask = graph.add("MaskComposite", destination=nowhere, source=left_half, x=0, y=0, operation="add")[0]
    masked = graph.add("SetLatentNoiseMask", samples=picture[0], mask=mask)[0]
    again = graph.sampler_custom(model=model, seed=2, latent=masked)
    before, after = latents(server, graph, graph.save(picture[0]), graph.save(again[0]))
    assert relative_error(after[..., 4:], before[..., 4:]) < 1e-5
    assert relative_error(after[..., :4], before[..., :4]) > 0.1


def test_previews_get_the_estimate_of_x0(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    first_step = graph.add("SplitSigmas", sigmas=graph.sigmas(model)[0], step=1)[0]
    node = graph.sampler_custom(model=model, sigmas=first_step, eta=0.3, seed=12)
    noisy, previewed = latents(server, graph, graph.save(node[0]), graph.save(node[1]))
    one_step = tcd_scheduler_sample(unet, host_noise(12), [999], eta=0.3, seed=12)  # x0 as predicted at 999
    assert relative_error(previewed, one_step) < TOLERANCE
    assert relative_error(noisy, one_step) > 0.1
