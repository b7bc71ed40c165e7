"""The input eta (the paper's gamma), which is the same in several nodes."""

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
            "Stochasticity, the paper's gamma. With 0, sampling is deterministic. With 1, each step jumps to the clean "
            "picture and then adds all noise again, as LCM does. Use 0.3 for few steps, and more for more steps."
        ),
    )
