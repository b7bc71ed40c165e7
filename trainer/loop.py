"""The training loop.

Flows in: a network with an adapter on it, and a dataset.  Flows out: the adapter, trained, in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainer.adapter import adapters_off
from trainer.config import Config
from trainer.data import Dataset
from trainer.network import Network
from trainer.objective import tcd_loss
from trainer.randomness import generator
from trainer.times import Times, sample_times


class NonFiniteError(RuntimeError):
    """The loss or its gradient became NaN or infinite, and training stopped before it reached the weights."""


def train(network: Network, parameters: Sequence[nn.Parameter], dataset: Dataset, config: Config) -> list[float]:
    """Train `parameters` for `config.training.steps` steps and return the loss of each.

    Raises NonFiniteError before a non-finite gradient would be applied.
    """
    training = config.training
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, training.steps, training.warmup_steps)
    )
    losses = []
    bar = tqdm(total=training.steps * training.batch, desc="distilling", unit="img", unit_scale=True)
    for step in range(training.steps):
        loss = step_loss(network, dataset, config, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, training.clip)
        if not math.isfinite(norm.item()):
            raise NonFiniteError(
                f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; try a smaller training.lr"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.step()
        losses.append(loss.item())
        bar.update(training.batch)
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
    bar.close()
    return losses


def step_loss(network: Network, dataset: Dataset, config: Config, step: int) -> Tensor:
    """The loss of one step: everything random in it is a function of (seed, step)."""
    method, seed, size = config.method, config.training.seed, config.training.batch
    device = network.alpha_bar.device
    batch = dataset.batch(step, size, seed=seed, caption_dropout=config.data.caption_dropout)
    draw = generator(seed, "loss", step)
    times = sample_times(size, law=method.law, origin_steps=method.origin_steps, skip=method.skip, generator=draw)
    eps = torch.randn(batch.latents.shape, generator=draw).to(device)
    low, high = method.guidance_min, method.guidance_max
    guidance = (low + (high - low) * torch.rand(size, generator=draw)).to(device)
    context, uncond = batch.context.to(device), dataset.uncond.to(device)

    def student(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        return network.x0(x_t, timesteps, context[rows])

    def teacher(x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        with adapters_off(network.unet):
            return network.guided_x0(x_t, timesteps, context[rows], uncond, guidance[rows])

    return tcd_loss(
        student,
        teacher,
        batch.latents.to(device),
        eps,
        Times(*(time.to(device) for time in times)),
        level=network.level,
        huber_c=method.huber_c,
    )


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate at a step as a share of its peak: linear warm-up, then a cosine that ends at zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
