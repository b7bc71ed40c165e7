"""One process of tests/bench/training_step.py: a loop that trains a full-size SD 1.5, a step for each line.

Arguments: ours or separate, the checkpoint, side in pixels, batch, rank, device, dtype. Prints JSON lines: for "step"
the seconds it took, for "end" the peak of memory since the first step, in bytes.

`separate` is the order of work of diffusers' train_lcm_distill_lora_sd_wds.py: each step encodes its pictures with the
VAE and its captions with the text encoder, the student is called first and keeps its activations while a second UNet,
the teacher, is called with the caption and without, one after the other, and then the student once more for the target.
The sums between these calls are ours in both, and so are UNet, adapter, optimizer, pictures, size and dtype.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from trajectory_consistency.tcd import add_noise, jump
from trajectory_consistency.tcd.objective import huber
from trajectory_consistency.trainer.config import settings as configuration
from trajectory_consistency.trainer.data.dataset import Batch
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet.adapter import add_adapter
from trajectory_consistency.trainer.models.unet.network import Network
from trajectory_consistency.trainer.models.unet.teacher import load_base, load_encoders
from trajectory_consistency.trainer.training.loop import Training
from trajectory_consistency.trainer.training.step import draw

CAPTIONS = (
    "a lighthouse on a cliff above a calm sea",
    "a red fox in the snow",
    "an old street at night",
    "a bowl of figs",
)


class Pictures:
    """A data set of one batch, whose latents and captions were encoded before."""

    def __init__(self, latents: Tensor, cond: Conditioning, uncond: Conditioning) -> None:
        self._batch = Batch(latents, cond, uncond)

    def __len__(self) -> int:
        return len(self._batch.latents)

    def batch(self, step: int, size: int, part: slice = slice(None), *, seed: int, caption_dropout: float) -> Batch:
        latents, cond, uncond = self._batch
        return Batch(latents[part], cond[part], uncond[part])


class Ours:
    """The trainer's own loop, after the VAE and the text encoder were let go."""

    def __init__(self, config: configuration.Config, device: torch.device, dtype: torch.dtype) -> None:
        encoders = load_encoders(config.base.path, dtype=dtype).to(device)
        size, side = config.training.batch, config.data.resolution
        with torch.no_grad():
            latents = encoders.vae.encode(pixels(size, side).to(device)).latent_dist.sample()
        latents = latents * encoders.vae.config.scaling_factor
        data = Pictures(latents.float(), encoders.encode(captions(size)), encoders.encode([""] * size))
        del encoders
        base = load_base(config.base.path, dtype=dtype)
        network = Network(base.unet.to(device), base.alpha_bar.float().to(device), base.prediction)
        self._training = Training(network, adapted(network, config), data, config)

    def step(self) -> None:
        self._training.train_step()


class Separate:
    """Everything in every step, with a UNet for the teacher and another one for the student."""

    def __init__(self, config: configuration.Config, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device = config, device
        self.encoders = load_encoders(config.base.path, dtype=dtype).to(device)
        bases = [load_base(config.base.path, dtype=dtype) for _ in range(2)]
        alpha_bar = bases[0].alpha_bar.float().to(device)
        self.student, self.teacher = (Network(base.unet.to(device), alpha_bar, base.prediction) for base in bases)
        self.parameters = adapted(self.student, config)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.training.lr)
        self.uncond = self.encoders.encode([""]).to(device)
        self.done = 0

    def step(self) -> None:
        size, side = self.config.training.batch, self.config.data.resolution
        vae, student, teacher = self.encoders.vae, self.student, self.teacher
        with torch.no_grad():
            latents = vae.encode(pixels(size, side).to(self.device)).latent_dist.sample() * vae.config.scaling_factor
        cond, uncond = self.encoders.encode(captions(size)).to(self.device), self.uncond.expand(size)
        draws = draw(self.config, self.done, latents.shape[1:])
        t, t_next, s = (time.to(self.device) for time in draws.times[:3])
        w = draws.guidance.to(self.device).view(-1, 1, 1, 1)
        level, level_next, level_s = (student.level(each) for each in (t, t_next, s))
        x_t = add_noise(latents, draws.eps.to(self.device), level)
        predicted = jump(x_t, student.x0(x_t, t, cond), level, level_s)
        with torch.no_grad():
            conditional, free = teacher.x0(x_t, t, cond), teacher.x0(x_t, t, uncond)
            x_next = jump(x_t, free + w * (conditional - free), level, level_next)
            target = jump(x_next, student.x0(x_next, t_next, cond), level_next, level_s)
        huber(predicted, target, c=self.config.method.huber_c).mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1


def adapted(network: Network, config: configuration.Config) -> list[nn.Parameter]:
    adapter = config.adapter
    return add_adapter(network.unet, rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=adapter.targets)


def pixels(size: int, side: int) -> Tensor:
    return torch.rand(size, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def captions(size: int) -> list[str]:
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(size)]


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is there now


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    kind, checkpoint, side, batch, rank, device_name, dtype = sys.argv[1:]
    config = configuration.from_mapping(
        {
            "base": {"path": checkpoint},
            "data": {"folder": ".", "resolution": int(side)},
            "adapter": {"rank": int(rank), "alpha": float(rank)},
            "training": {"batch": int(batch), "device": device_name},
            "output": {"folder": "."},
        }
    )
    device = torch.device(device_name)
    loop = {"ours": Ours, "separate": Separate}[kind](config, device, getattr(torch, dtype))
    print(json.dumps("ready"), flush=True)
    forget_peak(device)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        began = time.perf_counter()
        loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(json.dumps(time.perf_counter() - began), flush=True)
    print(json.dumps(peak(device)), flush=True)


if __name__ == "__main__":
    main()
