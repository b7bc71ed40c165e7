"""What identifies a kind of model: the host's name for its architecture, and the shift of its noise schedule."""

from typing import Any


def model_name(model: Any) -> str:
    """Return the host's name for the architecture of a model, such as SD15 or SDXL."""
    return type(model.model.model_config).__name__


def model_shift(model_sampling: Any) -> float | None:
    """Return the shift of a model's noise schedule, or None if it has none."""
    shift = getattr(model_sampling, "shift", None)
    return None if shift is None else float(shift)
