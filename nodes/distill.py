"""The node that distils a model into a LoRA."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from . import host
from .distill_settings import GOOD, PRESETS, DistillSettings
from .lora_types import LoraModel, LossMap

_NEW = "new LoRA"


class TCDDistill(io.ComfyNode):
    """Trains a LoRA with which the model samples in a few steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's schema; the host asks for it repeatedly, so the list of files stays current."""
        return io.Schema(
            node_id="TCDDistill",
            display_name="TCD Distill",
            category="model/training",
            description=(
                "Distils a model into a TCD LoRA (arXiv 2402.19159), with which it samples in a few steps. It learns "
                "from captions and pictures, or from captions alone. If you cancel it, queue the same graph again to "
                "resume."
            ),
            is_input_list=True,
            inputs=[*_data_inputs(), *_training_inputs(), *_method_inputs(), *_optional_inputs()],
            outputs=[
                LoraModel.Output(
                    display_name="lora",
                    tooltip="The LoRA, for TCD LoRA Model Loader, TCD Save LoRA and ComfyUI's own nodes.",
                ),
                LossMap.Output(display_name="loss_map", tooltip="The loss of each step, for ComfyUI's loss graph."),
                io.Int.Output(display_name="steps_done", tooltip="Number of training steps done."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, start_from: Sequence[str | None] = (_NEW,), **_: object) -> object:
        """Return a value that changes if the file of start_from does: the host then runs the node again."""
        (name,) = start_from
        return name if name in (None, _NEW) else host.lora_stamp(name)

    @classmethod
    def execute(
        cls,
        positive: list[Any],
        negative: Sequence[Any] = (),
        latents: Sequence[Any] = (),
        **values: list[Any],
    ) -> io.NodeOutput:
        """Return the LoRA, the losses and the number of steps. All inputs are lists; each setting has one value."""
        one = {name: value[0] for name, value in values.items()}
        settings = DistillSettings.from_preset(
            one["preset"],
            steps=one["training_steps"],
            batch=one["batch"],
            accumulate=one["accumulate"],
            rank=one["rank"],
            lr=one["learning_rate"],
            seed=one["seed"],
            target_time=one["target_time"],
            guidance_min=one["guidance_min"],
            guidance_max=one["guidance_max"],
        )
        inputs = host.DataInputs(
            positive,
            negative[0] if negative else None,
            latents,
            width=one.get("width", 1024),
            height=one.get("height", 1024),
            per_prompt=one.get("per_prompt", 1),
        )
        start_from = one.get("start_from", _NEW)
        found = host.distill(
            one["model"],
            inputs,
            settings,
            start_from=None if start_from == _NEW else host.read_lora(start_from),
            preview_every=one.get("preview_every", 50),
        )
        return io.NodeOutput(found.lora, {"loss": found.losses}, len(found.losses))


def _data_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The teacher, the paper's f_phi: a model that is not distilled yet."),
        io.Conditioning.Input(
            "positive",
            tooltip="The captions: one for each latent, or one for all. Lists, as Make Training Dataset and Load "
            "Training Dataset give them, and single ones.",
        ),
    ]


def _training_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default=GOOD,
            tooltip="How long and how large: it sets training_steps, batch, accumulate, rank and learning_rate where "
            "they are 0. fast try is to see that it works.",
        ),
        io.Int.Input("training_steps", default=0, min=0, max=100000, tooltip="Number of training steps; 0: by preset."),
        io.Int.Input("batch", default=0, min=0, max=1024, tooltip="Number of pictures in a step; 0: by preset."),
        io.Int.Input(
            "accumulate",
            default=0,
            min=0,
            max=1024,
            tooltip="Number of equal parts into which a batch is divided. More parts need less memory and more time, "
            "and change nothing else; 0: by preset.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.000001,
            tooltip="Peak learning rate; it falls to zero at the end. 0: by preset.",
        ),
        io.Int.Input(
            "rank",
            default=0,
            min=0,
            max=1024,
            tooltip="Rank of the LoRA. A higher rank can learn more, but makes a larger file; 0: by preset.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53 - 1,  # the largest whole number of a browser
            control_after_generate=False,  # a browser would draw another seed at each run: no cache, and no resume
            tooltip="Seed of the initial weights, the order of the pictures, the times and the noise.",
        ),
    ]


def _method_inputs() -> list[Any]:
    return [
        io.Boolean.Input(
            "target_time",
            default=True,
            tooltip="Tell the network the target time s too, the paper's TCF(S+): better in one and two steps. The "
            "LoRA then needs this pack's loader and sampler.",
        ),
        io.Float.Input(
            "guidance_min",
            default=2.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Lowest guidance of the teacher, the paper's omega. It is drawn from the range for each picture.",
        ),
        io.Float.Input(
            "guidance_max",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Highest guidance of the teacher, the paper's omega. If both are 1, there is no guidance. For "
            "Flux, set both to the value that you sample with, such as 3.5.",
        ),
    ]


def _optional_inputs() -> list[Any]:
    return [
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="The empty caption, for the teacher's guidance. A model with a guidance input, such as Flux dev, "
            "needs none.",
        ),
        io.Latent.Input(
            "latents",
            optional=True,
            tooltip="The pictures, encoded: a list or batches. If nothing is connected, the teacher draws them.",
        ),
        io.Combo.Input(
            "start_from",
            options=[_NEW, *host.lora_names()],
            default=_NEW,
            optional=True,
            tooltip="A LoRA in models/loras to train further. It must have the same rank and be of the same model.",
        ),
        io.Int.Input(
            "width",
            default=1024,
            min=16,
            max=16384,
            step=8,
            optional=True,
            tooltip="Width of the pictures that the teacher draws, in pixels, if there are no latents.",
        ),
        io.Int.Input(
            "height",
            default=1024,
            min=16,
            max=16384,
            step=8,
            optional=True,
            tooltip="Height of the pictures that the teacher draws, in pixels, if there are no latents.",
        ),
        io.Int.Input(
            "per_prompt",
            default=1,
            min=1,
            max=10000,
            optional=True,
            tooltip="Number of pictures that the teacher draws for each caption, if there are no latents.",
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=100000,
            optional=True,
            tooltip="Number of steps between preview pictures, drawn in 4 steps from the first caption; 0: none.",
        ),
    ]
