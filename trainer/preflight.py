"""Check settings, base, data and output folder before a run loads any weights, and describe what the run will do."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch

from ..tcd.distill.step import check_weighting
from ..tcd.files.safetensors_file import SafetensorsFile
from .config.device import device_and_dtype
from .config.settings import FILE_NAME, Config, MethodConfig, changes, load
from .data.cache import input_fingerprints, open_cached
from .data.survey import Survey, check_bucket_sizes, survey
from .errors import UserError
from .files.adapter_weights import initial_weights
from .files.metadata import CONFIG_DIGEST_KEY, TRAIN_STEPS_KEY, config_digest
from .models import open_checkpoint
from .models.sampling import check_cfg
from .models.seam import Checkpoint
from .training import sharding
from .training.checkpoint import Checkpoints
from .training.optimizer import optimizer_class
from .training.processes import ALONE, Processes
from .views.trackers import check_installed

CHECKPOINT_FOLDER = "checkpoints"


class Inputs(NamedTuple):
    """The inputs of a run, examined without loading weights."""

    checkpoint: Checkpoint
    data: Survey


def check(config: Config, processes: Processes = ALONE) -> Inputs:
    """Check the settings, the base, the data and the output folder, without loading weights.

    Raises UserError for any problem that would stop the run.
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
    """Describe a run: one line each for its base, data, method, adapter, training and output."""
    training, method, data = config.training, config.method, inputs.data
    device, dtype = device_and_dtype(config)
    return "\n".join(
        [
            f"base      {config.base.file} ({inputs.checkpoint.describe()}), in {dtype} on {device}",
            *(f"          {note}" for note in inputs.checkpoint.notes),
            f"data      {data.pictures} captioned pictures in {config.data.summary}, at {config.data.resolution} px",
            *(f"          {line}" for line in data.report_lines()),
            f"method    law {method.law}, solver step {method.skip}, "
            f"guidance {method.guidance_min:g} to {method.guidance_max:g}",
            *_guidance_note(method, inputs.checkpoint),
            f"adapter   rank {config.adapter.rank}, alpha {config.adapter.alpha:g}",
            f"training  {training.steps} steps of {training.batch} pictures "
            f"({training.steps * training.batch / data.pictures:.1f} epochs), learning rate {training.lr:g}",
            f"output    {config.lora_path}",
        ]
    )


def _guidance_note(method: MethodConfig, checkpoint: Checkpoint) -> list[str]:
    """Return a note if the teacher never gets the guidance scale that the student's network gets as an input."""
    student = checkpoint.guidance
    if student is None or method.guidance_min <= student <= method.guidance_max:
        return []
    return [
        f"          the student's network gets the guidance scale {student:g}, which is not in this range: set "
        f"method.guidance_min and method.guidance_max to {student:g}"
    ]


def output_conflict(config: Config) -> str:
    """Return the reason why the output folder cannot be used, or an empty string if it can."""
    folder = config.output_folder
    if folder.exists() and not folder.is_dir():
        return f"output.folder is {folder}, which is a file: choose another"
    saved = next(iter(saved_steps(config)), 0)
    own = _steps_of_lora(config)
    if config.lora_path.exists() and not (0 < own <= saved and own != config.training.steps):
        return f"{config.lora_path} exists: choose another output.folder or output.name, or remove it"
    existing = folder / FILE_NAME
    if not existing.exists():
        return f"{folder} has checkpoints but no {FILE_NAME}: choose another output.folder" if saved else ""
    try:
        changed = changes(load(existing), config)
    except UserError:
        changed = [f"{existing} is not a configuration that this version can read"]
    if changed:
        return f"{folder} is of a run with other settings, {'; '.join(changed)}: choose another output.folder"
    if saved > config.training.steps:
        return (
            f"{folder} is of a run that has done {saved} steps, and training.steps is {config.training.steps}: use at "
            f"least {saved}, or choose another output.folder"
        )
    return ""


def is_finished(config: Config) -> bool:
    """Return whether the run in this output folder has written its LoRA, with these settings and training.steps.

    Its last checkpoint may be there or not.
    """
    steps = config.training.steps
    known = (config.output_folder / FILE_NAME).is_file()
    return known and _steps_of_lora(config) == steps and saved_steps(config)[:1] in ([], [steps])


def _steps_of_lora(config: Config) -> int:
    """Return after how many steps a run with these settings wrote the LoRA; 0 if there is none, or it is another's."""
    try:
        metadata = SafetensorsFile(config.lora_path).metadata
    except UserError:
        return 0
    own = metadata.get(CONFIG_DIGEST_KEY) == config_digest(config)
    return int(metadata.get(TRAIN_STEPS_KEY, 0)) if own else 0


def checkpoints_of(config: Config, dtype: torch.dtype) -> Checkpoints:
    """Return the run's checkpoints, with the fingerprints of its inputs (without the data's if not all are cached)."""
    training, folder = config.training, config.output_folder / CHECKPOINT_FOLDER
    return Checkpoints(folder, training.checkpoint_every, training.keep_checkpoints, input_fingerprints(config, dtype))


def saved_steps(config: Config) -> list[int]:
    """Return the steps at which the output folder has a checkpoint, newest first."""
    return Checkpoints(config.output_folder / CHECKPOINT_FOLDER, 1, 1).steps()


def _check_settings(config: Config, processes: Processes) -> Checkpoint:
    """Validate the settings and the base; return the opened base."""
    _check_writable("output.folder", config.output_folder)
    optimizer_class(config.training)
    _check_learning_rates(config)
    processes.micro_batches(config.training.batch, config.training.parts)
    if sharding.fsdp_requested() and config.preview.prompts:
        raise UserError(
            "preview.prompts are drawn by one process, and FSDP leaves none with the whole base: "
            "use preview.prompts=[], or gpus.yaml instead of fsdp.yaml"
        )
    check_installed(config.log)
    config.to_toml()  # raises if it could not be written
    checkpoint = open_checkpoint(config.base)
    checkpoint.check_encoders()
    check_bucket_sizes(config.data, checkpoint.latents)
    checkpoint.latents.check_size("preview.width", config.preview.width)
    checkpoint.latents.check_size("preview.height", config.preview.height)
    if config.preview.prompts:
        check_cfg("preview.cfg", config.preview.cfg, checkpoint)
    if config.method.negative_prompt and checkpoint.guidance is not None:
        raise UserError(
            f"method.negative_prompt is {config.method.negative_prompt!r}, but the network of this base takes the "
            "guidance scale as an input, without a negative prompt: leave it out"
        )
    check_weighting(config.method, checkpoint.schedule)
    model = checkpoint.load(torch.float32, torch.device("meta"))
    if config.training.compile and model.always_recomputes:
        raise UserError(
            "training.compile is set, but the engine comfyui recomputes activations in a way that torch.compile cannot "
            "follow: set training.compile=false"
        )
    initial_weights(model, config)  # raises if adapter.* is invalid
    return checkpoint


def _find_data(config: Config, dtype: torch.dtype) -> Survey:
    """Return the survey of the data: from the cache if it is complete, otherwise by reading every picture.

    Raises UserError if there are unusable pictures (see data.skip_bad), or no usable one.
    """
    cached = open_cached(config, dtype)
    if cached is None:
        _check_writable("data.cache", config.cache_folder)
    found = cached.survey if cached else survey(config)
    if not found.pictures:
        raise UserError(found.refusal())
    return found


def _check_writable(key: str, folder: Path) -> None:
    """Raise UserError if no file can be created in `folder`, or in its closest existing parent if it does not exist."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{key} is {folder}, but nothing can be written into {existing} ({error.strerror}): choose another, or "
            "make it writable"
        ) from error


def _check_learning_rates(config: Config) -> None:
    """Raise UserError if the learning rates of the LoRA and the embedding are 0, or their weights are frozen."""
    training, embedded = config.training, config.method.target_time
    if training.lr and not config.adapter.freeze or embedded and training.target_time_lr:
        return
    rates = f"training.lr is {training.lr:g}"
    rates += f", target_time_lr {training.target_time_lr:g}" if embedded else ""
    frozen = " and adapter.freeze is set" if config.adapter.freeze else ""
    raise UserError(f"{rates}{frozen}, so that nothing would be trained: use more than 0, such as 1e-4")
