"""The settings of a run, read from a TOML file and `section.key=value` overrides into a frozen, validated `Config`.

An invalid setting raises a `UserError` that names the key, the value received and what is allowed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...tcd import TargetInput
from ...tcd.lora_metadata import DEFAULT_CFG, DEFAULT_STEPS
from ...tcd.objective import DistanceName, Weighting
from ...tcd.times import Law
from ..errors import UserError
from ..user_path import user_path
from .base import BaseConfig
from .cache_place import default_cache
from .cross_checks import check_together
from .data import DataConfig
from .schema import MAY_CHANGE, PATH, build, differences, override
from .schema import number as _number

FILE_NAME = "config.toml"
"""Name of the file in the output folder that contains the run's settings."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The distillation method."""

    law: Law = "uniform"
    """How the target time s is drawn. `uniform` draws a point of the grid up to t_next (TCD); `zero` is LCM, `segment`
    is TSCD (Hyper-SD), `phase` is PCM and `target` is TDD."""
    phases: tuple[int, ...] = (8, 4, 2, 1)
    """For the laws `segment` and `phase`: number of parts that the clock is divided into. If there are several numbers,
    each is used for an equal share of the training steps. For PCM, give one number: the number of sampling steps."""
    diagonal: float = _number(0.5, 0.0, 1.0)
    """Share of each batch with s = t_next, where the target is the teacher's step. It keeps short jumps right: without
    it, pictures get a little worse with each doubling of the sampling steps. Only for a law that draws s."""
    to_clean: float = _number(0.15, 0.0, 1.0)
    """Share of each batch with s = 0, in half of it from the highest t. It keeps a single sampling step right. `law`
    draws s for the rest."""
    order: Literal[1, 2] = 1
    """Order of the student's jump. 1 is TCF(1); 2 is TCF(2), which calls the network twice for each jump."""
    origin_steps: int = _number(50, 1, 1000)
    """Number of points of the grid on which t is drawn; 50 is 19, 39 ... 999."""
    skip: int = _number(20, 1, 999)
    """Length k of the teacher's solver step, in training times: timesteps, or thousandths of a flow's clock."""
    guidance_min: float = _number(2.0, 0.0)
    """Lowest guidance scale of the teacher. The scale is drawn uniformly for each picture, up to `guidance_max`."""
    guidance_max: float = _number(8.0, 0.0)
    """Highest guidance scale of the teacher. If both are 1, there is no guidance."""
    negative_prompt: str = ""
    """Prompt of the teacher's guidance, as in a sampler's negative input; previews with guidance use it too. Captions
    that are dropped are empty all the same."""
    distance: DistanceName = "huber"
    """Distance between prediction and target. `huber` is pseudo-Huber of each element, `huber_sample` pseudo-Huber of
    each picture's root mean square, `l2` the mean square."""
    huber_c: float = _number(0.03, 1e-6)
    """c of the pseudo-Huber distances: errors well above c count linearly, errors well below c quadratically."""
    weighting: Weighting = "x0"
    """Weight of a picture's distance. `gap` divides it by the jump's length in solver steps, `x0` by the coefficient of
    x0 in the jump."""
    ema_decay: float = _number(0.95, 0.0, 0.9999)
    """Decay of the exponential moving average of the adapter that computes the target. With 0, the student itself
    computes it."""
    target_time: bool = True
    """The network also gets the target time (TCF(S+)), through an embedding that is trained together with the LoRA."""
    target_input: TargetInput = "s"
    """With `target_time`: the quantity that is embedded, the target time s or the jump's length t - s."""

    @property
    def embedded_input(self) -> TargetInput | None:
        """The quantity that is embedded for the target time, or None without an embedding."""
        return self.target_input if self.target_time else None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The LoRA."""

    rank: int = _number(64, 1, 1024)
    """Rank of each layer's update. A higher rank can learn more, but makes a larger file."""
    alpha: float = _number(64.0, 1e-6)
    """The update is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all",)
    """Layers that get a LoRA: `all`, the groups `attention`, `feed_forward` and `convolution`, or names such as
    `to_q`."""
    start_from: str = field(default="", metadata=PATH)
    """LoRA file to start from, with the same rank, alpha and targets. If empty, the initial LoRA changes nothing."""
    freeze: bool = False
    """Train only the embedding of `method.target_time`; the LoRA, usually loaded by `start_from`, stays unchanged."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimizer, and how a step is computed."""

    steps: int = _number(3000, 1, may_change=True)
    """Number of updates of the weights. With a larger number, a run is made longer, also one that is finished."""
    batch: int = _number(8, 1)
    """Number of pictures in a step, over all processes and accumulated parts."""
    accumulate: int | Literal["auto"] = _number("auto", 1, may_change=True)
    """Number of parts into which each process divides its pictures of a step. More parts need less memory and more
    time; the result is the same up to rounding. `auto` is the smallest number with which the estimated memory is free
    on a CUDA GPU, and 1 elsewhere."""
    gradient_checkpointing: bool = field(default=False, metadata=MAY_CHANGE)
    """Recompute most activations in the backward pass instead of keeping them: less memory, more time. The engine
    `comfyui` always does."""
    compile: bool = field(default=False, metadata=MAY_CHANGE)
    """Run the network through `torch.compile`, which takes minutes at the start. Not with the engine `comfyui`."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps Adam's moments in 8 bits, in a quarter of the memory; it needs bitsandbytes."""
    lr: float = _number(1e-4, 0.0)
    """Peak learning rate; from there it falls to zero along a cosine."""
    target_time_lr: float = _number(1e-3, 0.0)
    """Peak learning rate of the embedding of `method.target_time`."""
    warmup_steps: int = _number(0, 0)
    """Number of steps at the start in which the learning rate rises linearly to its peak."""
    weight_decay: float = _number(1e-2, 0.0)
    """AdamW's weight decay of the adapter's weights."""
    clip: float = _number(1.0, 1e-9)
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""
    seed: int = _number(0, 0, 2**63 - 1)
    """Seed of everything random: the adapter's initial weights, the order of the pictures, the times and the noise."""
    device: str = field(default="auto", metadata=MAY_CHANGE)
    """`cpu`, `cuda`, `cuda:1`, `mps` ... `auto` is the first that is there of `cuda`, `mps` and `cpu`. With several
    processes, each uses its own GPU."""
    checkpoint_every: int = _number(500, 1, may_change=True)
    """Number of steps between checkpoints. A stopped run resumes from the last checkpoint."""
    keep_checkpoints: int = _number(2, 1, may_change=True)
    """Number of checkpoints to keep. Of a finished run the last one stays, for a larger `steps`, until you remove
    it."""

    @property
    def parts(self) -> int:
        """`accumulate` as a number: 1 while "auto" is not resolved (`Config.with_accumulate`)."""
        return 1 if self.accumulate == "auto" else self.accumulate


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """The path of the LoRA file, and the sampling settings that its metadata recommend to the nodes."""

    folder: str = field(metadata=PATH)
    """Folder for the LoRA, its configuration, checkpoints, previews and report. Each run needs its own."""
    name: str = "tcd-lora"
    """Name of the LoRA file, without folder and extension; it becomes `folder/name.safetensors`."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Dtype of the tensors in the file."""
    steps: int = _number(DEFAULT_STEPS, 1, 50)
    """Recommended number of sampling steps, written into the file's metadata, which the nodes read."""
    eta: float = _number(0.0, 0.0, 1.0)
    """Recommended eta, the paper's gamma: with 0 sampling adds no noise between steps, with 1 as much as LCM. Without
    `method.target_time`, 0.3 is better."""
    cfg: float = _number(DEFAULT_CFG, 0.0)
    """Recommended guidance scale; 1 means no guidance."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures drawn during training, with a LoRA file that is written for each preview."""

    prompts: tuple[str, ...] = ()
    """Prompts to draw; without any there are no previews."""
    every: int = _number(250, 1)
    """Number of training steps between previews. There is also one before the first step and one after the last."""
    seeds: tuple[int, ...] = _number((0,), 0, 2**63 - 1)
    """Seeds; each prompt is drawn once for each seed."""
    steps: tuple[int, ...] = _number((1, 2, 4, 8), 1, 50)
    """Numbers of sampling steps; each prompt and seed is drawn with each of them."""
    eta: float = _number(0.0, 0.0, 1.0)
    """Eta of the student's sampler; the teacher's sampler adds no noise."""
    cfg: float = _number(DEFAULT_CFG, 0.0)
    """Guidance scale of the student. The teacher's pictures take 50 steps, with the mean of
    `method.guidance_min` and `method.guidance_max`."""
    width: int = _number(0, 0, 4096)
    """Width of the pictures in pixels, a multiple of the latent stride; 0 means `data.resolution`."""
    height: int = _number(0, 0, 4096)
    """Height of the pictures in pixels, a multiple of the latent stride; 0 means `data.resolution`."""

    def __post_init__(self) -> None:
        for key in ("seeds", "steps"):
            if not getattr(self, key):
                raise UserError(f"preview.{key} is empty: give at least one, or no preview.prompts for no previews")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the numbers of each step and the grids of the previews are logged, besides the output folder."""

    tensorboard: bool = False
    """Write event files into the folder `tensorboard` in the output folder; needs the package tensorboard."""
    wandb_project: str = ""
    """Weights & Biases project to log to; needs the package wandb."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run."""

    base: BaseConfig
    data: DataConfig
    output: OutputConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig, metadata=MAY_CHANGE)
    log: LogConfig = field(default_factory=LogConfig, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        check_together(self)

    @property
    def output_folder(self) -> Path:
        """The folder of the LoRA and its configuration."""
        return user_path(self.output.folder)

    @property
    def cache_folder(self) -> Path:
        """The folder of cached latents and embeddings."""
        data = self.data
        return user_path(data.cache) if data.cache else default_cache(data.named_sources[0][1].path)

    @property
    def lora_path(self) -> Path:
        """The path of the LoRA file that the run writes."""
        return self.output_folder / f"{self.output.name}.safetensors"

    def with_accumulate(self, parts: int) -> Config:
        """Return the configuration with this number for training.accumulate."""
        return replace(self, training=replace(self.training, accumulate=parts))

    def to_toml(self) -> str:
        """Return the resolved configuration as the text of a TOML file; `load` reads it back to an equal Config.

        Raises UserError if tomli-w is not installed.
        """
        try:
            import tomli_w
        except ImportError as error:
            raise UserError(f"writing config.toml needs tomli-w ({error}): pip install tomli-w") from error
        return tomli_w.dumps(asdict(self))


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply overrides such as `training.steps=500`, and validate the result.

    Raises UserError for a missing or malformed file, and if `from_mapping` does.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a BOM
    except FileNotFoundError:
        raise UserError(f"there is no configuration file at {path}, nor a recipe of that name") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError, RecursionError) as error:
        raise UserError(f"{path} is not a TOML file: {error}; a path with backslashes needs single quotes") from error
    for text in overrides:
        override(values, text)
    return from_mapping(values)


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested mappings; the paths of the base become absolute.

    Raises UserError for an unknown or missing key, a wrong type, and a value out of range.
    """
    config: Config = build(Config, values)
    return replace(config, base=config.base.absolute())


def changes(old: Config, new: Config) -> list[str]:
    """Return one message for each setting that differs and may not change on resuming."""
    return list(differences(old, new))
