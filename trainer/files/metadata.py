"""The metadata that the trainer writes into a LoRA file."""

from __future__ import annotations

import datetime
import hashlib
import json
import tomllib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...tcd.lora_metadata import (
    BASE_LORAS_KEY,
    CFG_KEY,
    ETA_KEY,
    RESOLUTION_KEY,
    STEPS_KEY,
    STRENGTH_KEY,
    TARGET_TIME_KEY,
)
from ..config.schema import fixed
from ..config.settings import Config
from ..models.seam import Checkpoint

CONFIG_DIGEST_KEY = "tcd.config_sha256"
"""The metadata key of `config_digest`."""

TRAIN_STEPS_KEY = "ss_max_train_steps"
"""The metadata key of training.steps, as kohya's trainer names it."""

_METHODS = {"uniform": "tcd", "zero": "lcm", "segment": "tscd", "phase": "pcm", "target": "tdd"}


def lora_metadata(config: Config, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata of a run's LoRA: modelspec.* and ss_* for other tools, tcd.* for the settings of TCD."""
    method, output = config.method, config.output
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": output.name,
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **checkpoint.lora_metadata(),
        **({BASE_LORAS_KEY: config.base.lora_names} if config.base.loras else {}),
        **({"ss_clip_skip": str(config.base.clip_skip)} if config.base.clip_skip else {}),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.adapter.rank),
        "ss_network_alpha": str(config.adapter.alpha),
        "tcd.version": own_version(),
        "tcd.method": _METHODS[method.law],
        "tcd.law": method.law,
        "tcd.diagonal": str(method.diagonal),
        "tcd.to_clean": str(method.to_clean),
        "tcd.grid": str(method.origin_steps),
        "tcd.skip": str(method.skip),
        "tcd.guidance_min": str(method.guidance_min),
        "tcd.guidance_max": str(method.guidance_max),
        TARGET_TIME_KEY: method.target_input if method.target_time else "none",
        STEPS_KEY: str(output.steps),
        ETA_KEY: str(output.eta),
        CFG_KEY: str(output.cfg),
        STRENGTH_KEY: "1.0",
        RESOLUTION_KEY: str(config.data.resolution),
        TRAIN_STEPS_KEY: str(config.training.steps),
        CONFIG_DIGEST_KEY: config_digest(config),
    }


def own_version() -> str:
    """Return the version of this project."""
    try:
        return version("trajectory-consistency")
    except PackageNotFoundError:
        # In ComfyUI's custom_nodes the project is a folder, with its pyproject.toml, and no installed package.
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(project["version"])


def config_digest(config: Config) -> str:
    """Return the SHA-256 of the settings that may not change on resuming: the same for all LoRAs of a run."""
    return hashlib.sha256(json.dumps(fixed(config), default=asdict, sort_keys=True).encode()).hexdigest()
