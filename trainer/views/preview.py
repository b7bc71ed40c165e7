"""Pictures drawn while training, from the file that is exported then, beside the teacher's and those of the start.

Flows in: a network in training, and encoded prompts.  Flows out: a folder of pictures, of LoRA
files, and of a labeled grid for each time.  Nothing of it changes what is trained.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..atomic import atomic_write
from ..config.settings import Config
from ..files.adapter_weights import file_in_use
from ..files.export import write_lora
from ..models.seam import Checkpoint, Model
from ..training.loop import StepRecord
from .grid import Row, draw_grid
from .preview_prompts import PreviewPrompts, draw, load_picture, save_picture

FOLDER = "previews"
TEACHER, TEACHER_STEPS = "teacher", 50
_SETTINGS = "settings.json"
_CELL_PX = 256  # the longer side of a picture in the grid, where it is larger
log = logging.getLogger("trajectory-consistency")


class Previews:
    """An observer that draws every so many steps and after the last, and before the first (`start`)."""

    def __init__(
        self, model: Model, checkpoint: Checkpoint, wanted: PreviewPrompts, config: Config, metadata: dict[str, str]
    ) -> None:
        """Draw `wanted`, on the model's device, as `config.preview` says."""
        self.model, self.checkpoint, self.wanted, self.config, self.metadata = (
            model,
            checkpoint,
            wanted,
            config,
            metadata,
        )
        self.folder = config.output_folder / FOLDER

    def start(self) -> None:
        """Draw the teacher's pictures and those of the adapter before it is trained, but for those that are there."""
        self._drop_others()
        with self.model.adapter.off():
            self._draw(TEACHER, [TEACHER_STEPS], gamma=0.0, cfg=teacher_guidance(self.config), again=False)
        self._draw_student(0, again=False)

    def __call__(self, record: StepRecord) -> None:
        """Draw if it is time, from a LoRA file that is written first and stays, but for the last, which is the run's.

        Raises ExportError when the file does not hold up.
        """
        last = record.step == self.config.training.steps
        if record.step % self.config.preview.every and not last:
            return
        path = self.folder / f"{self.config.output.name}-{step_name(record.step)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lora(path, self.model, self.config, self.metadata, self.wanted.cond[0])
        with file_in_use(self.model, path):
            self._draw_student(record.step)
        if last:
            path.unlink()
        log.info("step %d: look at %s", record.step, grid_path(self.folder, record.step))

    def _drop_others(self) -> None:
        """Remove pictures of the start that were drawn with settings which neither their names nor the folder tell."""
        config, path = self.config, self.folder / _SETTINGS
        settings = {
            "base": asdict(config.base),
            "dtype": str(self.model.dtype),
            "adapter": asdict(config.adapter),
            "method": asdict(config.method),
            "seed": config.training.seed,
            "latent": self.wanted.shape,
            "eta": config.preview.eta,
            "cfg": config.preview.cfg,
        }
        text = json.dumps(settings, indent=2)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        for when in (TEACHER, step_name(0)):
            for picture in (self.folder / when).glob("*.png"):
                picture.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def _draw_student(self, step: int, *, again: bool = True) -> None:
        """Draw the pictures and the grid of a step with the adapter that is active."""
        preview = self.config.preview
        self._draw(step_name(step), preview.steps, gamma=preview.eta, cfg=preview.cfg, again=again)
        write_grid(self.folder, self.wanted, self.config, step)

    def _draw(self, when: str, counts: Sequence[int], *, gamma: float, cfg: float, again: bool = True) -> None:
        """Draw and save all pictures with each of these numbers of steps, or unless `again` where one is missing."""
        wanted = [steps for steps in counts if again or not self._all_there(when, steps)]
        if not wanted:
            return
        autoencoder = self.checkpoint.load_autoencoder(self.model.device)  # in memory only while it is needed
        for steps in wanted:
            latents = draw(self.model, self.wanted, steps=steps, gamma=gamma, cfg=cfg)
            for name, latent in zip(self.wanted.names, latents, strict=True):
                save_picture(autoencoder.decode(latent)[0], picture_path(self.folder, when, name, steps))

    def _all_there(self, when: str, steps: int) -> bool:
        return all(picture_path(self.folder, when, name, steps).is_file() for name in self.wanted.names)


def teacher_guidance(config: Config) -> float:
    """The scale of the teacher's guidance in its pictures: the middle of those that it is distilled with."""
    return (config.method.guidance_min + config.method.guidance_max) / 2


def step_name(step: int) -> str:
    """What the files of a step are called."""
    return f"step-{step:06}"


def picture_path(folder: Path, when: str, name: str, steps: int) -> Path:
    """The path of a picture: `when` is the teacher or a step, `name` one of `PreviewPrompts.names`."""
    return folder / when / f"{name}-steps-{steps}.png"


def grid_path(folder: Path, step: int) -> Path:
    """Where the grid of a step is."""
    return folder / f"{step_name(step)}.jpg"


def write_grid(folder: Path, wanted: PreviewPrompts, config: Config, step: int) -> None:
    """Write the grid of a step from the pictures in `folder`: the teacher's, and for each number of sampling steps
    those of the start and, below, of the step."""

    def row(label: str, when: str, steps: int, *, apart: bool = False) -> Row:
        pictures = [load_picture(picture_path(folder, when, name, steps)) for name in wanted.names]
        return Row(label, torch.stack(pictures), apart=apart)

    rows = [row(f"Teacher\n{TEACHER_STEPS} steps, cfg {teacher_guidance(config):g}", TEACHER, TEACHER_STEPS)]
    for steps in config.preview.steps:
        sampled = f"{steps} step{'s' if steps > 1 else ''}"
        rows.append(row(f"{sampled}\nbefore training", step_name(0), steps, apart=True))
        rows += [row(f"{sampled}\nafter {step}", step_name(step), steps)] if step else []
    scale = min(2.0, _CELL_PX / max(rows[0].pictures.shape[2:]))
    title = f"After {step} steps of training" if step else "Before training"
    title += f": eta {config.preview.eta:g}, cfg {config.preview.cfg:g}"
    with atomic_write(grid_path(folder, step)) as unfinished:
        draw_grid(rows, wanted.captions, title, scale=scale).save(unfinished, quality=92)
