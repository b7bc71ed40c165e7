"""The input eta (the paper's gamma), which several nodes share."""

from comfy_api.latest import io

from ..tcd.lora_metadata import DEFAULT_ETA


def eta_input() -> io.Float.Input:
    """Return the input eta, from 0 to 1."""
    return io.Float.Input(
        "eta",
        default=DEFAULT_ETA,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=(
            "Stochasticity, the paper's gamma. 0 is deterministic; 1 goes back to clean and adds all noise "
            "anew at each step, as LCM does. 0.3 suits few steps, more suits more steps."
        ),
    )
