"""SDXL end to end: the trainer distills a base, and the host samples with the same files."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import MINI_SDXL
from diffusers import UNet2DConditionModel
from graphs import LATENT_SCALE, Graph, Node, relative_error, saved, shown_tensor
from safetensors import safe_open
from stand_ins import CLIP_G, CLIP_L, clip, open_clip, save_with_holes, vae
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trajectory_consistency.tcd import timestep_grid
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.sampling import initial_noise, sample_latents
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.models.unet.adapter import load_adapter
from trajectory_consistency.trainer.models.unet.network import Network
from trajectory_consistency.trainer.models.unet.teacher import load_base, load_encoders
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.tiny import world

pytestmark = pytest.mark.host

SEED, ETA = 7, 0.3
LORA = "mini-sdxl-tcd.safetensors"
WHOLE = "whole-sdxl.safetensors"
CAPTION = "a red circle left on a blue background"
SCALE = 0.13025 / LATENT_SCALE  # saved() treats every latent as one of SD 1.5
SIZES = torch.tensor([64.0, 64, 0, 0, 64, 64])  # original size, crop and target size


@pytest.fixture(scope="module")
def folder(mini_sdxl: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MINI_SDXL as a diffusers folder, with two-layer text encoders of SDXL's widths and a small VAE."""
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    mini_sdxl.save_pretrained(folder / "unet")
    torch.manual_seed(0)
    bases.empty_vae("tiny").save_pretrained(folder / "vae")
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        shallow = {"num_hidden_layers": 2, "intermediate_size": 64}
        kind(CLIPTextConfig(**bases.config("sdxl", part) | shallow)).half().save_pretrained(folder / part)
    return folder


@pytest.fixture(scope="module")
def lora(server: ComfyServer, folder: Path) -> Path:
    """A LoRA trained for two iterations on that base, also in the host's folder."""
    world.write_folder(folder.parent / "pictures", 2, seed=0)
    config = {
        "base": {"path": str(folder)},
        "data": {"folder": str(folder.parent / "pictures"), "resolution": 64},
        "adapter": {"rank": 4, "alpha": 2.0},
        "training": {"steps": 2, "batch": 1, "lr": 1e-3},
        "output": {"folder": str(folder.parent / "out")},
    }
    path = run(from_mapping(config))
    shutil.copyfile(path, server.models / "loras" / LORA)
    return path


def network(folder: Path, lora: Path) -> Network:
    base = load_base(str(folder))
    load_adapter(base.unet, lora)
    return Network(base.unet, base.alpha_bar.float(), base.prediction)


def draw(network: Network, cond: Conditioning) -> Tensor:
    """Sample with the trainer, conditioned on the sizes that the host passes: those of the picture."""
    sized = replace(cond, time_ids=SIZES[None])
    noise = initial_noise(SEED, (1, 4, 8, 8))
    return sample_latents(network, sized, timesteps=timestep_grid(4), gamma=ETA, noise=noise, seed=SEED)


def test_the_host_draws_with_an_sdxl_lora_what_the_trainer_draws(
    server: ComfyServer, mini_sdxl: UNet2DConditionModel, folder: Path, lora: Path
) -> None:
    before = len(server.log_text())
    graph = Graph()
    base = graph.checkpoint(MINI_SDXL)[0]
    stock = graph.add("LoraLoaderModelOnly", model=base, lora_name=LORA, strength_model=1.0)[0]
    loaded = graph.add("TCDLoraLoader", model=base, lora_name=LORA, strength_model=1.0)[0]
    condition = {name: graph.condition(0, width=2048, pooled=1280)[0] for name in ("positive", "negative")}
    saves = [
        graph.save(graph.sampler_custom(model=model, eta=ETA, seed=SEED, **condition)[0])
        for model in (base, stock, loaded)
    ]
    outputs = server.run(graph)
    without, by_stock_loader, with_lora = (saved(server, outputs, node) * SCALE for node in saves)
    log = server.log_text()[before:]
    assert "lora key not loaded" not in log and "NOT LOADED" not in log and "ERROR lora" not in log
    assert "applied in part" not in log

    generator = torch.Generator().manual_seed(0)  # as in TestConditioning
    context, pooled = torch.randn(1, 77, 2048, generator=generator), torch.randn(1, 1280, generator=generator)
    ours = draw(network(folder, lora), Conditioning(context, pooled))
    assert relative_error(with_lora, ours) <= 1e-3
    assert torch.equal(by_stock_loader, with_lora)
    assert relative_error(without, ours) > 1e-2, "the LoRA must have an effect, or the agreement proves nothing"
    with safe_open(lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def whole_checkpoint(path: Path, unet: UNet2DConditionModel) -> Path:
    """Write `unet` with a VAE and both full-size text encoders, in which only the two lowest layers are not zero."""
    torch.manual_seed(0)
    tensors = ldm.unet_to_ldm(unet.state_dict(), unet.config) | dict(vae(4))
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    small = {first + name: tensor for name, tensor in clip(CLIP_L).items() if name.startswith("text_model.")}
    tensors |= _lowest_layers(small, ".layers.")
    large = {second + name: tensor for name, tensor in open_clip(CLIP_G).items()}
    words = f"{second}token_embedding.weight"
    large[words] = torch.randn(large[words].shape)
    save_with_holes(tensors | _lowest_layers(large, ".resblocks."), path)
    return path


def _lowest_layers(tensors: Mapping[str, Tensor], layers: str) -> dict[str, Tensor]:
    """Fill the two lowest layers with noise small enough to keep the scale of the hidden states."""
    filled = dict(tensors)
    for name, tensor in tensors.items():
        if f"{layers}0." in name or f"{layers}1." in name:
            noise = torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5
            filled[name] = 1 + 0.1 * noise if tensor.ndim == 1 and name.endswith("weight") else noise
    return filled


@pytest.mark.slow
def test_the_hosts_text_encoders_agree_with_the_trainers(
    server: ComfyServer, mini_sdxl: UNet2DConditionModel, folder: Path, lora: Path, tmp_path: Path
) -> None:
    path = whole_checkpoint(server.models / "checkpoints" / WHOLE, mini_sdxl)
    try:
        graph = Graph()
        model, text, _ = (graph.checkpoint(WHOLE)[output] for output in (0, 1, 2))
        loaded = graph.add("TCDLoraLoader", model=model, lora_name=LORA, strength_model=1.0)[0]
        positive, negative = (graph.add("CLIPTextEncode", clip=text, text=words)[0] for words in (CAPTION, ""))
        latent = graph.sampler_custom(model=loaded, eta=ETA, seed=SEED, positive=positive, negative=negative)[0]
        nodes: list[Node] = [graph.show(positive), graph.show(negative), graph.save(latent)]
        outputs = server.run(graph)
        encoders = load_encoders(str(path))
    finally:
        path.unlink()
    ours = encoders.encode([CAPTION, ""])
    for row, node in enumerate(nodes[:2]):
        assert relative_error(shown_tensor(outputs, node), ours.context[row : row + 1]) < 1e-3
    assert relative_error(ours.context[:1], ours.context[1:]) > 0.1, "the captions must differ"
    drawn = draw(network(folder, lora), ours[:1])
    assert relative_error(saved(server, outputs, nodes[2]) * SCALE, drawn) <= 1e-3
    assert ours.pooled is not None
    other = draw(network(folder, lora), replace(ours[:1], pooled=ours.pooled[1:]))
    assert relative_error(other, drawn) > 2e-3, "the pooled state must matter, or the agreement proves nothing"
