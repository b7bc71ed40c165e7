"""The metadata that the trainer writes into a LoRA file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from ...tcd.files.metadata import Recommended, distillation_metadata
from ...tcd.lora_metadata import BASE_LORAS_KEY, RESOLUTION_KEY
from ..config.schema import fixed
from ..config.settings import Config
from ..models.seam import Checkpoint

CONFIG_DIGEST_KEY = "tcd.config_sha256"
"""The metadata key of `config_digest`."""

TRAIN_STEPS_KEY = "ss_max_train_steps"
"""The metadata key of training.steps, as kohya's trainer names it."""


def lora_metadata(config: Config, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata of a run's LoRA: modelspec.* and ss_* for other tools, tcd.* for the settings of TCD."""
    adapter, output = config.adapter, config.output
    return {
        **distillation_metadata(
            output.name,
            config.method,
            Recommended(output.steps, output.eta, output.cfg),
            rank=adapter.rank,
            alpha=adapter.alpha,
            target_input=config.method.embedded_input,
        ),
        **checkpoint.lora_metadata(),
        **({BASE_LORAS_KEY: config.base.lora_names} if config.base.loras else {}),
        **({"ss_clip_skip": str(config.base.clip_skip)} if config.base.clip_skip else {}),
        RESOLUTION_KEY: str(config.data.resolution),
        TRAIN_STEPS_KEY: str(config.training.steps),
        CONFIG_DIGEST_KEY: config_digest(config),
    }


def config_digest(config: Config) -> str:
    """Return the SHA-256 of the settings that may not change on resuming: the same for all LoRAs of a run."""
    return hashlib.sha256(json.dumps(fixed(config), default=asdict, sort_keys=True).encode()).hexdigest()
