"""The alpha of a LoRA whose file has none, from the PEFT config it was trained with."""

import math
import re
from collections.abc import Mapping
from typing import Any


def peft_alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return the alpha of the module at a diffusers path, such that alpha / rank is the scale PEFT used in training.

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
