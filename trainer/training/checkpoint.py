"""Checkpoints of a training run: each is one file with everything needed to resume, written atomically.

Generator states and the position in the data are not saved: both are functions of (seed, step).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ...tcd.files.atomic import atomic_write
from ..checked_file import open_checked, save_checked
from ..errors import UserError
from .processes import ALONE, Processes

log = logging.getLogger("trajectory-consistency")
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoints:
    """The training checkpoints of one run, in a folder that holds nothing else."""

    folder: Path
    every: int
    """Steps between checkpoints."""
    keep: int
    """Number of checkpoints to keep; older ones are removed."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the run's inputs by name, stored with every checkpoint; each changes when its input changes."""

    def due(self, step: int) -> bool:
        """Whether to save a checkpoint after `step` steps."""
        return step % self.every == 0

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint after `step` steps, then remove the oldest ones; return its path.

        Raises OSError if it cannot be written; earlier checkpoints are then unchanged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        with atomic_write(path) as unfinished:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_checked(on_cpu, unfinished, self.fingerprints)
        self.prune(self.keep)
        return path

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints."""
        for old in self.steps()[keep:]:
            self._path(old).unlink()

    def load_latest(self, processes: Processes = ALONE) -> dict[str, Tensor] | None:
        """Return the tensors of the newest readable checkpoint, which the main process chooses, or None without any.

        Raises UserError if it cannot be read by every process.
        """
        step = processes.on_main_process(self._latest)
        return None if step is None else processes.on_every_process(lambda: self._load(step))

    def check_fingerprints(self) -> None:
        """Raise UserError, which lists the changes, if the newest readable checkpoint has different fingerprints."""
        for step in self.steps():
            try:
                saved = open_checked(self._path(step), content=False)[1]
            except (SafetensorError, OSError):
                continue  # `load_latest` warns about it
            changed = [
                f"{name} was {saved.get(name, 'not recorded')} and is {now}"
                for name, now in self.fingerprints.items()
                if saved.get(name) != now
            ]
            if changed:
                raise UserError(
                    f"{self.folder} has step {step} of a run with different inputs, {'; '.join(changed)}: restore what "
                    "has changed, or choose another output.folder"
                )
            return

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _latest(self) -> int | None:
        """Return the step of the newest readable checkpoint, or None without any; warn about damaged ones."""
        for step in self.steps():
            try:
                open_checked(self._path(step), content=True)
                return step
            except (SafetensorError, OSError) as error:
                log.warning("%s is damaged and is skipped: %s", self._path(step), error)
        return None

    def _load(self, step: int) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint as copies in memory, because Windows removes no file that is mapped."""
        try:
            tensors, _ = open_checked(self._path(step), content=True)
            return {name: tensor.clone() for name, tensor in tensors.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._path(step)} cannot be read: {error}; each process must reach output.folder"
            ) from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
