"""Train the embedded tiny teacher on the shapes world: SD1.5's VAE, text encoder and UNet, scaled down.

    python -m trajectory_consistency.trainer.tiny.teach --out FILE
    python -m trajectory_consistency.trainer.tiny.teach --start FILE --seed 1 --lr 1e-3 --unet-steps 10000 --out FILE

The result is a single-file checkpoint with the same names as SD1.5's. `make teacher` runs both commands, in about 70
minutes on two CPU cores; the embedded one was made so.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel

from ...tcd import add_noise, scaled_linear_alpha_bar, vp_level
from ...tcd.randomness import generator
from ..models.unet import ldm
from ..models.unet.families import empty_text_encoder, empty_unet, empty_vae
from ..models.unet.prompt import read_prompt
from ..models.unet.single_file import SingleFile
from . import world

NUM_TIMESTEPS = 1000
CAPTION_DROPOUT = 0.1
VAE_BATCH, UNET_BATCH = 8, 64
KL_WEIGHT = 1e-4
INITIAL_LOG_VARIANCE = -6.0
SHAPE_WEIGHT = 6.0  # weight of the shape's pixels in the VAE's loss, relative to the background
FARTHEST_LINE = 0.72  # largest difference, in [-1, 1], between a background's color and that of its lines
EDGE_WEIGHT = 1.0  # of the differences between neighboring pixels in the VAE's loss
LAYOUT_FROM = 700  # from this timestep on, the caption decides which shape is where


def pictures(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Draw `count` random scenes; return pictures, uint8 [count, 3, H, W], and captions."""
    scenes, rng = world.random_scenes(count, seed), random.Random(seed)
    captions = [world.random_prompt(scene, rng).caption for scene in scenes]
    return world.draw_pictures(scenes, rng), captions


def to_signal(images: Tensor) -> Tensor:
    """Convert pictures, uint8 [B, 3, H, W], to float32 in [-1, 1], the VAE's range."""
    return images.float() / 127.5 - 1


def _steps(count: int, label: str, optimizer: torch.optim.Optimizer, peak_lr: float) -> Iterator[int]:
    """Yield step numbers, with a progress bar and a one-cycle learning rate."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=count + 1, pct_start=0.05)
    for step in tqdm(range(count), desc=label, mininterval=5):
        yield step
        schedule.step()


def train_vae(vae: AutoencoderKL, images: Tensor, *, steps: int, generator: torch.Generator) -> None:
    """Train a VAE on pictures, uint8 [N, 3, H, W], with L1 + L2 + KL; then scale its latents to unit variance."""
    with torch.no_grad():  # start with a narrow posterior: one as wide as the prior would hide the signal in noise
        vae.quant_conv.bias[vae.config.latent_channels :] = INITIAL_LOG_VARIANCE
        vae.quant_conv.weight[vae.config.latent_channels :] = 0
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for step in _steps(steps, "vae", optimizer, 1e-3):
        x = to_signal(images[torch.randint(len(images), (VAE_BATCH,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(latents).sample - x
        # Errors of differences between neighbors count as well: edges and fine lines are few pixels.
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        # Weight the shape, which is a tenth of the picture. No color of a background is that far from the median color.
        away = (x - x.flatten(2).median(2).values[:, :, None, None]).abs().amax(1, keepdim=True)
        weight = torch.where(away > FARTHEST_LINE, SHAPE_WEIGHT, 1.0)
        distance = (weight * (error.abs() + error.square())).mean() / weight.mean() + EDGE_WEIGHT * edges
        loss = distance + KL_WEIGHT * posterior.kl().mean() / latents[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            tqdm.write(f"vae {step}: L1 + L2 + edges {distance.item():.4f}")
    _scale_latents(vae, images[:1024])


@torch.no_grad()
def _scale_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Scale the VAE's weights so that its latents times `scaling_factor` have standard deviation 1."""
    std = torch.cat([vae.encode(to_signal(part)).latent_dist.mean for part in images.split(64)]).std()
    factor = 1.0 / (vae.config.scaling_factor * std)
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] *= factor
    vae.quant_conv.bias[channels:] += 2 * factor.log()
    vae.post_quant_conv.weight /= factor


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode pictures, uint8 [B, 3, H, W], to normalized latents [B, 4, h, w]."""
    parts = [vae.encode(to_signal(part)).latent_dist.mean for part in tqdm(images.split(64), desc="latents")]
    return torch.cat(parts) * vae.config.scaling_factor


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    latents: Tensor,
    captions: list[str],
    *,
    steps: int,
    peak_lr: float,
    generator: torch.Generator,
    save: Callable[[UNet2DConditionModel, CLIPTextModel], None],
) -> None:
    """Train UNet and text encoder together to predict eps; pass the moving averages of both to `save` regularly."""
    models = nn.ModuleList([unet, text_encoder])
    average = torch.optim.swa_utils.AveragedModel(
        models, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.AdamW(models.parameters(), lr=1e-3, weight_decay=1e-3)
    alpha_bar = scaled_linear_alpha_bar(NUM_TIMESTEPS).float()
    ids, empty = (torch.cat([read_prompt(text).ids for text in texts]) for texts in (captions, [""]))
    for step in _steps(steps, "unet", optimizer, peak_lr):
        picked = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        dropped = torch.rand(UNET_BATCH, generator=generator) < CAPTION_DROPOUT
        timesteps = _draw_timesteps(UNET_BATCH, generator)
        eps = torch.randn(latents[picked].shape, generator=generator)
        x_t = add_noise(latents[picked], eps, vp_level(rearrange(alpha_bar[timesteps], "b -> b 1 1 1")))
        context = text_encoder(torch.where(dropped[:, None], empty, ids[picked])).last_hidden_state
        error = (unet(x_t, timesteps, context).sample - eps).square().mean(dim=(1, 2, 3))
        loss = (error / alpha_bar[timesteps]).mean()  # equals the squared error of v
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(models)
        if step % 1000 == 0:
            tqdm.write(f"unet {step}: loss {loss.item():.4f}")
            save(*cast("nn.ModuleList", average.module))
    save(*cast("nn.ModuleList", average.module))


def _draw_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps [batch]: half uniformly from LAYOUT_FROM on, the others uniformly from all.

    If all were drawn uniformly, the model would learn the words for shapes and places slowly: they matter only at high
    noise levels.
    """
    timesteps = torch.randint(NUM_TIMESTEPS, (batch,), generator=generator)
    timesteps[: batch // 2] = torch.randint(LAYOUT_FROM, NUM_TIMESTEPS, (batch // 2,), generator=generator)
    return timesteps


def write_checkpoint(path: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> None:
    """Write the three models as one float16 single-file checkpoint, with the prediction type (eps) in its metadata."""
    state = ldm.unet_to_ldm(unet.state_dict(), unet.config)
    state |= ldm.vae_to_ldm(vae.state_dict(), vae.config)
    state |= ldm.text_to_ldm(text_encoder.state_dict())
    tensors = {key: value.half().contiguous() for key, value in state.items()}
    save_file(tensors, path, metadata={"modelspec.prediction_type": "epsilon"})


def main() -> None:
    """Train the three models and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--unet-steps", type=int, default=14000)
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate of the UNet")
    parser.add_argument("--start", type=Path, help="continue from this checkpoint, and keep its VAE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    unet, vae, text_encoder = empty_unet("tiny"), empty_vae("tiny"), empty_text_encoder("tiny")
    images, captions = pictures(options.pictures, options.seed)
    if options.start:
        file = SingleFile(options.start)
        unet, vae, text_encoder = file.unet(torch.float32), file.vae("tiny"), file.text_encoder()[0]
    else:
        train_vae(vae, images, steps=options.vae_steps, generator=generator(options.seed, "vae"))
    latents = encode_pictures(vae.eval(), images)
    train_unet(
        unet,
        text_encoder,
        latents,
        captions,
        steps=options.unet_steps,
        peak_lr=options.lr,
        generator=generator(options.seed, "unet"),
        save=lambda unet, text_encoder: write_checkpoint(options.out, unet, vae, text_encoder),
    )


if __name__ == "__main__":
    main()
