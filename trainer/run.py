"""One run from configuration to LoRA file.

Flows in: a validated `Config`.  Flows out: `output.folder` with the LoRA, and the resolved configuration beside it.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
from torch import nn

from .atomic import whole_file
from .config.device import placed
from .config.memory_advice import memory_advice, when_loading, when_previewing
from .config.settings import FILE_NAME, Config, changes, load
from .data.buckets import Size
from .data.cache import made_from, open_cached
from .data.encode import prepare
from .data.survey import Survey, survey
from .errors import UserError
from .files.export import CONFIG_DIGEST, config_digest, describe, write_lora
from .models.unet import families as bases
from .models.unet.adapter import adapter_tensors, add_adapter, freeze_lora, load_adapter_tensors, start_from
from .models.unet.network import Network
from .models.unet.single_file import SingleFile
from .models.unet.teacher import Identity, identify, load_base, locate
from .training import sharding
from .training.checkpoint import Checkpoints
from .training.loop import Observer, StepRecord, train
from .training.optimizer import optimizer_class
from .training.processes import ALONE, Processes, join
from .views.history import History
from .views.preview import Previews
from .views.preview_prompts import Scenes, encode_scenes
from .views.report import write_report
from .views.trackers import require, trackers

CHECKPOINTS = "checkpoints"
log = logging.getLogger("trajectory-consistency")


class Inputs(NamedTuple):
    """What a run reads, as far as it can be known without a model in memory."""

    base: Identity
    found: Survey


def check(config: Config, processes: Processes = ALONE) -> Inputs:
    """Look at everything that a run by so many processes needs, and load no weights.

    Raises UserError for whatever would stop the run.
    """
    _, dtype = placed(config)
    if why := taken(config):
        raise UserError(why)
    base = _check_base(config, processes)
    _checkpoints(config, dtype).refuse_others()
    return Inputs(base, _find(config, dtype))


def look(config: Config) -> Inputs:
    """The same of one process, but for what is in the output folder, which may be of another run."""
    _, dtype = placed(config)
    return Inputs(_check_base(config, ALONE), _find(config, dtype))


def _check_base(config: Config, processes: Processes) -> Identity:
    """Refuse settings, and a base, by which nothing could be trained; what the base is."""
    _check_writable("output.folder", config.output_folder)
    optimizer_class(config.training)
    _check_rates(config)
    processes.parts(config.training.batch, config.training.accumulate)
    if sharding.wanted() and config.preview.prompts:
        raise UserError(
            "preview.prompts are drawn by one process, and FSDP leaves none with the whole base: "
            "use preview.prompts=[], or gpus.yaml in the place of fsdp.yaml"
        )
    require(config.log)
    base = config.base
    identity = identify(base.path, prediction=base.prediction, zero_snr=base.zero_snr, vae=base.vae)
    if config.adapter.start_from:
        _check_start(config, identity)
    return identity


def _find(config: Config, dtype: torch.dtype) -> Survey:
    """The pictures and captions that there are, in the cache or where they come from."""
    cached = open_cached(config, dtype)
    if cached is None:
        _check_writable("data.cache", config.cache_folder)
    return cached.found if cached else survey(config)


def plan(config: Config, inputs: Inputs) -> str:
    """Say in words what a run would do."""
    training, method, found = config.training, config.method, inputs.found
    device, dtype = placed(config)
    return "\n".join(
        [
            f"base      {config.base.path} ({inputs.base}), in {dtype} on {device}",
            *(f"          {note}" for note in inputs.base.notes),
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


def run(config: Config) -> Path:
    """Distill, or go on with it from the last checkpoint in the output folder, and return the LoRA file's path.

    Of several processes the first looks at everything and writes everything.  Raises UserError for bad input, what
    `prepare` and `train` raise, and ExportError when the file does not hold up.
    """
    device, dtype = placed(config)
    processes, device = join(device)
    if processes.once(lambda: _finish(config)):
        return config.lora_path
    inputs = processes.once(lambda: check(config, processes))
    if processes.main:
        log.info("%s", plan(config, inputs))
    dataset = prepare(
        config, device, dtype, part=processes.rank, parts=processes.count, total=inputs.found.seen, wait=processes.wait
    )
    checkpoints = processes.once(lambda: _going_on(config, dtype))
    scenes = _scenes(config, device, dtype) if processes.main and config.preview.prompts else None
    student, parameters, metadata = _student(config, device, dtype)
    if sharding.wanted():
        sharding.shard(student.unet, parameters, device, processes)
    observers: list[Observer] = []
    if processes.main:
        _claim(config)
        observers += [History(config.output_folder), *trackers(config)]
        if scenes is not None:
            observers.append(_previews(Previews(student, scenes, config, metadata), config))
        if checkpoints.steps():
            log.info("going on from step %d of %d", checkpoints.steps()[0], config.training.steps)
    train(student, parameters, dataset, config, observers=observers, checkpoints=checkpoints, processes=processes)
    if processes.main:
        if sharding.wanted():
            student = _whole(student, config, device, dtype)
        report = write_report(config.output_folder)
        any_caption = dataset.batch(0, 1, seed=config.training.seed, caption_dropout=0).cond
        write_lora(config.lora_path, student, config, metadata, any_caption.to(device), final=True)
        checkpoints.clear()
        log.info("wrote %s; look at %s", config.lora_path, report)
    processes.wait()
    return config.lora_path


def _scenes(config: Config, device: torch.device, dtype: torch.dtype) -> Scenes:
    """What previews draw, encoded."""
    preview, side = config.preview, config.data.resolution
    size = Size(preview.height or side, preview.width or side)
    with memory_advice(when_previewing(config)):
        return encode_scenes(preview.prompts, preview.seeds, size, base=config.base.path, device=device, dtype=dtype)


def _previews(previews: Previews, config: Config) -> Observer:
    """Draw the pictures of the start; return the observer that draws the later ones."""
    advice = when_previewing(config)

    def observe(record: StepRecord) -> None:
        with memory_advice(advice):
            previews(record)

    with memory_advice(advice):
        previews.start()
    return observe


def _student(
    config: Config, device: torch.device, dtype: torch.dtype
) -> tuple[Network, list[nn.Parameter], dict[str, str]]:
    """The base with an adapter on it as training begins, the adapter's parameters, and the file's metadata."""
    settings = config.base
    with memory_advice(when_loading(dtype)):
        base = load_base(settings.path, prediction=settings.prediction, zero_snr=settings.zero_snr, dtype=dtype)
        network = Network(base.unet.to(device), base.alpha_bar.float().to(device), base.prediction)
    adapter, seed = config.adapter, config.training.seed
    told = config.method.told if config.method.target_time else None
    parameters = add_adapter(
        network.unet, rank=adapter.rank, alpha=adapter.alpha, seed=seed, targets=adapter.targets, told=told
    )
    if adapter.start_from:
        start_from(network.unet, Path(adapter.start_from).expanduser(), adapter.alpha)
    if adapter.freeze:
        parameters = freeze_lora(network.unet)
    return network, parameters, describe(config, base, locate(config.base.path))


def _whole(sharded: Network, config: Config, device: torch.device, dtype: torch.dtype) -> Network:
    """The same network with its weights whole, for what one process does alone."""
    network, _, _ = _student(config, device, dtype)
    trained = adapter_tensors(sharded.unet)
    load_adapter_tensors(network.unet, {name: trained[name] for name in adapter_tensors(network.unet)})
    return network


def _checkpoints(config: Config, dtype: torch.dtype) -> Checkpoints:
    """The checkpoints of a run, which are of what it is made from, as far as that is known before all is cached."""
    training, folder = config.training, config.output_folder / CHECKPOINTS
    return Checkpoints(folder, training.checkpoint_every, training.keep_checkpoints, made_from(config, dtype))


def _going_on(config: Config, dtype: torch.dtype) -> Checkpoints:
    """The checkpoints of a run whose data are cached, found to be of the same data and model."""
    checkpoints = _checkpoints(config, dtype)
    checkpoints.refuse_others()
    return checkpoints


def _finish(config: Config) -> bool:
    """Whether a run of these settings is finished; what it was killed before, if it was, is done now."""
    if not is_finished(config):
        return False
    report = write_report(config.output_folder)
    Checkpoints(config.output_folder / CHECKPOINTS, 1, 1).clear()
    log.info("%s is there, and the run is done; look at %s", config.lora_path, report)
    return True


def is_finished(config: Config) -> bool:
    """Whether the LoRA is there, and is of the run that the output folder is of, which has settings equal to these."""
    saved = Checkpoints(config.output_folder / CHECKPOINTS, 1, 1).steps()
    if not config.lora_path.is_file() or (saved and saved[0] < config.training.steps):
        return False
    try:
        ended = load(config.output_folder / FILE_NAME)
        metadata = SingleFile(config.lora_path).metadata
    except UserError:
        return False
    return not changes(ended, config) and metadata.get(CONFIG_DIGEST) == config_digest(ended)


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


def _check_start(config: Config, base: Identity) -> None:
    """Refuse a LoRA to start from that does not fit the adapter, by its names, shapes and alphas alone."""
    adapter, path = config.adapter, Path(config.adapter.start_from).expanduser()
    if not path.is_file():
        raise UserError(f"adapter.start_from is {path}, where there is no file")
    told = config.method.told if config.method.target_time else None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter", UserWarning)
        unet = bases.empty_unet(base.family).requires_grad_(False)
        add_adapter(unet, rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=adapter.targets, told=told)
        start_from(unet, path, adapter.alpha)


def _check_rates(config: Config) -> None:
    """Refuse learning rates with which nothing would be trained."""
    training, told = config.training, config.method.target_time
    if training.lr and not config.adapter.freeze or told and training.target_time_lr:
        return
    rates = f"training.lr is {training.lr:g}" + (f", target_time_lr {training.target_time_lr:g}" if told else "")
    frozen = " and adapter.freeze is set" if config.adapter.freeze else ""
    raise UserError(f"{rates}{frozen}, so that nothing would be trained: use more than 0, such as 1e-4")


def taken(config: Config) -> str:
    """Why the output folder is not free: it holds a finished run, or one that gives another LoRA; empty when it is."""
    folder = config.output_folder
    if folder.exists() and not folder.is_dir():
        return f"output.folder is {folder}, which is a file: choose another"
    if config.lora_path.exists():
        return f"{config.lora_path} exists: choose another output.folder or output.name, or remove it"
    other = folder / FILE_NAME
    if not other.exists():
        left = Checkpoints(folder / CHECKPOINTS, 1, 1).steps()
        return f"{folder} has checkpoints but no {FILE_NAME}: choose another output.folder" if left else ""
    try:
        changed = changes(load(other), config)
    except UserError:
        changed = [f"{other} is not a configuration that this version can read"]
    if not changed:
        return ""
    return f"{folder} is of a run with other settings, {'; '.join(changed)}: choose another output.folder"


def _claim(config: Config) -> None:
    """Write the resolved configuration into the output folder."""
    config.output_folder.mkdir(parents=True, exist_ok=True)
    with whole_file(config.output_folder / FILE_NAME) as unfinished:
        unfinished.write_text(config.to_toml(), encoding="utf-8")
