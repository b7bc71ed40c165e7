"""The VAE behind the seam: bytes in and out, and latents as the UNet wants them."""

from types import SimpleNamespace

import pytest
import torch

from tiny_base import write_base
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.models.unet.autoencoder import Vae
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint

SCALE = 0.18215


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Vae:
    path = write_base(tmp_path_factory.mktemp("base") / "base.safetensors")
    return UNetCheckpoint(BaseConfig(path=str(path))).load_autoencoder(torch.device("cpu"))


def test_the_signal_is_from_minus_one_to_one() -> None:
    class Identity:
        config = SimpleNamespace(scaling_factor=2.0)

        def encode(self, signal: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=signal, std=0 * signal + 3))

        def decode(self, latents: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=latents)

    vae = Vae(Identity())  # type: ignore[arg-type]
    encoded = vae.encode(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    assert encoded.mean.flatten().tolist() == [-2.0, 2.0], "both are normalized by the factor"
    assert encoded.std is not None and encoded.std.flatten().tolist() == [6.0, 6.0]
    decoded = vae.decode(torch.tensor([[[[-2.0, 0.004, 2.0, -9.0, 9.0]]]]))
    assert decoded.dtype == torch.uint8 and decoded.flatten().tolist() == [0, 128, 255, 0, 255]


def test_latents_are_those_of_diffusers_normalized(vae: Vae) -> None:
    pixels = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    encoded = vae.encode(pixels)
    with torch.no_grad():
        posterior = vae.vae.encode(pixels / 127.5 - 1).latent_dist
    assert encoded.std is not None and encoded.mean.shape == encoded.std.shape == (2, 4, 8, 8)
    torch.testing.assert_close(encoded.mean, SCALE * posterior.mean)
    torch.testing.assert_close(encoded.std, SCALE * posterior.std)


def test_many_latents_are_decoded_to_what_each_is_alone(vae: Vae) -> None:
    latents = torch.randn((19, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    together, alone = vae.decode(latents), torch.cat([vae.decode(latent[None]) for latent in latents])
    assert together.shape == (19, 3, 64, 64) and (together.int() - alone.int()).abs().max() <= 1
