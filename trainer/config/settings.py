"""One run as one validated value.

Flows in: a TOML file and `section.key=value` overrides.  Flows out: a frozen `Config`, or a `UserError` that names the
key, the value received and what is allowed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from ...tcd import TargetInput
from ...tcd.lora_metadata import DEFAULT_CFG, DEFAULT_ETA, DEFAULT_STEPS
from ...tcd.objective import DistanceName, Weighting
from ...tcd.times import Law
from ..errors import UserError
from .cross_checks import check_together
from .schema import FREE, build, differences, override
from .schema import number as _number

FILE_NAME = "config.toml"
"""Of a run's settings, in its output folder."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The model to distill."""

    path: str
    """A single-file checkpoint or a diffusers folder of SD1.5, SD2.x or SDXL, or `tiny`, which is embedded here."""
    vae: str = ""
    """A VAE's file or folder, instead of the one that the model brings along."""
    prediction: Literal["auto", "eps", "v"] = "auto"
    """What the UNet predicts; `auto` asks the model, and takes eps where it is silent."""
    zero_snr: Literal["auto", "yes", "no"] = "auto"
    """Whether the noise schedule ends without any signal; `auto` asks the model, and takes no where it is silent."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights: `auto` is bfloat16 on a GPU and float32 on a CPU.  The adapter is always float32."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources: a table of `[[data.sources]]`."""

    path: str
    """A folder of images with .txt captions, or with a metadata.jsonl; a .tar shard, or a pattern of them such as
    `shards/*.tar`; or a .txt file of prompts, one a line."""
    repeats: float = _number(1.0, 0.001, 10000.0)
    """How often an epoch shows each of its pictures; of 0.5, every second epoch shows each."""
    weight: float = _number(0.0, 0.0)
    """Instead of `repeats`: what share of an epoch is from here, relative to the weights of the others."""


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How the teacher draws the latents of prompts that have no pictures."""

    per_prompt: int = _number(1, 1, 10000)
    """Pictures of each prompt, from different noise."""
    steps: int = _number(25, 1, 50)
    """Steps of DPM-Solver++(2M), which is deterministic."""
    guidance: float = _number(6.0, 1.0)
    """Scale of the classifier-free guidance that they are drawn with; 1 is none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures to distill on."""

    folder: str = ""
    """Images, each with a caption of the same name in a .txt file beside it, or all with theirs in metadata.jsonl."""
    prompts: str = ""
    """A text file, one prompt a line: the teacher draws the pictures itself."""
    sources: tuple[SourceConfig, ...] = ()
    """Several of these, each as a table `[[data.sources]]`."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    resolution: int = _number(512, 8, 4096)
    """Pictures are trained at about resolution^2 pixels; a multiple of 8."""
    buckets: bool = True
    """Keep the aspect of pictures, in buckets from 1:4 to 4:1; otherwise they are cropped to squares."""
    bucket_step: int = _number(64, 8, 512)
    """Sides of buckets are multiples of it; a multiple of 8."""
    upscale: bool = False
    """Enlarge pictures that are smaller than `resolution`, which otherwise get smaller buckets."""
    skip_bad: bool = False
    """Leave out, and count, what does not decode, is too small or has no caption; otherwise a run refuses to start."""
    caption_dropout: float = _number(0.0, 0.0, 1.0)
    """Share of the captions that are replaced by the empty one."""
    cache: str = field(default="", metadata=FREE)
    """Folder of cached latents and embeddings, which several runs can share; empty is `cache` in the output folder."""

    def __post_init__(self) -> None:
        for key in ("resolution", "bucket_step"):
            if getattr(self, key) % 8:
                raise UserError(f"data.{key} is {getattr(self, key)}: use a multiple of 8")
        if self.bucket_step > self.resolution:
            raise UserError(
                f"data.bucket_step is {self.bucket_step}, above data.resolution, {self.resolution}: use at most that"
            )
        if not (self.folder or self.prompts or self.sources):
            raise UserError("data.folder is missing: name a folder of pictures, or set data.prompts or data.sources")
        weighted = [bool(source.weight) for _, source in self.named_sources]
        if any(weighted) and not all(weighted):
            raise UserError(
                f"data.sources: {sum(weighted)} of {len(weighted)} sources have a weight: give one to all or to none"
            )

    @property
    def named_sources(self) -> list[tuple[str, SourceConfig]]:
        """All sources, each with the key that names it in messages."""
        alone = [(f"data.{key}", getattr(self, key)) for key in ("folder", "prompts")]
        several = [(f"data.sources[{i}].path", source) for i, source in enumerate(self.sources)]
        return [(key, SourceConfig(path=path)) for key, path in alone if path] + several

    @property
    def summary(self) -> str:
        """The sources by their paths, in one line."""
        return ", ".join(source.path for _, source in self.named_sources)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The distillation."""

    law: Law = "uniform"
    """How the target time s is drawn: `uniform` on the grid up to t_next is TCD, `zero` is LCM, `segment` is TSCD (of
    Hyper-SD), `phase` is PCM, `target` is TDD."""
    phases: tuple[int, ...] = (8, 4, 2, 1)
    """For `segment` and `phase`, into how many parts time is divided; if several, each has an equal share of the steps.
    PCM is one number, that of the steps which will be sampled."""
    diagonal: float = _number(0.0, 0.0, 1.0)
    """Share of each batch with s = t_next, where the target is the teacher's own step; it keeps many steps good."""
    to_clean: float = _number(0.0, 0.0, 1.0)
    """Share of each batch with s = 0, which keeps one step good. `law` draws s for the rest."""
    order: Literal[1, 2] = 1
    """Of the student's jump: 1 is TCF(1), 2 is TCF(2), with two calls of the network for one."""
    origin_steps: int = _number(50, 1, 1000)
    """Points of the timestep grid on which t is drawn: 50 is 19, 39 ... 999."""
    skip: int = _number(20, 1, 999)
    """Length k of the teacher's solver step, in training timesteps."""
    guidance_min: float = _number(2.0, 0.0)
    """Least scale of the teacher's guidance, which is drawn for each picture, uniformly up to `guidance_max`."""
    guidance_max: float = _number(8.0, 0.0)
    """Greatest scale of the teacher's guidance; if both are 1, there is none."""
    distance: DistanceName = "huber"
    """Pseudo-Huber of each element, or of the root mean square of each picture; or the mean square."""
    huber_c: float = _number(0.001, 1e-6)
    """Pseudo-Huber: errors well above c count linearly, errors well below it quadratically."""
    weighting: Weighting = "none"
    """Of a picture: `gap` divides by the jump's length in solver steps, `x0` by the weight that x0 has in the jump."""
    ema_decay: float = _number(0.0, 0.0, 0.9999)
    """The target is an exponential moving average of the adapter with this decay; with 0 it is the student itself."""
    target_time: bool = False
    """Tell the network the target time (TCF(S+)), by an embedding of it that is trained along with the LoRA."""
    target_input: TargetInput = "s"
    """With `target_time`, what is embedded: the target time, or how far before t it is."""

    @property
    def embedded(self) -> TargetInput | None:
        """What of the target time is embedded, or None."""
        return self.target_input if self.target_time else None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The LoRA."""

    rank: int = _number(64, 1, 1024)
    """Rank of the update of each layer: a higher one can learn more, and makes a larger file."""
    alpha: float = _number(64.0, 1e-6)
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all",)
    """Groups of modules, `all`, `attention`, `feed_forward` and `convolution`, or kinds of module, such as `to_q`."""
    start_from: str = ""
    """A LoRA file of the same rank, alpha and targets to begin with; nothing is the identity."""
    freeze: bool = False
    """Leave the LoRA as it is, and train nothing but the embedding of `method.target_time`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimization."""

    steps: int = _number(1000, 1)
    """Number of updates of the weights."""
    batch: int = _number(8, 1)
    """Pictures of a step, over all processes and parts."""
    accumulate: int = _number(1, 1, free=True)
    """Parts in which a process takes its share of a step, one after another: more parts need less memory and more
    time; the result is the same to rounding."""
    gradient_checkpointing: bool = field(default=False, metadata=FREE)
    """Keep few activations for the gradient, and compute the others again: less memory, more time."""
    compile: bool = field(default=False, metadata=FREE)
    """Run the UNet through `torch.compile`, which takes minutes at the start."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps its moments in 8 bits, a quarter of the memory; it needs bitsandbytes."""
    lr: float = _number(1e-4, 0.0)
    """Peak learning rate of AdamW; it falls to zero along a cosine."""
    target_time_lr: float = _number(1e-3, 0.0)
    """The same of the embedding of `method.target_time`."""
    warmup_steps: int = _number(0, 0)
    """Steps at the start in which the learning rate rises linearly to its peak."""
    weight_decay: float = _number(1e-2, 0.0)
    """AdamW's decay of the adapter's weights towards zero."""
    clip: float = _number(1.0, 1e-9)
    """Greatest norm of the gradient."""
    seed: int = _number(0, 0, 2**63 - 1)
    """Of everything random: the adapter's first weights, the order of the pictures, the times and the noise."""
    device: str = field(default="auto", metadata=FREE)
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` ...; each of several processes takes a GPU of its own."""
    checkpoint_every: int = _number(500, 1, free=True)
    """Steps from one checkpoint to the next; a run that was ended goes on from the last when it is started again."""
    keep_checkpoints: int = _number(2, 1, free=True)
    """Number of checkpoints kept, the newest; they are removed when the run is finished."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the LoRA goes, and what it says of itself."""

    folder: str
    """Folder of the LoRA, its configuration, checkpoints, previews and report; one for each run."""
    name: str = "tcd-lora"
    """The file is `folder/name.safetensors`."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Of the tensors in the file."""
    steps: int = _number(DEFAULT_STEPS, 1, 50)
    """Number of sampling steps that the file recommends, in its metadata, which the nodes read."""
    eta: float = _number(DEFAULT_ETA, 0.0, 1.0)
    """Eta, the paper's gamma, that the file recommends: 0 adds no noise between steps, 1 as much as LCM does."""
    cfg: float = _number(DEFAULT_CFG, 0.0)
    """Guidance scale that the file recommends; 1 is none."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures drawn while training, each time from the LoRA file that could be taken away then."""

    prompts: tuple[str, ...] = ()
    """What to draw; with none there are no previews."""
    every: int = _number(250, 1)
    """Steps from one preview to the next; there is one before the first step and one after the last, too."""
    seeds: tuple[int, ...] = _number((0,), 0, 2**63 - 1)
    """Each prompt is drawn from each of these seeds."""
    steps: tuple[int, ...] = _number((1, 2, 4, 8), 1, 50)
    """Each is drawn with each of these numbers of sampling steps."""
    eta: float = _number(DEFAULT_ETA, 0.0, 1.0)
    """Eta with which the student is sampled; the teacher adds no noise."""
    cfg: float = _number(DEFAULT_CFG, 0.0)
    """Guidance scale of the student; the teacher has 50 steps at the middle of `method`'s guidance range."""
    width: int = _number(0, 0, 4096)
    """Of the pictures, in pixels, a multiple of 8; 0 is `data.resolution`."""
    height: int = _number(0, 0, 4096)
    """Of the pictures, in pixels, a multiple of 8; 0 is `data.resolution`."""

    def __post_init__(self) -> None:
        for key in ("width", "height"):
            if getattr(self, key) % 8:
                raise UserError(f"preview.{key} is {getattr(self, key)}: use a multiple of 8")
        for key in ("seeds", "steps"):
            if not getattr(self, key):
                raise UserError(f"preview.{key} is empty: give at least one, or no preview.prompts for no previews")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the numbers of each step go, besides log.csv in the output folder."""

    tensorboard: bool = False
    """Write event files into the folder tensorboard in the output folder; it needs the package tensorboard."""
    wandb_project: str = ""
    """The Weights & Biases project to log to; it needs the package wandb."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run."""

    base: BaseConfig
    data: DataConfig
    output: OutputConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig, metadata=FREE)
    log: LogConfig = field(default_factory=LogConfig, metadata=FREE)

    def __post_init__(self) -> None:
        check_together(self)

    @property
    def output_folder(self) -> Path:
        """The folder of the LoRA and of the configuration that made it."""
        return Path(self.output.folder).expanduser()

    @property
    def cache_folder(self) -> Path:
        """The folder of cached latents and embeddings."""
        return Path(self.data.cache).expanduser() if self.data.cache else self.output_folder / "cache"

    @property
    def lora_path(self) -> Path:
        """The file that the run writes."""
        return self.output_folder / f"{self.output.name}.safetensors"

    def to_toml(self) -> str:
        """The resolved configuration, as a file that `load` reads back to an equal value."""
        return tomli_w.dumps(asdict(self))


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply overrides such as `training.steps=500`, and validate the whole.

    Raises UserError for a missing or malformed file and for anything that `from_mapping` refuses.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file at {path}, nor a recipe of that name") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from error
    for text in overrides:
        override(values, text)
    return from_mapping(values)


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested mappings.

    Raises UserError for an unknown or missing key, a wrong type, and a value out of range.
    """
    config: Config = build(Config, values)
    return config


def changes(old: Config, new: Config) -> list[str]:
    """The settings, in words, of which another value would give another LoRA."""
    return list(differences(old, new))
