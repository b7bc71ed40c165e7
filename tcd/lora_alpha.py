"""The alpha of a LoRA file without alpha tensors, from the PEFT config in its metadata."""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .lora_keys import text_encoder_number

PEFT_CONFIG_KEY = "lora_adapter_metadata"
"""The metadata key under which diffusers (>= 0.33) stores the PEFT configs of a pipeline's LoRAs, as JSON.

diffusers prefixes each key with the model's name, as in "unet.lora_alpha", "transformer.lora_alpha" or
"text_encoder_2.lora_alpha"; the denoising network's config may also have no prefix."""


def alpha_by_metadata(metadata: Mapping[str, str]) -> Callable[[str, int], float | None]:
    """Return the alpha of a module, by (path, rank), according to a file's metadata; None if they do not say it.

    path: as lora_keys.network_path returns it. Raises ValueError, as the returned function does, if the PEFT config is
    damaged.
    """
    text = metadata.get(PEFT_CONFIG_KEY)
    configs = {} if text is None else _parse(text)

    def alpha(path: str, rank: int) -> float | None:
        number = text_encoder_number(path)
        if number is None:
            prefixes = ["unet.", "transformer.", ""]
        else:
            prefixes = ["text_encoder." if number == 1 else f"text_encoder_{number}."]
        for prefix in prefixes:
            if f"{prefix}lora_alpha" in configs:
                own = {key.removeprefix(prefix): value for key, value in configs.items() if key.startswith(prefix)}
                return peft_alpha(own, path if number is None else path.removeprefix(prefix), rank)
        return None

    return alpha


def peft_alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return the alpha of the module at a diffusers path, so that alpha / rank is the scale that PEFT used in training.

    config: a LoraConfig as a dict. The keys of alpha_pattern are regular expressions that match the end of a path. With
    use_rslora the scale is lora_alpha / sqrt(rank) (arXiv 2312.03732).

    Raises ValueError for an alpha that is not a positive number, and for an invalid alpha_pattern.
    """
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise _damaged(f"alpha_pattern is a {type(patterns).__name__}, but must be an object")
    for pattern, value in patterns.items():
        try:
            found = re.fullmatch(rf"(.*\.)?({pattern})", path)
        except re.error as error:
            raise _damaged(f"alpha_pattern has {pattern!r}, which is not a regular expression: {error}") from None
        if found:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
        raise _damaged(f"lora_alpha of {path} is {alpha!r}, but must be a positive number")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _parse(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(str(error)) from None
    if not isinstance(config, dict):
        raise _damaged(f"it holds a {type(config).__name__}, but must be an object")
    return config


def _damaged(reason: str) -> ValueError:
    return ValueError(f"{PEFT_CONFIG_KEY} in the metadata is damaged: {reason}")
