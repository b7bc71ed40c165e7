"""What is checked before a run loads any weights: settings, base, data and output folder; and the plan, in words."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch

from .config.device import device_and_dtype
from .config.settings import FILE_NAME, Config, changes, load
from .data.cache import input_fingerprints, open_cached
from .data.survey import Survey, survey
from .errors import UserError
from .files.adapter_weights import start_from
from .files.export import CONFIG_DIGEST, config_digest
from .models import open_checkpoint
from .models.seam import Checkpoint
from .safetensors_file import SafetensorsFile
from .training import sharding
from .training.checkpoint import Checkpoints
from .training.optimizer import optimizer_class
from .training.processes import ALONE, Processes
from .views.trackers import require

CHECKPOINTS = "checkpoints"


class Inputs(NamedTuple):
    """What a run reads, as far as it can be known without a model in memory."""

    checkpoint: Checkpoint
    found: Survey


def check(config: Config, processes: Processes = ALONE) -> Inputs:
    """Check everything that a run by so many processes needs, and load no weights.

    Raises UserError for whatever would stop the run.
    """
    _, dtype = device_and_dtype(config)
    if why := output_conflict(config):
        raise UserError(why)
    checkpoint = _check_settings(config, processes)
    checkpoints_of(config, dtype).check_fingerprints()
    return Inputs(checkpoint, _find_data(config, dtype))


def check_inputs(config: Config) -> Inputs:
    """Like `check` for one process, but ignores the output folder's contents."""
    _, dtype = device_and_dtype(config)
    return Inputs(_check_settings(config, ALONE), _find_data(config, dtype))


def plan(config: Config, inputs: Inputs) -> str:
    """Say in words what a run would do."""
    training, method, found = config.training, config.method, inputs.found
    device, dtype = device_and_dtype(config)
    return "\n".join(
        [
            f"base      {config.base.path} ({inputs.checkpoint.describe()}), in {dtype} on {device}",
            *(f"          {note}" for note in inputs.checkpoint.notes),
            f"data      {found.pictures} captioned pictures in {config.data.summary}, at {config.data.resolution} px",
            *([f"          left out: {found.complaints()}"] if found.problems else []),
            f"method    law {method.law}, solver step {method.skip}, "
            f"guidance {method.guidance_min:g} to {method.guidance_max:g}",
            f"adapter   rank {config.adapter.rank}, alpha {config.adapter.alpha:g}",
            f"training  {training.steps} steps of {training.batch} pictures "
            f"({training.steps * training.batch / found.pictures:.1f} epochs), learning rate {training.lr:g}",
            f"output    {config.lora_path}",
        ]
    )


def output_conflict(config: Config) -> str:
    """The reason why the output folder cannot be used, or an empty string if it can."""
    folder = config.output_folder
    if folder.exists() and not folder.is_dir():
        return f"output.folder is {folder}, which is a file: choose another"
    if config.lora_path.exists():
        return f"{config.lora_path} exists: choose another output.folder or output.name, or remove it"
    other = folder / FILE_NAME
    if not other.exists():
        left = saved_steps(config)
        return f"{folder} has checkpoints but no {FILE_NAME}: choose another output.folder" if left else ""
    try:
        changed = changes(load(other), config)
    except UserError:
        changed = [f"{other} is not a configuration that this version can read"]
    if not changed:
        return ""
    return f"{folder} is of a run with other settings, {'; '.join(changed)}: choose another output.folder"


def is_finished(config: Config) -> bool:
    """Whether the LoRA exists and was written by the run in this output folder, with these same settings."""
    saved = saved_steps(config)
    if not config.lora_path.is_file() or (saved and saved[0] < config.training.steps):
        return False
    try:
        ended = load(config.output_folder / FILE_NAME)
        metadata = SafetensorsFile(config.lora_path).metadata
    except UserError:
        return False
    return not changes(ended, config) and metadata.get(CONFIG_DIGEST) == config_digest(ended)


def checkpoints_of(config: Config, dtype: torch.dtype) -> Checkpoints:
    """The run's checkpoints, tied to the input fingerprints known so far (the data's only once cached)."""
    training, folder = config.training, config.output_folder / CHECKPOINTS
    return Checkpoints(folder, training.checkpoint_every, training.keep_checkpoints, input_fingerprints(config, dtype))


def saved_steps(config: Config) -> list[int]:
    """The steps of which the output folder has a checkpoint, newest first."""
    return Checkpoints(config.output_folder / CHECKPOINTS, 1, 1).steps()


def _check_settings(config: Config, processes: Processes) -> Checkpoint:
    """Validate the settings and the base; return the base, opened."""
    _check_writable("output.folder", config.output_folder)
    optimizer_class(config.training)
    _check_learning_rates(config)
    processes.micro_batches(config.training.batch, config.training.accumulate)
    if sharding.fsdp_requested() and config.preview.prompts:
        raise UserError(
            "preview.prompts are drawn by one process, and FSDP leaves none with the whole base: "
            "use preview.prompts=[], or gpus.yaml in the place of fsdp.yaml"
        )
    require(config.log)
    checkpoint = open_checkpoint(config.base)
    checkpoint.check_encoders()
    _check_adapter(config, checkpoint)
    return checkpoint


def _find_data(config: Config, dtype: torch.dtype) -> Survey:
    """The pictures and captions that there are, in the cache or where they come from."""
    cached = open_cached(config, dtype)
    if cached is None:
        _check_writable("data.cache", config.cache_folder)
    found = cached.survey if cached else survey(config)
    if not found.pictures:
        raise UserError(f"no picture is left to train on: {found.complaints()}")
    return found


def _check_writable(key: str, folder: Path) -> None:
    """Refuse a folder where nothing can be written, found by writing a file that goes away again."""
    there = next(each for each in (folder, *folder.parents) if each.is_dir())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{key} is {folder}, but nothing can be written into {there} ({error.strerror}): choose another, or make "
            "it writable"
        ) from error


def _check_adapter(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse targets that do not exist, and a LoRA to start from that does not fit, by names, shapes and alphas."""
    adapter = config.adapter
    weights = checkpoint.load(torch.float32, torch.device("meta")).new_weights(
        rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=adapter.targets, target_input=config.method.embedded
    )
    if not adapter.start_from:
        return
    path = Path(adapter.start_from).expanduser()
    if not path.is_file():
        raise UserError(f"adapter.start_from is {path}, where there is no file")
    start_from(weights, path)


def _check_learning_rates(config: Config) -> None:
    """Refuse learning rates with which nothing would be trained."""
    training, embedded = config.training, config.method.target_time
    if training.lr and not config.adapter.freeze or embedded and training.target_time_lr:
        return
    rates = f"training.lr is {training.lr:g}"
    rates += f", target_time_lr {training.target_time_lr:g}" if embedded else ""
    frozen = " and adapter.freeze is set" if config.adapter.freeze else ""
    raise UserError(f"{rates}{frozen}, so that nothing would be trained: use more than 0, such as 1e-4")
