"""Distil the host's MODEL into a LoRA, by the code that the trainer uses too (tcd/distill)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...tcd import TargetTime, split_target_time, to_kohya
from ...tcd.adapter import STUDENT
from ...tcd.distill import Examples, Training, draw_examples
from ...tcd.distill.distilled import distilled_note
from ...tcd.distill.memory import MemoryFullError, memory_advice
from ...tcd.distill.step import check_weighting
from ...tcd.files.metadata import Recommended, distillation_metadata
from ...tcd.files.safetensors_file import read_safetensors
from ...tcd.files.verified_file import write_verified
from ...tcd.lora_metadata import BASE_LORAS_KEY, DEFAULT_CFG, DEFAULT_STEPS
from ...tcd.lora_weights import copy_lora, lora_tensors
from ..distill_settings import DistillSettings
from ..lora_file import LoraFile
from .distill_progress import Progress
from .lora_files import read_tensors
from .lora_model import LoraModel
from .model_name import model_metadata, model_name, model_path, model_shift
from .model_schedule import schedule_of
from .training import HostNetwork, known_distillation, time_layer_of
from .training.conditions import Conditioning
from .training.data import Captions, Drawing, GraphData, checked, drawn_pairs, pairs_of

_FOLDER = "tcd-distill"  # of unfinished runs, in the host's output folder
_SAMPLED = 4096  # numbers of each tensor that identify it
_TITLE = "tcd-lora"
_log = logging.getLogger("trajectory-consistency")


@dataclass(frozen=True)
class DataInputs:
    """The data of a run, as the host's nodes give them."""

    positive: Sequence[Conditioning]
    negative: Conditioning | None
    latents: Sequence[Mapping[str, Any]]
    """If there are none, the teacher draws them."""
    width: int
    """Of drawn pictures, in pixels."""
    height: int
    per_prompt: int
    """Number of drawn pictures for each CONDITIONING."""


class Distilled(NamedTuple):
    """The result of a run."""

    lora: LoraModel
    losses: list[float]


def distill(
    model: Any, inputs: DataInputs, settings: DistillSettings, *, start_from: LoraFile | None, preview_every: int
) -> Distilled:
    """Distil the host's MODEL, which is as before afterwards; an interrupted run of the same inputs is resumed.

    start_from: a LoRA to start from, of the same rank. preview_every: number of steps between previews; 0 for none.

    Raises ValueError for inputs that cannot be trained on, MemoryFullError with advice, and NonFiniteError.
    """
    if not inputs.positive:
        raise ValueError("there is no positive CONDITIONING: give at least one")
    with torch.inference_mode(False), _memory_advice(settings):
        patcher = _loaded(model)
        try:
            time_layer = time_layer_of(patcher.model)
        except ValueError as error:
            raise ValueError(f"the model is {model_name(patcher)}, which cannot be trained: {error}") from error
        for note in _distilled_notes(patcher):
            _log.warning("%s", note)
        check_weighting(settings, schedule_of(patcher.get_model_object("model_sampling")))
        comfy.model_management.unload_all_models()  # text encoders and VAE, which have done their work
        with HostNetwork(patcher, time_layer) as network:
            network.enable_gradient_checkpointing()
            progress = Progress(network, settings, preview_every)
            data = _data(network, inputs, settings, progress)
            run = _run_file(network, data, settings, start_from)
            _add_student(network, settings, start_from)
            training = _training(network, data, settings)
            with _kept_if_interrupted(training, run):
                _train(training, data, progress)
            return Distilled(_lora_model(network, settings, time_layer), training.losses)


def _loaded(model: Any) -> Any:
    """Return the MODEL as it can be trained: with all weights in memory, from which dynamic VRAM may move them."""
    if not (hasattr(model, "is_dynamic") and model.is_dynamic()):
        return model
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ValueError(
            f"the MODEL uses dynamic VRAM, and ComfyUI cannot load it without ({error}): take the MODEL from a loader "
            "node, or start ComfyUI with --disable-dynamic-vram"
        ) from error


def _distilled_notes(patcher: Any) -> tuple[str, ...]:
    """Return a warning if the model is distilled already, by what it says itself or by the name of its file."""
    path = model_path(patcher)
    name = path.stem if path else ""
    return distilled_note([name], known_distillation(patcher.model, name))


def _data(network: HostNetwork, inputs: DataInputs, settings: DistillSettings, progress: Progress) -> GraphData:
    """Return the training data; without latents, drawn by the teacher."""
    empty = None if inputs.negative is None else checked(inputs.negative)
    is_guided = (settings.guidance_min, settings.guidance_max) != (1, 1)
    if empty is None and is_guided and not network.takes_guidance:
        raise ValueError(
            "there is no negative CONDITIONING, which the teacher's guidance needs: connect that of an empty text, or "
            "set guidance_min and guidance_max to 1 for no guidance"
        )
    if inputs.latents:
        return GraphData.of(pairs_of(network.model, inputs.latents, inputs.positive), empty)
    captions = [checked(caption) for caption in inputs.positive]
    drawing = Drawing(
        inputs.width,
        inputs.height,
        inputs.per_prompt,
        guidance=(settings.guidance_min + settings.guidance_max) / 2,
        seed=settings.seed,
        at_once=settings.batch // settings.accumulate,
    )
    return GraphData.of(drawn_pairs(network, captions, empty or captions[0], drawing, progress.draw), empty)


def _add_student(network: HostNetwork, settings: DistillSettings, start_from: LoraFile | None) -> None:
    """Add a new LoRA beside all layers that can have one, with the weights of start_from."""
    weights = network.new_weights(
        network.names.chosen(),
        rank=settings.rank,
        alpha=settings.alpha,
        seed=settings.seed,
        target_input=settings.target_input,
    )
    if start_from is not None:
        lora, embedding = split_target_time(read_tensors(start_from))
        target_input = start_from.target_input
        target_time = TargetTime.from_state_dict(embedding, target_input) if target_input else None
        try:
            copy_lora(to_kohya(lora, start_from.alpha), target_time, weights, network.names.lora_key)
        except ValueError as error:
            raise ValueError(f"start_from is {start_from.name}, {error}") from error
    network.adapter.add(STUDENT, weights)


def _training(network: HostNetwork, data: GraphData, settings: DistillSettings) -> Training:
    order = data.order(settings.batch, settings.seed)
    dropout = 0.0 if data.empty is None or network.takes_guidance else settings.caption_dropout

    def read(step: int, index: int) -> Examples[Captions]:
        rows = settings.micro_batches[index]
        latents, captions, empty = data.batch(order, step, rows, dropout)
        return draw_examples(
            latents, captions, empty, rows, method=settings, training=settings, schedule=network.schedule, step=step
        )

    return Training(network, read, settings.micro_batches, settings, settings)


def _train(training: Training, data: GraphData, progress: Progress) -> None:
    progress.start(training.step)
    while training.step < training.training.steps:
        record, _ = training.train_step()
        progress.step(record, data.latents[0][0], data.captions[0][0])


@contextmanager
def _kept_if_interrupted(training: Training, run: Path) -> Iterator[None]:
    """Resume from the file of an unfinished run; write it if the user cancels the block, and remove it at its end."""
    if run.is_file():
        # Clones, because the tensors of an open file are read when they are used.
        training.load_state_dict({name: tensor.clone() for name, tensor in read_safetensors(run)[0].items()})
        _log.info("resuming at step %d of %d, from %s", training.step, training.training.steps, run)
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        if training.step:
            run.parent.mkdir(parents=True, exist_ok=True)
            write_verified(run, {name: tensor.cpu() for name, tensor in training.state_dict().items()}, {})
            _log.info("stopped after step %d: queue the same graph again to resume from %s", training.step, run)
        raise
    run.unlink(missing_ok=True)


def _run_file(network: HostNetwork, data: GraphData, settings: DistillSettings, start_from: LoraFile | None) -> Path:
    """Return the path of the file of an unfinished run; its name follows from all that changes the result."""
    content = hashlib.sha256()
    content.update(repr({**asdict(settings), "accumulate": None}).encode())
    content.update(repr(start_from and start_from.stamp).encode())
    captions = [caption for group in data.captions for caption in group]
    conditionings = captions if data.empty is None else [*captions, data.empty]
    for ((context, options),) in conditionings:
        content.update(repr([name for name in options if not isinstance(options[name], Tensor)]).encode())
        for tensor in (context, *options.values()):
            content.update(_sample(tensor) if isinstance(tensor, Tensor) else repr(tensor).encode())
    for tensor in (*data.latents, *network.model.parameters()):
        content.update(_sample(tensor))
    return Path(folder_paths.get_output_directory(), _FOLDER, f"{content.hexdigest()[:16]}.safetensors")


def _sample(tensor: Tensor) -> bytes:
    """Return some of the numbers of a tensor; of a quantised one, as they are stored."""
    flat = getattr(tensor, "_qdata", tensor).detach().reshape(-1)
    return flat[:: max(len(flat) // _SAMPLED, 1)].float().cpu().numpy().tobytes()


def _lora_model(network: HostNetwork, settings: DistillSettings, time_layer: str) -> LoraModel:
    """Return the student. Raises RuntimeError if the host would not load it."""
    weights = network.adapter.weights[STUDENT]
    tensors = {key: tensor.cpu().clone() for key, tensor in lora_tensors(weights, network.names.lora_key).items()}
    if unloaded := network.names.unloaded_keys(tensors):
        raise RuntimeError(f"ComfyUI would not load {len(unloaded)} modules of the LoRA, such as {unloaded[0]}")
    shift = model_shift(network.patcher.get_model_object("model_sampling"))
    metadata = distillation_metadata(
        _TITLE,
        settings,
        Recommended(DEFAULT_STEPS, settings.eta, DEFAULT_CFG),
        rank=settings.rank,
        alpha=settings.alpha,
        target_input=settings.target_input,
    )
    if network.patcher.patches:
        metadata[BASE_LORAS_KEY] = "those of the graph in which it was trained"
    return LoraModel(tensors, {**metadata, **model_metadata(model_name(network.patcher), shift, time_layer)})


@contextmanager
def _memory_advice(settings: DistillSettings) -> Iterator[None]:
    """Say which inputs need less memory if it runs out within the block, and give back what the models take."""
    at_once = settings.batch // settings.accumulate
    advice = (
        f"with {at_once} pictures at a time. Use a larger accumulate (now {settings.accumulate}): it is slower and "
        "changes nothing else. Or use smaller pictures, a smaller rank or a model in 8 bits"
    )
    try:
        with memory_advice(advice):
            yield
    except MemoryFullError:
        comfy.model_management.unload_all_models()
        raise
