"""The alpha of a LoRA file without alpha tensors, from the PEFT config in its metadata."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

PEFT_CONFIG_KEY = "lora_adapter_metadata"
"""The metadata key under which diffusers (>= 0.33) stores the PEFT configs of a pipeline's LoRAs, as JSON."""


def parse_peft_config(text: str) -> dict[str, Any] | None:
    """Return the denoising network's PEFT config from the JSON under PEFT_CONFIG_KEY.

    diffusers prefixes each key with the model's name, as in "unet.lora_alpha" or "transformer.lora_alpha"; keys without
    a prefix are accepted too. The result has no prefixes. It is None if there are only configs of text encoders.

    Raises ValueError if the text is not JSON, or is JSON for something other than an object.
    """
    config = json.loads(text)  # json's error is a ValueError
    if not isinstance(config, dict):
        raise ValueError(f"it holds a {type(config).__name__}, but must be an object")
    for prefix in ("unet.", "transformer.", ""):
        if f"{prefix}lora_alpha" in config:
            return {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    return None


def peft_alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return the alpha of the module at a diffusers path, so that alpha / rank is the scale that PEFT used in training.

    config: a LoraConfig as a dict. The keys of alpha_pattern are regular expressions that match the end of a path. With
    use_rslora the scale is lora_alpha / sqrt(rank) (arXiv 2312.03732).

    Raises ValueError for an alpha that is not a positive number, and for an invalid regular expression.
    """
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            found = re.fullmatch(rf"(.*\.)?({pattern})", path)
        except re.error as error:
            raise ValueError(f"alpha_pattern has {pattern!r}, which is not a regular expression: {error}") from None
        if found:
            alpha = value
            break
    if not isinstance(alpha, int | float) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"lora_alpha of {path} is {alpha!r}, but must be a positive number")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)
