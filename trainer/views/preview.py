"""Previews during training: pictures, a LoRA file and a labeled grid at regular steps, in the run's previews folder.

Each preview is sampled from the LoRA file written at that step, next to pictures of the teacher and of the student
before training. Previews do not change the result of the training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ...tcd.distill import StepRecord
from ...tcd.files.atomic import atomic_write
from ..config.settings import Config
from ..files.adapter_weights import using_file
from ..files.write_lora import write_lora
from ..models.seam import Checkpoint, Model
from .grid import Row, draw_grid
from .preview_prompts import PreviewPrompts, load_picture, sample_previews, save_picture
from .trackers import Tracker

PREVIEW_FOLDER = "previews"
TEACHER_FOLDER, TEACHER_STEPS = "teacher", 50
_SETTINGS = "settings.json"
_CELL_PX = 256  # longer side of a picture in the grid; smaller pictures are enlarged, at most twofold
log = logging.getLogger("trajectory-consistency")


class Previews:
    """An observer that draws previews every `preview.every` steps and after the last; `start` draws those of step 0."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        prompts: PreviewPrompts,
        config: Config,
        metadata: dict[str, str],
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Sample `prompts` on the model's device with the settings of config.preview.

        metadata: of the LoRA files. trackers: are shown the grid of each training step with previews.
        """
        self.model, self.checkpoint = model, checkpoint
        self.prompts, self.config, self.metadata = prompts, config, metadata
        self.trackers = trackers
        self.folder = config.output_folder / PREVIEW_FOLDER

    def start(self) -> None:
        """Draw the pictures of the teacher and of the untrained student that do not exist yet."""
        self._remove_outdated()
        with self.model.adapter.off():
            self._draw(TEACHER_FOLDER, [TEACHER_STEPS], gamma=0.0, cfg=teacher_guidance(self.config), redraw=False)
        self._draw_student(0, redraw=False)

    def __call__(self, record: StepRecord) -> None:
        """Write a LoRA file and draw previews with it, if they are due after this step.

        The file of the last step is removed again, because the run writes its own. Raises VerificationError if the
        file does not predict what the model in training predicts.
        """
        last = record.step == self.config.training.steps
        if record.step % self.config.preview.every and not last:
            return
        path = self.folder / f"{self.config.output.name}-{step_label(record.step)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lora(path, self.model, self.config, self.metadata, self.prompts.cond[0])
        with using_file(self.model, path):
            self._draw_student(record.step)
        if last:
            path.unlink()
        grid = grid_path(self.folder, record.step)
        for tracker in self.trackers:
            tracker.show(record.step, grid)
        log.info("step %d: look at %s", record.step, grid)

    def _remove_outdated(self) -> None:
        """Remove pictures of the teacher and of step 0 that were drawn with different settings.

        The settings that file names do not contain are stored in the folder, and compared with the current ones.
        """
        config, path = self.config, self.folder / _SETTINGS
        settings = {
            "base": asdict(config.base),
            "dtype": str(self.model.dtype),
            "adapter": asdict(config.adapter),
            "method": asdict(config.method),
            "seed": config.training.seed,
            "latent": self.prompts.shape,
            "eta": config.preview.eta,
            "cfg": config.preview.cfg,
        }
        text = json.dumps(settings, indent=2)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        for subfolder in (TEACHER_FOLDER, step_label(0)):
            for picture in (self.folder / subfolder).glob("*.png"):
                picture.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def _draw_student(self, step: int, *, redraw: bool = True) -> None:
        """Draw the pictures and the grid of a training step with the adapter weights in use."""
        preview = self.config.preview
        self._draw(step_label(step), preview.steps, gamma=preview.eta, cfg=preview.cfg, redraw=redraw)
        write_grid(self.folder, self.prompts, self.config, step)

    def _draw(
        self, subfolder: str, step_counts: Sequence[int], *, gamma: float, cfg: float, redraw: bool = True
    ) -> None:
        """Draw and save all pictures with each number of sampling steps.

        With redraw=False, a number of steps is skipped if all its pictures exist.
        """
        needed = [steps for steps in step_counts if redraw or not self._exist(subfolder, steps)]
        if not needed:
            return
        autoencoder = self.checkpoint.load_autoencoder(self.model.device)  # in memory only while it is needed
        for steps in needed:
            latents = sample_previews(self.model, self.prompts, steps=steps, gamma=gamma, cfg=cfg)
            for name, latent in zip(self.prompts.names, latents, strict=True):
                save_picture(autoencoder.decode(latent)[0], picture_path(self.folder, subfolder, name, steps))

    def _exist(self, subfolder: str, steps: int) -> bool:
        return all(picture_path(self.folder, subfolder, name, steps).is_file() for name in self.prompts.names)


def teacher_guidance(config: Config) -> float:
    """The guidance scale of the teacher's pictures: the middle of the range that is distilled."""
    return (config.method.guidance_min + config.method.guidance_max) / 2


def step_label(step: int) -> str:
    """The name of a training step in file and folder names: "step-000250"."""
    return f"step-{step:06}"


def picture_path(folder: Path, subfolder: str, name: str, steps: int) -> Path:
    """The path of a picture in the previews folder.

    subfolder: TEACHER_FOLDER, or the `step_label` of a training step. name: one of `PreviewPrompts.names`.
    steps: the number of sampling steps.
    """
    return folder / subfolder / f"{name}-steps-{steps}.png"


def grid_path(folder: Path, step: int) -> Path:
    """The path of the grid of a training step in the previews folder."""
    return folder / f"{step_label(step)}.jpg"


def write_grid(folder: Path, prompts: PreviewPrompts, config: Config, step: int) -> None:
    """Write the grid of a training step from the pictures in `folder`.

    Its rows are the teacher and, for each number of sampling steps, the student before training and after `step`.
    """

    def row(label: str, subfolder: str, steps: int, *, starts_group: bool = False) -> Row:
        pictures = [load_picture(picture_path(folder, subfolder, name, steps)) for name in prompts.names]
        return Row(label, torch.stack(pictures), starts_group=starts_group)

    rows = [row(f"Teacher\n{TEACHER_STEPS} steps, cfg {teacher_guidance(config):g}", TEACHER_FOLDER, TEACHER_STEPS)]
    for steps in config.preview.steps:
        sampled = f"{steps} step{'s' if steps > 1 else ''}"
        rows.append(row(f"{sampled}\nbefore training", step_label(0), steps, starts_group=True))
        rows += [row(f"{sampled}\nafter {step}", step_label(step), steps)] if step else []
    scale = min(2.0, _CELL_PX / max(rows[0].pictures.shape[2:]))
    title = f"After {step} steps of training" if step else "Before training"
    title += f": eta {config.preview.eta:g}, cfg {config.preview.cfg:g}"
    with atomic_write(grid_path(folder, step)) as unfinished:
        draw_grid(rows, prompts.captions, title, scale=scale).save(unfinished, quality=92)
