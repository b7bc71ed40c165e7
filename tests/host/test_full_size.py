"""The main use case at full size: train on an SD1.5 file from the command line, and sample in the host.

The weights are random, so the pictures mean nothing, but names, shapes and dtypes are those of the real model.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from full_size import full_size_sd15
from graphs import Graph, host_noise, latents, relative_error
from PIL import Image
from reference import tcd_scheduler_sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from trajectory_consistency.tcd import TargetTime, timestep_grid
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.tcd.distill.sampling import initial_noise, sample_latents
from trajectory_consistency.tcd.target_time import PREFIX
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.tiny import world

pytestmark = [pytest.mark.host, pytest.mark.slow]

CHECKPOINT, LORA = "sd15-random.safetensors", "sd15-tcd.safetensors"
CAPTION = "a red circle left on a blue background"
CPU = torch.device("cpu")
SEED, ETA = 7, 0.3


@pytest.fixture(scope="module")
def checkpoint(server: ComfyServer) -> Path:
    """The checkpoint, also in the host's folder."""
    file = full_size_sd15()
    _lend(file, server.models / "checkpoints" / CHECKPOINT)
    return file


@pytest.fixture(scope="module")
def lora(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA trained from the command line, for two iterations at 128 px on eight captioned pictures."""
    folder = tmp_path_factory.mktemp("full-size")
    world.write_folder(folder / "pictures", 8, seed=0)
    (folder / "run.toml").write_text(
        f"""
        [base]
        path = "{checkpoint.as_posix()}"
        [data]
        folder = "{(folder / "pictures").as_posix()}"
        resolution = 128
        [method]  # of a plain LoRA, which the host's own loader takes whole
        target_time = false
        diagonal = 0
        to_clean = 0
        [training]
        steps = 2
        batch = 2
        lr = 1e-3
        [output]
        folder = "{(folder / "out").as_posix()}"
        """,
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "trajectory_consistency.trainer", "run", str(folder / "run.toml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out" / "tcd-lora.safetensors"


def test_a_full_size_lora_has_all_its_tensors(lora: Path) -> None:
    with safe_open(lora, "pt") as file:
        names = list(file.keys())
        metadata = file.metadata()
    halves = [name for name in names if name.endswith(".weight")]
    assert len(halves) == 556 and len(names) == 556 + 278
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora" and len(metadata["ss_sd_model_hash"]) == 8


def test_the_host_draws_what_the_trainer_draws(server: ComfyServer, checkpoint: Path, lora: Path) -> None:
    shutil.copyfile(lora, server.models / "loras" / LORA)
    before = len(server.log_text())
    graph = Graph()
    base = graph.checkpoint(CHECKPOINT)
    stock = graph.add("LoraLoaderModelOnly", model=base[0], lora_name=LORA, strength_model=1.0)
    loaded = graph.add("TCDLoraLoader", model=base[0], lora_name=LORA, strength_model=1.0)
    saves = []
    for model in (base[0], stock[0], loaded[0]):
        done = graph.sampler_custom(
            model=model,
            eta=ETA,
            seed=SEED,
            positive=graph.add("CLIPTextEncode", clip=base[1], text=CAPTION)[0],
            negative=graph.add("CLIPTextEncode", clip=base[1], text="")[0],
            latent=graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)[0],
        )
        saves.append(graph.save(done[0]))
    decoded = graph.add("VAEDecode", samples=done[0], vae=base[2])
    graph.add("SaveImage", images=decoded[0], filename_prefix="full-size")
    without, by_stock_loader, with_lora = latents(server, graph, *saves)
    log = server.log_text()[before:]
    assert "lora key not loaded" not in log and "NOT LOADED" not in log and "ERROR lora" not in log
    assert "loaded completely" in log or "Prompt executed" in log, "the log must be the host's"
    with Image.open(next(server.output.rglob("full-size*.png"))) as image:
        assert image.size == (128, 128) and np.asarray(image).std() > 1

    (ours,) = draw(checkpoint, lora)
    assert relative_error(with_lora, ours) <= 1e-3
    assert torch.equal(by_stock_loader, with_lora)
    assert relative_error(without, ours) > 1e-2, "the LoRA must have an effect, or the agreement proves nothing"


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_it_agrees_with_diffusers(server: ComfyServer, checkpoint: Path, prediction: str) -> None:
    graph = Graph()
    base = graph.checkpoint(CHECKPOINT)
    sampling = graph.add("ModelSamplingDiscrete", model=base[0], sampling=prediction, zsnr=False)
    done = [graph.sampler_custom(model=sampling[0], eta=eta, seed=SEED) for eta in (0.0, ETA, 1.0)]
    found = latents(server, graph, *(graph.save(node[0]) for node in done))

    unet = UNetCheckpoint(BaseConfig(path=str(checkpoint))).load(torch.float32, CPU).network
    name = {"eps": "epsilon"}.get(prediction, prediction)
    for latent, eta in zip(found, (0.0, ETA, 1.0), strict=True):
        ours = tcd_scheduler_sample(unet, host_noise(SEED), timestep_grid(4), eta=eta, seed=SEED, prediction=name)
        assert relative_error(latent, ours) <= 1e-5


def test_with_a_target_time_embedding_the_host_draws_what_the_trainer_draws(
    server: ComfyServer, checkpoint: Path, lora: Path
) -> None:
    torch.manual_seed(0)
    embedding = TargetTime(320, 1280)
    nn.init.normal_(embedding["out"].weight, std=0.05)
    tensors = {f"{PREFIX}{name}": tensor.detach().half() for name, tensor in embedding.state_dict().items()}
    embedded = server.models / "loras" / "sd15-target-time.safetensors"
    save_file(load_file(lora) | tensors, embedded, metadata={"tcd.target_time": "s"})

    graph = Graph()
    base = graph.checkpoint(CHECKPOINT)
    model = graph.add("TCDLoraLoader", model=base[0], lora_name=embedded.name, strength_model=1.0)[0]
    grid = [(steps, eta) for steps in (1, 2, 4) for eta in (0.0, ETA, 1.0)]
    done = [
        graph.sampler_custom(
            model=model,
            eta=eta,
            sigmas=graph.sigmas(model, steps=steps)[0],
            seed=SEED,
            positive=graph.add("CLIPTextEncode", clip=base[1], text=CAPTION)[0],
            latent=graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)[0],
        )
        for steps, eta in grid
    ]
    found = latents(server, graph, *(graph.save(node[0]) for node in done))
    for latent, (steps, eta), ours, without in zip(
        found, grid, draw(checkpoint, embedded, grid), draw(checkpoint, lora, grid), strict=True
    ):
        assert relative_error(latent, ours) <= 1e-3, (steps, eta)
        assert relative_error(without, ours) > 1e-2, "the embedding must matter"


def draw(checkpoint: Path, lora: Path, grid: Sequence[tuple[int, float]] = ((4, ETA),)) -> list[torch.Tensor]:
    """Sample with the trainer from the same files and seed; returns scaled latents [1, 4, 16, 16]."""
    base = UNetCheckpoint(BaseConfig(path=str(checkpoint)))
    model = base.load(torch.float32, CPU)
    model.adapter.add(FILE, load_weights(model, lora))
    (cond,) = base.load_text_encoder(CPU).encode([CAPTION])
    noise = initial_noise(SEED, (1, 4, 16, 16))
    return [
        sample_latents(model, cond, sigmas=model.schedule.sigmas_for(steps), gamma=eta, noise=noise, seed=SEED)
        for steps, eta in grid
    ]


def _lend(file: Path, place: Path) -> None:
    try:
        place.symlink_to(file)
    except OSError:  # on Windows, only administrators and developers can create links
        shutil.copyfile(file, place)
