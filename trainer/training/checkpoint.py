"""Checkpoints: all that a run needs to go on where it was, in files of which each is whole or not there.

Flows in: named tensors at a step.  Flows out: those of the last step that was saved.  Nothing random is kept, as every
random number is a function of (seed, step); nor is the place in the data, for the same reason.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic import atomic_write
from ..errors import UserError

log = logging.getLogger("trajectory-consistency")
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    folder: Path
    every: int
    """Steps from one checkpoint to the next."""
    keep: int
    """Number of checkpoints kept, the newest."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the run's inputs, stored with every checkpoint; one changes when its input does."""

    def due(self, step: int) -> bool:
        """Whether one is to be saved when `step` steps are done."""
        return step % self.every == 0

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write the tensors as they are after `step` steps, then remove the oldest checkpoints; return the new one.

        Raises OSError, with the checkpoints before untouched, when the disk does not take it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        with atomic_write(path) as unfinished:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, unfinished, metadata=dict(self.inputs))
        for old in self.steps()[self.keep :]:
            self._path(old).unlink()
        return path

    def latest(self) -> dict[str, Tensor] | None:
        """Return the tensors of the newest checkpoint; None if there is none.

        One that cannot be read is passed over with a warning.
        """
        for step in self.steps():
            try:
                return load_file(self._path(step))
            except (SafetensorError, OSError) as error:
                log.warning("%s is damaged and is passed over: %s", self._path(step), error)
        return None

    def refuse_different_inputs(self) -> None:
        """Raise UserError, which says what has changed, when the newest checkpoint is not of these `inputs`."""
        for step in self.steps():
            try:
                with safe_open(self._path(step), "pt") as file:
                    kept = file.metadata() or {}
            except (SafetensorError, OSError):
                continue  # `latest` says so
            changed = [
                f"{what} was {kept.get(what, 'not recorded')} and is {now}"
                for what, now in self.inputs.items()
                if kept.get(what) != now
            ]
            if changed:
                raise UserError(
                    f"{self.folder} has step {step} of a run on something else, {'; '.join(changed)}: put it back as "
                    "it was, or choose another output.folder"
                )
            return

    def steps(self) -> list[int]:
        """The steps that were saved, newest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def clear(self) -> None:
        """Remove them all, when the run is finished and nothing is left to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"
