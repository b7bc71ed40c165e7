"""What seam.py promises the trainer, of every engine: UNets, by the embedded model, and the flow of fake_flow.py."""

import random
from pathlib import Path

import pytest
import torch

from fake_flow import FlowCheckpoint, write_flow_base
from trajectory_consistency.tcd import kohya_name
from trajectory_consistency.tcd.adapter import STUDENT, layer_shapes
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.models.fingerprint import fingerprint
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.seam import Checkpoint
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.tiny import world

CPU, META, FLOAT = torch.device("cpu"), torch.device("meta"), torch.float32
SCENES = [scene for scene in world.random_scenes(200, seed=0) if scene.pattern == "plain"][:32]
"""Without patterns, because the autoencoder of the flow model keeps no fine detail."""


@pytest.fixture(params=["unet", "flow"], scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    if request.param == "unet":
        return UNetCheckpoint(BaseConfig(path="tiny"))
    path: Path = tmp_path_factory.mktemp("base") / "base.flow"
    return FlowCheckpoint(BaseConfig(path=str(write_flow_base(path))))


def test_latents_are_of_the_format_and_normalized(checkpoint: Checkpoint) -> None:
    """Normalized is that the latents of many pictures have about mean 0 and variance 1: unlike those of the VAE."""
    pictures = world.draw_pictures(SCENES, random.Random(0))
    autoencoder = checkpoint.load_autoencoder(CPU)
    encoded = autoencoder.encode(pictures)
    assert encoded.mean.shape == (32, *checkpoint.latents.shape(64, 64)) and encoded.mean.dtype == FLOAT
    assert encoded.std is None or (encoded.std.shape == encoded.mean.shape and (encoded.std > 0).all())
    assert abs(encoded.mean.mean().item()) < 0.3 and 0.7 < encoded.mean.square().mean().sqrt().item() < 1.4
    decoded = autoencoder.decode(encoded.mean)
    frames = decoded.shape[3] // 64
    assert decoded.shape == (32, 3, 64, frames * 64) and decoded.dtype == torch.uint8
    error = (decoded[..., :64].float() - pictures.float()).abs().mean().item()
    assert error < 15, "decoding undoes the normalization"


@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_w_is_a_scale_of_each_row(checkpoint: Checkpoint) -> None:
    model = checkpoint.load(FLOAT, CPU)
    *rows, empty = checkpoint.load_text_encoder(CPU).encode([*(scene.caption for scene in SCENES[:3]), ""])
    cond, uncond = (
        checkpoint.collate(rows, Framing.whole(64, 64, 3)),
        checkpoint.collate([empty], Framing.whole(64, 64)),
    )
    x = torch.randn((3, *model.latents.shape(64, 64)), generator=torch.Generator().manual_seed(0))
    t, s = (model.schedule.point(torch.full((3,), time), x.ndim) for time in (700, 300))
    base, ones = model.x0(x, t, cond), torch.ones(3)
    assert base.shape == x.shape and base.dtype == FLOAT
    torch.testing.assert_close(model.guided_x0(x, t, cond, uncond, ones), base, rtol=1e-4, atol=1e-4)
    guided = model.guided_x0(x, t, cond, uncond, torch.tensor([1.0, 5.0, 1.0]))
    torch.testing.assert_close(guided[::2], base[::2], rtol=1e-4, atol=1e-4)
    assert (guided[1] - base[1]).abs().max() > 1e-3
    weights = model.new_weights(rank=2, alpha=2.0, seed=0, targets=["all"], target_input="s")
    model.adapter.add(STUDENT, weights)
    assert torch.equal(model.x0(x, t, cond, s), base) and weights.paths == tuple(model.layers(["all"]))


def test_every_layer_has_a_name_of_its_own(checkpoint: Checkpoint) -> None:
    model = checkpoint.load(FLOAT, META)
    names = {kohya_name(model.lora_key(layer)) for layer in layer_shapes(model.network)}
    assert len(names) == len(layer_shapes(model.network))
    assert all(model.layers([model.layer_kind(layer)]).count(layer) == 1 for layer in model.layers(["all"]))


def test_the_model_that_is_loaded_has_the_clock_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    times = torch.tensor([0, 20, 999])
    one, other = (each.schedule.point(times) for each in (checkpoint, checkpoint.load(FLOAT, CPU)))
    assert torch.equal(one.network_time, other.network_time)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one.level, other.level, strict=True))


def test_the_fingerprint_of_the_base_is_that_of_its_content(checkpoint: Checkpoint) -> None:
    assert checkpoint.fingerprints().base == fingerprint(checkpoint.path)
