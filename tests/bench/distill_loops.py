"""One process of tests/bench/training_step.py: a loop that trains a full-size SD 1.5, a step for each line.

Arguments: ours or separate, the checkpoint, side in pixels, batch, rank, device, dtype. Prints JSON lines: for "step"
the seconds it took, for "peak" the peak of memory since the first step, in bytes.

`separate` is the order of work of diffusers' train_lcm_distill_lora_sd_wds.py: each step encodes its pictures with the
VAE and its captions with the text encoder, the student is called first and keeps its activations while a second UNet,
the teacher, is called with the caption and without, one after the other, and then the student once more for the target.
The sums between these calls are ours in both, and so are UNet, adapter, optimizer, pictures, size and dtype.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from turns import serve

from trajectory_consistency.tcd import add_noise, jump
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.tcd.distill import draw_times_and_guidance
from trajectory_consistency.tcd.objective import huber
from trajectory_consistency.trainer.config import settings as configuration
from trajectory_consistency.trainer.data.dataset import Batch
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.seam import Autoencoder, Checkpoint, TextEncoder
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.training.loop import Training

sys.path.append(str(Path(__file__).resolve().parents[1]))

# The script trains an LCM: it has no moving average, and the network does not get s.
from plain_method import PLAIN

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

    def __init__(
        self, config: configuration.Config, device: torch.device, dtype: torch.dtype, checkpoint: Checkpoint
    ) -> None:
        size = config.training.batch
        latents = latents_of(checkpoint.load_autoencoder(device), config)
        text_encoder = checkpoint.load_text_encoder(device)
        cond, uncond = (encode(checkpoint, text_encoder, texts, config) for texts in (captions(size), [""] * size))
        data = Pictures(latents.cpu(), cond.to("cpu"), uncond.to("cpu"))
        del text_encoder
        self._training = Training(load_student(config, checkpoint, device, dtype), data, config)

    def step(self) -> None:
        self._training.train_step()


class Separate:
    """Everything in every step, with a UNet for the teacher and another one for the student."""

    def __init__(
        self, config: configuration.Config, device: torch.device, dtype: torch.dtype, checkpoint: Checkpoint
    ) -> None:
        self.config, self.device, self.checkpoint = config, device, checkpoint
        self.autoencoder = self.checkpoint.load_autoencoder(device)
        self.text_encoder = self.checkpoint.load_text_encoder(device)
        self.student = load_student(config, self.checkpoint, device, dtype)
        self.teacher = self.checkpoint.load(dtype, device)
        self.parameters = list(self.student.adapter.weights[STUDENT].parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.training.lr)
        self.uncond = encode(self.checkpoint, self.text_encoder, [""] * config.training.batch, config)
        self.noise = torch.Generator().manual_seed(0)
        self.done = 0

    def step(self) -> None:
        student, teacher, schedule = self.student, self.teacher, self.student.schedule
        latents = latents_of(self.autoencoder, self.config)
        cond = encode(self.checkpoint, self.text_encoder, captions(len(latents)), self.config)
        drawn = draw_times_and_guidance(self.config.method, self.config.training, self.checkpoint.schedule, self.done)
        t, t_next, s = (schedule.point(time.to(self.device), latents.ndim) for time in drawn.times)
        w = drawn.guidance.to(self.device).view(-1, 1, 1, 1)
        eps = torch.randn(latents.shape, generator=self.noise).to(self.device)
        x_t = add_noise(latents, eps, t.level)
        predicted = jump(x_t, student.x0(x_t, t, cond), t.level, s.level)
        with torch.no_grad():
            conditional, free = teacher.x0(x_t, t, cond), teacher.x0(x_t, t, self.uncond)
            x_next = jump(x_t, free + w * (conditional - free), t.level, t_next.level)
            target = jump(x_next, student.x0(x_next, t_next, cond), t_next.level, s.level)
        huber(predicted, target, c=self.config.method.huber_c).mean().backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1


def latents_of(autoencoder: Autoencoder, config: configuration.Config) -> Tensor:
    """Latents of a batch, on the device of the autoencoder, where its pictures are brought first."""
    shape = (config.training.batch, 3, config.data.resolution, config.data.resolution)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoded = autoencoder.encode(pixels.to(next(autoencoder.parameters()).device))
    return encoded.mean if encoded.std is None else encoded.mean + encoded.std * torch.randn_like(encoded.mean)


def encode(
    checkpoint: Checkpoint, text_encoder: TextEncoder, texts: list[str], config: configuration.Config
) -> Conditioning:
    side = config.data.resolution
    framing = Framing.whole(side, side, len(texts), next(text_encoder.parameters()).device)
    return checkpoint.collate(text_encoder.encode(texts), framing)


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
            "method": PLAIN,
            "adapter": {"rank": int(rank), "alpha": float(rank)},
            "training": {"batch": int(batch), "device": device_name},
            "output": {"folder": "."},
        }
    )
    device = torch.device(device_name)
    loop = {"ours": Ours, "separate": Separate}[kind](
        config, device, getattr(torch, dtype), open_checkpoint(config.base)
    )
    forget_peak(device)

    def step() -> float:
        began = time.perf_counter()
        loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    serve(step=step, peak=lambda: peak(device))


if __name__ == "__main__":
    main()
