"""One run as one validated value.

Flows in: a TOML file and `section.key=value` overrides.  Flows out: a frozen `Config`, or a `UserError` that names the
key, the value received and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from trainer.errors import UserError


def _number(default: float, low: float, high: float = math.inf) -> Any:
    """A numeric field with an inclusive range."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The model to distill."""

    path: str
    """A single-file SD1.5 checkpoint, a diffusers folder, or `tiny`, the family that is embedded here."""
    prediction: Literal["auto", "eps", "v"] = "auto"
    """What the UNet predicts; `auto` asks the file, and takes eps where it is silent."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights: `auto` is bfloat16 on a GPU and float32 on a CPU.  The adapter is always float32."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures to distill on."""

    folder: str
    """Images, each with a caption of the same name in a .txt file beside it."""
    resolution: int = _number(512, 8, 4096)
    """Side of the square that pictures are resized and center-cropped to, in pixels; a multiple of 8."""
    caption_dropout: float = _number(0.0, 0.0, 1.0)
    """Share of the captions that are replaced by the empty one."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The distillation."""

    law: Literal["uniform", "zero"] = "uniform"
    """How the target time s is drawn: `uniform` on the grid up to t_next is TCD, `zero` is LCM."""
    origin_steps: int = _number(50, 1, 1000)
    """Points of the timestep grid on which t is drawn: 50 is 19, 39 ... 999."""
    skip: int = _number(20, 1, 999)
    """Length k of the teacher's solver step, in training timesteps."""
    guidance_min: float = _number(2.0, 0.0)
    guidance_max: float = _number(8.0, 0.0)
    """The teacher's guidance is drawn uniformly between the two, per picture; 1 is none."""
    huber_c: float = _number(0.001, 1e-6)
    """Pseudo-Huber: errors well above c count linearly, errors well below it quadratically."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The LoRA."""

    rank: int = _number(64, 1, 1024)
    alpha: float = _number(64.0, 1e-6)
    """The update is scaled by alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimization."""

    steps: int = _number(1000, 1)
    batch: int = _number(8, 1)
    lr: float = _number(1e-4, 0.0)
    """Peak learning rate of AdamW; it falls to zero along a cosine."""
    warmup_steps: int = _number(0, 0)
    weight_decay: float = _number(1e-2, 0.0)
    clip: float = _number(1.0, 1e-9)
    """Greatest norm of the gradient."""
    seed: int = _number(0, 0, 2**63 - 1)
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` ..."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the LoRA goes, and what it says of itself."""

    folder: str
    name: str = "tcd-lora"
    """The file is `folder/name.safetensors`."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    steps: int = _number(4, 1, 50)
    eta: float = _number(0.3, 0.0, 1.0)
    cfg: float = _number(1.0, 0.0)
    """Settings recommended for sampling, written into the file's metadata and read by the nodes."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that determines a run."""

    base: BaseConfig
    data: DataConfig
    output: OutputConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.data.resolution % 8:
            raise UserError(f"data.resolution is {self.data.resolution}: use a multiple of 8")
        if self.method.guidance_min > self.method.guidance_max:
            raise UserError(
                f"method.guidance_min is {self.method.guidance_min}, above method.guidance_max, "
                f"{self.method.guidance_max}: exchange them"
            )
        if 1000 % self.method.origin_steps:
            raise UserError(f"method.origin_steps is {self.method.origin_steps}: use a divisor of 1000, such as 50")
        if not self.output.name or Path(self.output.name).name != self.output.name:
            raise UserError(f"output.name is {self.output.name!r}: use a plain file name without folder or ending")

    @property
    def data_folder(self) -> Path:
        """The folder of pictures."""
        return Path(self.data.folder).expanduser()

    @property
    def output_folder(self) -> Path:
        """The folder of the LoRA and of the configuration that made it."""
        return Path(self.output.folder).expanduser()

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
        raise UserError(f"there is no configuration file at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        _override(values, override)
    return from_mapping(values)


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from nested mappings.

    Raises UserError for an unknown or missing key, a wrong type, and a value out of range.
    """
    config: Config = _build(Config, values, "")
    return config


def _override(values: dict[str, Any], override: str) -> None:
    """Put `section.key=value` into `values`; the value is TOML, or else a bare string."""
    path, separator, text = override.partition("=")
    section, dot, key = path.strip().partition(".")
    if not (separator and dot and key):
        raise UserError(f"{override!r} is not an override: write section.key=value, such as training.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = values.setdefault(section, {})
    if not isinstance(table, dict):
        raise UserError(f"{section} is {table!r}, but must be a section: write [{section}]")
    table[key] = value


def _build(kind: type, values: object, where: str) -> Any:
    """Build the dataclass `kind` from a mapping, checking every key and value; `where` ends with a dot or is empty."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip('.')} is {values!r}, but must be a section: write [{where.rstrip('.')}]")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"the keys here are {', '.join(hints)}"
            raise UserError(f"unknown key {where}{key}: {hint}")
    arguments = {}
    for entry in fields(kind):
        if entry.name in values:
            arguments[entry.name] = _checked(hints[entry.name], values[entry.name], where + entry.name, entry.metadata)
        elif is_dataclass(hints[entry.name]) and _required(hints[entry.name]):
            arguments[entry.name] = _build(hints[entry.name], {}, f"{where}{entry.name}.")
        elif entry.name in _required(kind):
            raise UserError(f"{where}{entry.name} is missing: set it in the file or as {where}{entry.name}=VALUE")
    return kind(**arguments)


def _required(kind: type) -> list[str]:
    """Names of the fields of a dataclass that have no default."""
    return [entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING]


def _checked(hint: Any, value: object, key: str, limits: Mapping[str, Any]) -> Any:
    """Check one value against its type, choices and range."""
    if is_dataclass(hint):
        return _build(hint, value, key + ".")  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{key} is {value!r}, but must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or isinstance(value, bool):
        raise UserError(f"{key} is {value!r}, but must be {_ARTICLES[hint]}")
    if limits and not (limits["low"] <= value <= limits["high"] and math.isfinite(value)):
        upper = "" if limits["high"] == math.inf else f" and at most {limits['high']:g}"
        raise UserError(f"{key} is {value!r}, but must be at least {limits['low']:g}{upper}")
    return value


_ARTICLES = {str: "a text", int: "a whole number", float: "a number"}
