"""Other inputs of a sampler: masks, areas, ControlNets, guidance, batches and latents in other dtypes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import mini_controlnet, write_controlnet_mini
from diffusers import UNet2DConditionModel
from graphs import Graph, Node, host_noise, host_version, latents, relative_error
from reference import condition, tcd_scheduler_sample
from torch import Tensor

from trajectory_consistency.tcd import timestep_grid
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer

pytestmark = pytest.mark.host

TOLERANCE = 1e-4  # float32, and two builds of torch


def left_half(graph: Graph, value: float = 1.0) -> list[Any]:
    """Return a MASK of this value on the left half of 64 x 64, and of 0 on the right."""
    nowhere = graph.add("SolidMask", value=0.0, width=64, height=64)[0]
    half = graph.add("SolidMask", value=value, width=32, height=64)[0]
    return graph.add("MaskComposite", destination=nowhere, source=half, x=0, y=0, operation="add")[0]


def assert_like_euler(server: ComfyServer, graph: Graph, **inputs: Any) -> None:
    """Assert that SamplerCustom equals the host's own euler at eta = 0, and is different and finite above 0."""
    model = inputs.setdefault("model", graph.checkpoint()[0])
    inputs["sigmas"] = graph.sigmas(model, steps=2)[0]
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    nodes = [graph.sampler_custom(eta=eta, **inputs) for eta in (0.0, 1.0)]
    nodes.append(graph.sampler_custom(sampler=euler, **inputs))
    still, stochastic, expected = latents(server, graph, *(graph.save(node[0]) for node in nodes))
    assert relative_error(still, expected) < 1e-5
    assert stochastic.isfinite().all()
    assert relative_error(stochastic, expected) > 0.01


class Masked:
    """Relative change of a latent that is resampled with a mask on its left half: `changed` left, `kept` right."""

    def __init__(self, server: ComfyServer, sample: Callable[[Graph, list[Any], list[Any]], Node]) -> None:
        graph = Graph()
        model = graph.checkpoint()[0]
        picture = graph.ksampler(model=model, steps=1, seed=1)
        latent = graph.add("SetLatentNoiseMask", samples=picture[0], mask=left_half(graph))[0]
        again = sample(graph, model, latent)
        before, after = latents(server, graph, graph.save(picture[0]), graph.save(again[0]))
        self.kept = relative_error(after[..., 4:], before[..., 4:])
        self.changed = relative_error(after[..., :4], before[..., :4])


@pytest.mark.parametrize(("eta", "denoise"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.5), (1.0, 1.0)])
def test_the_region_that_a_mask_protects_is_kept(server: ComfyServer, eta: float, denoise: float) -> None:
    def sample(graph: Graph, model: list[Any], latent: list[Any]) -> Node:
        model = graph.add("TCDModelSettings", model=model, eta=eta)[0]
        return graph.ksampler(model=model, steps=2, seed=2, denoise=denoise, latent=latent)

    masked = Masked(server, sample)
    assert masked.kept < 1e-5
    assert masked.changed > 0.01


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_region_that_differential_diffusion_protects_is_kept(server: ComfyServer, eta: float) -> None:
    def sample(graph: Graph, model: list[Any], latent: list[Any]) -> Node:
        model = graph.add("DifferentialDiffusion", model=model)[0]
        sigmas = graph.sigmas(model, steps=2)[0]
        return graph.sampler_custom(model=model, eta=eta, sigmas=sigmas, seed=2, latent=latent)

    masked = Masked(server, sample)
    assert masked.kept < 1e-5
    assert masked.changed > 0.1


@pytest.mark.parametrize("differential", [False, True])
def test_soft_masks(server: ComfyServer, differential: bool) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    picture = graph.ksampler(model=model, steps=1, seed=1)[0]
    mask = graph.add("FeatherMask", mask=left_half(graph), left=0, top=16, right=48, bottom=0)[0]
    latent = graph.add("SetLatentNoiseMask", samples=picture, mask=mask)[0]
    if differential:
        model = graph.add("DifferentialDiffusion", model=model)[0]
    assert_like_euler(server, graph, model=model, latent=latent, seed=2)


def test_areas_and_their_combination(server: ComfyServer) -> None:
    graph = Graph()
    area = {"width": 0.5, "height": 1.0, "y": 0.0, "strength": 1.0}
    left = graph.add("ConditioningSetAreaPercentage", conditioning=graph.condition(0)[0], x=0.0, **area)[0]
    right = graph.add("ConditioningSetAreaPercentage", conditioning=graph.condition(2)[0], x=0.5, **area)[0]
    both = graph.add("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
    masked = graph.add(
        "ConditioningSetMask",
        conditioning=graph.condition(3)[0],
        mask=left_half(graph),
        strength=0.7,
        set_cond_area="default",
    )[0]
    positive = graph.add("ConditioningCombine", conditioning_1=both, conditioning_2=masked)[0]
    assert_like_euler(server, graph, positive=positive, cfg=2.0, seed=3)


class Guided:
    """A UNet with classifier-free guidance, whose negative condition is that of seed 1."""

    def __init__(self, unet: UNet2DConditionModel, cfg: float) -> None:
        self._unet, self._cfg = unet, cfg

    def __call__(self, x: Tensor, t: int, context: Tensor) -> Any:
        cond, uncond = (self._unet(x, t, each.expand(len(x), -1, -1)).sample for each in (context, condition(1)))
        return SimpleNamespace(sample=uncond + self._cfg * (cond - uncond))


def test_guidance(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    positive, negative = graph.condition(0)[0], graph.condition(1)[0]
    guider = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)[0]
    nodes = [
        graph.ksampler(model=model, cfg=3.0, seed=4),
        graph.sampler_custom(model=model, cfg=3.0, seed=4),
        graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=4)[0],
            guider=guider,
            sampler=graph.add("TCDSampler", eta=0.3)[0],
            sigmas=graph.sigmas(model)[0],
            latent_image=graph.empty(),
        ),
    ]
    found = latents(server, graph, *(graph.save(node[0]) for node in nodes))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    expected = tcd_scheduler_sample(Guided(unet, 3.0), host_noise(4), timestep_grid(4), eta=0.3, seed=4)
    assert relative_error(found[0], expected) < TOLERANCE


class Controlled:
    """A UNet with a ControlNet for one image [1, 3, H, W] in [0, 1]."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: Any, picture: Tensor) -> None:
        self._unet, self._controlnet, self._picture = unet, controlnet, picture

    def __call__(self, x: Tensor, t: int, context: Tensor) -> Any:
        down, middle = self._controlnet(x, t, context, self._picture, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self._unet(x, t, context, **added)


def test_controlnet(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    controlnet, folder = mini_controlnet(unet), server.models / "controlnet"
    folder.mkdir(exist_ok=True)
    write_controlnet_mini(folder / "inputs.safetensors", unet, controlnet)
    graph = Graph()
    model = graph.checkpoint()[0]
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0)[0]
    loaded = graph.add("ControlNetLoader", control_net_name="inputs.safetensors")[0]

    def sample(strength: float) -> Node:
        options = {"strength": strength, "start_percent": 0.0, "end_percent": 1.0, "image": image}
        conds = {"positive": graph.condition(0)[0], "negative": graph.condition(1)[0]}
        controlled = graph.add("ControlNetApplyAdvanced", control_net=loaded, **conds, **options)
        return graph.ksampler(model=model, seed=5, positive=controlled[0], negative=controlled[1])

    nodes = [sample(1.0), sample(0.0), graph.ksampler(model=model, seed=5)]
    found, off, without = latents(server, graph, *(graph.save(node[0]) for node in nodes))
    assert torch.equal(off, without)
    assert relative_error(found, without) > 0.01
    picture = torch.tensor([0x40, 0x80, 0xC0]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 255
    network = Controlled(unet, controlnet, picture)
    expected = tcd_scheduler_sample(network, host_noise(5), timestep_grid(4), eta=0.3, seed=5)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_image_of_a_batch_can_be_sampled_alone(server: ComfyServer, dtype: str) -> None:
    graph = Graph()
    model = graph.add("TCDModelSettings", model=graph.checkpoint()[0], eta=1.0)[0]
    empty = graph.empty(4)
    batch = graph.add("TestCastLatent", samples=empty, dtype=dtype)[0]
    third = graph.add("LatentFromBatch", samples=batch, batch_index=2, length=1)[0]
    middle = graph.add("LatentFromBatch", samples=batch, batch_index=1, length=2)[0]
    last_two = graph.add("RepeatLatentBatch", samples=third, amount=2)[0]
    nodes = [graph.ksampler(model=model, steps=2, seed=9, latent=each) for each in (batch, third, middle, last_two)]
    whole, *parts = latents(server, graph, *(graph.save(node[0]) for node in nodes))
    for found, expected in zip(parts, (whole[2:3], whole[1:3], whole[2:4]), strict=True):
        assert relative_error(found, expected) < 1e-5
    assert relative_error(whole[2], whole[1]) > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_of_low_precision(server: ComfyServer, unet: UNet2DConditionModel, dtype: str) -> None:
    if host_version(server) < (0, 18, 1):
        pytest.skip("this ComfyUI draws noise in the latent's dtype, for which there is no reference here")
    graph = Graph()
    latent = graph.empty(2)
    cast = graph.add("TestCastLatent", samples=latent, dtype=dtype)[0]
    found = latents(server, graph, graph.save(graph.ksampler(latent=cast, steps=2, seed=9)[0]))[0]
    noise = host_noise(9, batch=2).to(getattr(torch, dtype)).float()  # the host rounds only the latents
    expected = tcd_scheduler_sample(unet, noise, timestep_grid(2), eta=0.3, seed=9)
    assert relative_error(found, expected) < TOLERANCE
