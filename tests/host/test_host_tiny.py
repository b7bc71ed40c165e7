"""The demo's pack in the host: its tiny model family agrees with diffusers and transformers."""

from typing import NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from graphs import Graph, host_noise, relative_error, saved, shown_tensor
from reference import tcd_scheduler_sample
from safetensors.torch import save_file
from transformers import CLIPTextModel

from trajectory_consistency.tcd import timestep_grid
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.models.unet.text import TextEncoder

pytestmark = pytest.mark.host

CAPTION = "a red circle left on a blue background"
CHECKPOINT = "tiny.safetensors"


class Tiny(NamedTuple):
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


@pytest.fixture(scope="module")
def tiny(server: ComfyServer) -> Tiny:
    """A tiny model with random weights, also written as a float16 checkpoint for the server."""
    torch.manual_seed(0)
    tiny = Tiny(bases.empty_unet("tiny"), bases.empty_vae("tiny"), bases.empty_text_encoder("tiny"))
    for model in tiny:
        model.eval().requires_grad_(False).half().float()  # rounded to float16, so that writing loses nothing
    tensors = ldm.unet_to_ldm(tiny.unet.state_dict(), tiny.unet.config)
    tensors |= ldm.vae_to_ldm(tiny.vae.state_dict(), tiny.vae.config)
    tensors |= ldm.text_to_ldm(tiny.text_encoder.state_dict())
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in halves.items()}, server.models / "checkpoints" / CHECKPOINT
    )
    return tiny


def test_text_to_picture(server: ComfyServer, tiny: Tiny) -> None:
    graph = Graph()
    model, clip, _ = (graph.checkpoint(CHECKPOINT)[output] for output in (0, 1, 2))
    text = graph.add("CLIPTextEncode", clip=clip, text=CAPTION)[0]
    latent = graph.sampler_custom(model=model, positive=text, negative=text, seed=2)[0]
    vae = graph.add("TinyShapesVAE", ckpt_name=CHECKPOINT)[0]
    picture = graph.add("VAEDecode", samples=latent, vae=vae)[0]
    nodes = graph.show(text), graph.save(latent), graph.show(picture)
    outputs = server.run(graph)

    (cond,) = TextEncoder("tiny", [tiny.text_encoder]).encode([CAPTION])
    embedding = cond.tensors["context"]
    assert relative_error(shown_tensor(outputs, nodes[0]), embedding) < 1e-4

    expected = tcd_scheduler_sample(tiny.unet, host_noise(2), timestep_grid(4), eta=0.3, seed=2, context=embedding)
    found = saved(server, outputs, nodes[1])
    assert relative_error(found, expected) < 1e-4

    pixels = tiny.vae.decode(found / tiny.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    assert relative_error(shown_tensor(outputs, nodes[2])[0], (pixels / 2 + 0.5).clamp(0, 1)) < 1e-4


def test_the_caption_matters(server: ComfyServer, tiny: Tiny) -> None:
    def latent_of(caption: str) -> torch.Tensor:
        (cond,) = TextEncoder("tiny", [tiny.text_encoder]).encode([caption])
        context = cond.tensors["context"]
        return tcd_scheduler_sample(tiny.unet, host_noise(2), timestep_grid(4), eta=0.3, seed=2, context=context)

    # Otherwise test_text_to_picture would prove nothing.
    assert relative_error(latent_of("a green square"), latent_of(CAPTION)) > 1e-3


def test_stock_checkpoints_still_load(server: ComfyServer) -> None:
    graph = Graph()
    show = graph.show(graph.sigmas(graph.checkpoint()[0])[0])
    before = len(server.log_text())
    assert len(server.run(graph)[show.id]["values"]) == 5
    assert "Error" not in server.log_text()[before:]
