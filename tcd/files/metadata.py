"""The metadata of a LoRA file that says how it was distilled, for this project and for other tools."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from ..distill.settings import Method
from ..lora_metadata import CFG_KEY, ETA_KEY, STEPS_KEY, STRENGTH_KEY, TARGET_TIME_KEY
from ..target_time import TargetInput

_METHODS = {"uniform": "tcd", "zero": "lcm", "segment": "tscd", "phase": "pcm", "target": "tdd"}


class Recommended(NamedTuple):
    """The settings that a file recommends to sample with."""

    steps: int
    eta: float
    cfg: float


def distillation_metadata(
    title: str, method: Method, recommended: Recommended, *, rank: int, alpha: float, target_input: TargetInput | None
) -> dict[str, str]:
    """Return the metadata: modelspec.* and ss_* for other tools, tcd.* for the settings of TCD."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "tcd.version": own_version(),
        "tcd.method": _METHODS[method.law],
        "tcd.law": method.law,
        "tcd.diagonal": str(method.diagonal),
        "tcd.to_clean": str(method.to_clean),
        "tcd.grid": str(method.origin_steps),
        "tcd.skip": str(method.skip),
        "tcd.guidance_min": str(method.guidance_min),
        "tcd.guidance_max": str(method.guidance_max),
        TARGET_TIME_KEY: target_input or "none",
        STEPS_KEY: str(recommended.steps),
        ETA_KEY: str(recommended.eta),
        CFG_KEY: str(recommended.cfg),
        STRENGTH_KEY: "1.0",
    }


def own_version() -> str:
    """Return the version of this project."""
    try:
        return version("trajectory-consistency")
    except PackageNotFoundError:
        # In ComfyUI's custom_nodes the project is a folder, with its pyproject.toml, and no installed package.
        project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
        return found[1] if found else "unknown"
