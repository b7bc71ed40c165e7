"""Pictures drawn while training, from the file that is exported then, beside the teacher's and those of the start.

Flows in: a network in training, and encoded prompts.  Flows out: a folder of pictures, of LoRA
files, and of a labeled grid for each time.  Nothing of it changes what is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trainer.adapter import adapters_off, second_adapter
from trainer.atomic import whole_file
from trainer.config import Config
from trainer.export import write_lora
from trainer.grid import Row, draw_grid
from trainer.loop import StepRecord
from trainer.network import Network
from trainer.sample import decode
from trainer.scenes import Scenes, draw, load_picture, save_picture
from trainer.teacher import load_vae

FOLDER = "previews"
TEACHER, TEACHER_STEPS = "teacher", 50
_CELL_PX = 256  # the longer side of a picture in the grid, where it is larger
log = logging.getLogger("trajectory-consistency")


class Previews:
    """An observer that draws every so many steps and after the last, and before the first (`start`)."""

    def __init__(self, network: Network, scenes: Scenes, config: Config, metadata: dict[str, str]) -> None:
        """Draw `scenes`, on the network's device, as `config.preview` says."""
        self.network, self.scenes, self.config, self.metadata = network, scenes, config, metadata
        self.folder = config.output_folder / FOLDER

    def start(self) -> None:
        """Draw the teacher's pictures and those of the adapter before it is trained."""
        method = self.config.method
        guidance = (method.guidance_min + method.guidance_max) / 2
        with adapters_off(self.network.unet):
            latents = draw(self.network, self.scenes, steps=TEACHER_STEPS, gamma=0.0, cfg=guidance)
        vae = self._load_vae()
        self._save(vae, TEACHER, latents, TEACHER_STEPS)
        self._draw_student(vae, 0)

    def __call__(self, record: StepRecord) -> None:
        """Draw if it is time, from a LoRA file that is written first and stays, but for the last, which is the run's.

        Raises ExportError when the file does not hold up.
        """
        last = record.step == self.config.training.steps
        if record.step % self.config.preview.every and not last:
            return
        path = self.folder / f"{self.config.output.name}-{step_name(record.step)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):  # an adapter draws numbers before the file's are filled in
            write_lora(path, self.network, self.config, self.metadata, self.scenes.cond[:1])
            with second_adapter(self.network.unet, path):
                self._draw_student(self._load_vae(), record.step)
        if last:
            path.unlink()
        log.info("step %d: look at %s", record.step, grid_path(self.folder, record.step))

    def _draw_student(self, vae: AutoencoderKL, step: int) -> None:
        preview = self.config.preview
        for steps in preview.steps:
            latents = draw(self.network, self.scenes, steps=steps, gamma=preview.eta, cfg=preview.cfg)
            self._save(vae, step_name(step), latents, steps)
        write_grid(self.folder, self.scenes, preview.steps, step)

    def _load_vae(self) -> AutoencoderKL:
        """The VAE, which is in memory only while it is needed."""
        base = self.config.base
        return load_vae(base.path, vae=base.vae).to(self.network.alpha_bar.device)

    def _save(self, vae: AutoencoderKL, when: str, latents: Sequence[Tensor], steps: int) -> None:
        for name, latent in zip(self.scenes.names, latents, strict=True):
            save_picture(decode(vae, latent)[0], picture_path(self.folder, when, name, steps))


def step_name(step: int) -> str:
    """What the files of a step are called."""
    return f"step-{step:06}"


def picture_path(folder: Path, when: str, name: str, steps: int) -> Path:
    """Where one picture is: of the teacher or of a step, of one of `Scenes.names`, with so many sampling steps."""
    return folder / when / f"{name}-steps-{steps}.png"


def grid_path(folder: Path, step: int) -> Path:
    """Where the grid of a step is."""
    return folder / f"{step_name(step)}.jpg"


def write_grid(folder: Path, scenes: Scenes, all_steps: Sequence[int], step: int) -> None:
    """Write the grid of a step from the pictures in `folder`: the teacher's, the start's and those of the step."""

    def row(label: str, when: str, steps: int) -> Row:
        pictures = [load_picture(picture_path(folder, when, name, steps)) for name in scenes.names]
        return Row(f"{label}\n{steps} step{'s' if steps > 1 else ''}", torch.stack(pictures))

    rows = [row("Teacher", TEACHER, TEACHER_STEPS)]
    for steps in all_steps:
        rows.append(row("Start", step_name(0), steps))
        rows += [row(f"Step {step}", step_name(step), steps)] if step else []
    scale = min(2.0, _CELL_PX / max(rows[0].pictures.shape[2:]))
    title = f"After {step} steps" if step else "Before training"
    with whole_file(grid_path(folder, step)) as unfinished:
        draw_grid(rows, scenes.captions, title, scale=scale).save(unfinished, quality=92)
