"""The inputs of the two nodes that apply a LoRA: from a file, and from a graph."""

from comfy_api.latest import io

from .ranges import check_range

_LOWEST, _HIGHEST = -100.0, 100.0


def model_input() -> io.Model.Input:
    """Return the input model."""
    return io.Model.Input("model", tooltip="The model that the LoRA turns into a TCD student, the paper's f_theta.")


def strength_input() -> io.Float.Input:
    """Return the input strength_model."""
    return io.Float.Input(
        "strength_model",
        default=1.0,
        min=_LOWEST,
        max=_HIGHEST,
        step=0.01,
        tooltip="How much of the LoRA is added to the weights theta. 0 leaves the model as it is.",
    )


def check_strength(strength: float) -> None:
    """Raise ValueError unless the strength is in the range of its input."""
    check_range("strength_model", strength, _LOWEST, _HIGHEST)
