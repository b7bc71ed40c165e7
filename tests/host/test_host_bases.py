"""SDXL end to end: the trainer distills a base, and the host samples with the same files."""

import shutil
from collections.abc import Iterator, Mapping
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

from plain_method import PLAIN
from small_bases import use_unet
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.tcd.distill.sampling import initial_noise, sample_latents
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.tiny import world

pytestmark = pytest.mark.host

SEED, ETA = 7, 0.3
LORA = "mini-sdxl-tcd.safetensors"
WHOLE = "whole-sdxl.safetensors"
CAPTION = "a red circle left on a blue background"
SCALE = 0.13025 / LATENT_SCALE  # saved() treats every latent as one of SD 1.5
CPU = torch.device("cpu")
SIZES = torch.tensor([64.0, 64, 0, 0, 64, 64])  # original size, crop and target size


@pytest.fixture(scope="module")
def folder(mini_sdxl: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MINI_SDXL as a diffusers folder, with two-layer text encoders of SDXL's widths and a small VAE."""
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    mini_sdxl.save_pretrained(folder / "unet")
    torch.manual_seed(0)
    bases.empty_vae("tiny").save_pretrained(folder / "vae")
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        shallow = {"num_hidden_layers": 2, "intermediate_size": 64}
        kind(CLIPTextConfig(**bases.config("sdxl", part) | shallow)).half().save_pretrained(folder / part)
    with pytest.MonkeyPatch.context() as patch:
        use_unet(patch, "sdxl", mini_sdxl, folder.parent / "families")
        yield folder


@pytest.fixture(scope="module")
def lora(server: ComfyServer, folder: Path) -> Path:
    """A LoRA trained for two iterations on that base, also in the host's folder."""
    world.write_folder(folder.parent / "pictures", 2, seed=0)
    config = {
        "base": {"path": str(folder)},
        "data": {"folder": str(folder.parent / "pictures"), "resolution": 64},
        "method": PLAIN,  # the host's own loader takes it whole
        "adapter": {"rank": 4, "alpha": 2.0},
        "training": {"steps": 2, "batch": 1, "lr": 1e-3},
        "output": {"folder": str(folder.parent / "out")},
    }
    path = run(from_mapping(config))
    shutil.copyfile(path, server.models / "loras" / LORA)
    return path


def network(folder: Path, lora: Path) -> UNetModel:
    net = UNetCheckpoint(BaseConfig(path=str(folder))).load(torch.float32, CPU)
    net.adapter.add(FILE, load_weights(net, lora))
    return net


def draw(net: UNetModel, cond: Conditioning) -> Tensor:
    """Sample with the trainer, conditioned on the sizes that the host passes: those of the picture."""
    sized = Conditioning({**cond.tensors, "time_ids": SIZES[None]})
    noise = initial_noise(SEED, (1, 4, 8, 8))
    return sample_latents(net, sized, sigmas=net.schedule.sigmas_for(4), gamma=ETA, noise=noise, seed=SEED)


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
    ours = draw(network(folder, lora), Conditioning.of(context=context, pooled=pooled))
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
        encoder = UNetCheckpoint(BaseConfig(path=str(path))).load_text_encoder(CPU)
    finally:
        path.unlink()
    ours, empty = encoder.encode([CAPTION, ""])
    context, of_empty = (cond.tensors["context"] for cond in (ours, empty))
    for node, expected in zip(nodes, (context, of_empty), strict=False):
        assert relative_error(shown_tensor(outputs, node), expected) < 1e-3
    assert relative_error(context, of_empty) > 0.1, "captions must differ for this to mean something"
    drawn = draw(network(folder, lora), ours)
    assert relative_error(saved(server, outputs, nodes[2]) * SCALE, drawn) <= 1e-3
    other = draw(network(folder, lora), Conditioning.of(context=context, pooled=empty.tensors["pooled"]))
    assert relative_error(other, drawn) > 2e-3, "the pooled state must matter for the agreement to mean something"
