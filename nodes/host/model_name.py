"""The host's name for a kind of model."""

from typing import Any


def model_name(model: Any) -> str:
    """Return the host's name for the architecture of a model, such as SD15 or SDXL."""
    return type(model.model.model_config).__name__
