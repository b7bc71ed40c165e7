"""A training run: distill according to a configuration, and write the LoRA, its configuration and logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..tcd.adapter import STUDENT
from ..tcd.distill import StepRecord
from ..tcd.distill.memory import memory_advice
from ..tcd.files.atomic import atomic_write, remove_unfinished
from .config.device import device_and_dtype
from .config.memory_advice import loading_advice, preview_advice
from .config.settings import FILE_NAME, Config, load
from .data.buckets import Size
from .data.encode import load_or_encode
from .files.adapter_weights import initial_weights
from .files.metadata import lora_metadata
from .files.write_lora import write_lora
from .lock import locked
from .log_file import NAME as LOG_NAME
from .log_file import log_file
from .models import open_checkpoint
from .models.seam import Checkpoint, Model
from .preflight import CHECKPOINT_FOLDER, check, checkpoints_of, is_finished, plan, saved_steps
from .training import sharding
from .training.checkpoint import Checkpoints
from .training.loop import Observer, train
from .training.memory import choose_accumulate
from .training.processes import Processes, join_processes
from .views.history import History
from .views.preview import PREVIEW_FOLDER, Previews
from .views.preview_prompts import PreviewPrompts, encode_prompts
from .views.report import write_report
from .views.trackers import start_trackers

log = logging.getLogger("trajectory-consistency")


def run(config: Config) -> Path:
    """Distill, or resume from the last checkpoint in the output folder, and return the LoRA file's path.

    With several processes, each encodes a part of the data that are not cached, and trains on a part of each batch.
    Only the main process checks the input and writes the results; all processes write into the cache.

    Raises UserError for bad input, VerificationError if the written LoRA file predicts differently from the trained
    network, and the errors of `load_or_encode` and `train`.
    """
    device, dtype = device_and_dtype(config)
    processes, device = join_processes(device)
    with ExitStack() as until_the_end:
        processes.on_main_process(lambda: until_the_end.enter_context(_output_locked(config)))
        if not processes.on_main_process(lambda: _finish_clean_up(config)):
            _distill(config, device, dtype, processes, until_the_end)
        processes.leave()
    return config.lora_path


def _distill(
    config: Config, device: torch.device, dtype: torch.dtype, processes: Processes, until_the_end: ExitStack
) -> None:
    """Do what is left of a run that is not finished; the main process has locked the output folder."""

    def prepare() -> tuple[int, int]:
        """Check everything and log the plan; return the number of samples in the data, and of parts of a step."""
        inputs = check(config, processes)
        until_the_end.enter_context(log_file(config.output_folder / LOG_NAME))
        log.info("%s", plan(config, inputs))
        return inputs.data.seen, choose_accumulate(config, inputs.checkpoint, device, dtype, processes.count)

    samples, accumulate = processes.on_main_process(prepare)
    dataset = load_or_encode(
        config,
        device,
        dtype,
        part=processes.rank,
        parts=processes.count,
        total=samples,
        on_main=processes.on_main_process,
        on_every=processes.on_every_process,
    )
    checkpoints = processes.on_main_process(lambda: _matching_checkpoints(config, dtype))
    checkpoint = open_checkpoint(config.base)
    metadata = lora_metadata(config, checkpoint)
    prompts = _preview_prompts(config, checkpoint, device) if processes.is_main and config.preview.prompts else None
    model = load_student(config, checkpoint, device, dtype)
    if sharding.fsdp_requested():
        sharding.shard(model, processes)
    observers: list[Observer] = []
    if processes.is_main:
        _log_resumption(config, checkpoints)
        _write_config(config)
        trackers = start_trackers(config)
        observers += [History(config.output_folder), *trackers]
        if prompts is not None:
            observers.append(_start_previews(Previews(model, checkpoint, prompts, config, metadata, trackers), config))
    config = config.with_accumulate(accumulate)
    train(model, dataset, config, observers=observers, checkpoints=checkpoints, processes=processes)
    if processes.is_main:
        if sharding.fsdp_requested():
            model = _unsharded(model, checkpoint, device, dtype)
        report = write_report(config.output_folder)
        any_caption = dataset.batch(0, 1, seed=config.training.seed, caption_dropout=0).cond
        write_lora(config.lora_path, model, config, metadata, any_caption.to(device), final=True)
        checkpoints.prune(1)
        log.info("wrote %s; look at %s", config.lora_path, report)
        log.info("%s is only for a larger training.steps, and may be removed", checkpoints.folder)


@contextmanager
def _output_locked(config: Config) -> Iterator[None]:
    """Lock the output folder within the block, and remove what a process that was killed has left half written."""
    folder = config.output_folder
    with locked(folder):
        for each in (folder, folder / CHECKPOINT_FOLDER, folder / PREVIEW_FOLDER):
            remove_unfinished(each, older_than=0)
        yield


def load_student(config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    """Load the base and add a student with initial weights: new ones, or those of adapter.start_from."""
    with memory_advice(loading_advice(dtype)):
        model = checkpoint.load(dtype, device)
    weights = initial_weights(model, config)
    if config.adapter.freeze:
        weights.loras.requires_grad_(False)
    model.adapter.add(STUDENT, weights)
    return model


def _preview_prompts(config: Config, checkpoint: Checkpoint, device: torch.device) -> PreviewPrompts:
    """Encode the preview prompts."""
    preview, side = config.preview, config.data.resolution
    size = Size(preview.height or side, preview.width or side)
    with memory_advice(preview_advice(config)):
        negative = config.method.negative_prompt
        return encode_prompts(checkpoint, preview.prompts, preview.seeds, size, device=device, negative=negative)


def _start_previews(previews: Previews, config: Config) -> Observer:
    """Draw the previews of step 0, and return an observer that draws the later ones."""
    advice = preview_advice(config)

    def observe(record: StepRecord) -> None:
        with memory_advice(advice):
            previews(record)

    with memory_advice(advice):
        previews.start()
    return observe


def _unsharded(sharded: Model, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    """Return the student on a new, unsharded base, which the main process can run without the others."""
    model = checkpoint.load(dtype, device)
    model.adapter.add(STUDENT, sharded.adapter.weights[STUDENT])
    return model


def _matching_checkpoints(config: Config, dtype: torch.dtype) -> Checkpoints:
    """Return the run's checkpoints, including the fingerprint of the data; requires a complete cache.

    Raises UserError if existing checkpoints were made from different data or a different model.
    """
    checkpoints = checkpoints_of(config, dtype)
    checkpoints.check_fingerprints()
    return checkpoints


def _finish_clean_up(config: Config) -> bool:
    """Return whether the run is finished already; if so, write its report and remove all but the last checkpoint.

    Both remain to be done if the run was killed just after it wrote the LoRA.
    """
    if not is_finished(config):
        return False
    report = write_report(config.output_folder)
    Checkpoints(config.output_folder / CHECKPOINT_FOLDER, 1, 1).prune(1)
    longer = "; a larger training.steps makes it longer" if saved_steps(config) else ""
    log.info("%s is there, and the run is done%s; look at %s", config.lora_path, longer, report)
    return True


def _log_resumption(config: Config, checkpoints: Checkpoints) -> None:
    """Log at which step the run resumes, and how its schedule goes on if it has another length than before."""
    saved, steps = checkpoints.steps(), config.training.steps
    if not saved:
        return
    log.info("resuming at step %d of %d", saved[0], steps)
    before = load(config.output_folder / FILE_NAME).training.steps
    if before != steps:
        log.info(
            "training.steps was %d: from here on, learning rate and method.phases are those of a run of %d steps",
            before,
            steps,
        )


def _write_config(config: Config) -> None:
    """Write the resolved configuration into the output folder."""
    config.output_folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.output_folder / FILE_NAME) as unfinished:
        unfinished.write_text(config.to_toml(), encoding="utf-8")
