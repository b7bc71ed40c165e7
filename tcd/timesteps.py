"""The timesteps that a sampling run visits: N of the distillation grid, or timesteps that the user typed."""

from collections.abc import Callable
from typing import TypeVar

ORIGIN_STEPS = 50  # size of the grid that published students were distilled on
FLOW_TIMESTEPS = 1000  # a flow has no timesteps; like diffusers, this code counts its time in thousandths

_Number = TypeVar("_Number", int, float)


def timestep_grid(
    steps: int, *, num_timesteps: int = 1000, origin_steps: int = ORIGIN_STEPS, denoise: float = 1.0
) -> list[int]:
    """Choose `steps` timesteps, descending, from the grid of timesteps on which the student was distilled.

    This is the skipping-step grid of LCM (arXiv 2310.04378), which TCD's reference scheduler uses too.
    The grid has origin_steps timesteps: 19, 39, ..., 999 by default. The lower fraction `denoise` of the grid is kept,
    and the steps are spaced evenly over it, starting at its highest timestep: 4 steps are 999, 759, 499, 259.
    denoise = 0 gives no timesteps.

    Raises ValueError if steps is not a whole number >= 1, steps exceeds the number of timesteps kept, origin_steps is
    not from 1 to num_timesteps, or denoise is not in [0, 1].
    """
    check_steps(steps, denoise)
    if not 1 <= origin_steps <= num_timesteps:
        raise ValueError(f"origin_steps is {origin_steps!r}, but must be from 1 to num_timesteps ({num_timesteps})")
    if denoise == 0:
        return []
    kept = int(origin_steps * denoise)
    if steps > kept:
        raise ValueError(_too_many_steps(steps, kept, origin_steps, denoise))
    skip = num_timesteps // origin_steps
    return [(kept - i * kept // steps) * skip - 1 for i in range(steps)]


def refined_origin_steps(steps: int, *, num_timesteps: int = 1000) -> int:
    """Return the size of the coarsest grid that has at least `steps` timesteps and contains the distillation grid.

    With 1000 timesteps, the possible sizes are 50, 100, 200, 250, 500 and 1000.

    Raises ValueError if steps exceeds num_timesteps.
    """
    for origin_steps in range(ORIGIN_STEPS, num_timesteps + 1, ORIGIN_STEPS):
        if num_timesteps % origin_steps == 0 and origin_steps >= steps:
            return origin_steps
    raise ValueError(
        f"steps (divided by denoise, where that is below 1) is {steps}, but the model has {num_timesteps} timesteps: "
        "use fewer steps or a higher denoise"
    )


def even_grid(steps: int) -> list[int]:
    """Return 0, 1000 / steps ... 1000, rounded to whole numbers: the thousandths of a clock without timesteps.

    Raises ValueError unless steps is a whole number from 1 to 1000.
    """
    check_steps(steps, 1.0)
    if steps > FLOW_TIMESTEPS:
        raise ValueError(f"steps is {steps}, but the clock is divided in thousandths: use at most {FLOW_TIMESTEPS}")
    return [round(FLOW_TIMESTEPS * i / steps) for i in range(steps + 1)]


def check_steps(steps: int, denoise: float) -> None:
    """Raise ValueError unless steps is a whole number >= 1 and denoise is in [0, 1]."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is {steps!r}, but must be a whole number of at least 1")
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(f"denoise is {denoise!r}, but must be from 0.0 to 1.0")


def _too_many_steps(steps: int, kept: int, origin_steps: int, denoise: float) -> str:
    remedies = [f"steps of at most {kept}"] if kept else []
    # Hundredths, because users type two digits. int() as in timestep_grid, which rounds down: int(50 * 0.58) is 28.
    enough = [percent / 100 for percent in range(1, 101) if int(origin_steps * (percent / 100)) >= steps]
    if enough:
        remedies.append(f"denoise of at least {enough[0]:g}")
    return (
        f"steps is {steps}, but denoise {denoise:g} keeps {kept} of the {origin_steps} distilled timesteps: "
        f"use {' or '.join(remedies)}"
    )


def parse_timesteps(text: str, *, num_timesteps: int = 1000) -> list[int]:
    """Parse timesteps that a user typed, such as "800" or "999,759,499,259", strictly descending.

    Raises ValueError, with advice on what to type, for anything else.
    """
    hint = f"type whole numbers from {num_timesteps - 1} down to 0 with commas between, such as 999,759,499,259"
    return _descending(text, int, lambda timestep: 0 <= timestep < num_timesteps, hint)


def parse_flow_times(text: str) -> list[float]:
    """Parse flow times typed in thousandths, such as "1000,913.04,767.44", and return them in (0, 1], descending.

    Raises ValueError, with advice on what to type, for anything else.
    """
    hint = "type numbers from 1000 down to above 0 with commas between, such as 1000,750,500,250"
    timesteps = _descending(text, float, lambda timestep: 0 < timestep <= FLOW_TIMESTEPS, hint)
    return [timestep / FLOW_TIMESTEPS for timestep in timesteps]


def _descending(text: str, number: type[_Number], in_range: Callable[[_Number], bool], hint: str) -> list[_Number]:
    try:
        if "_" in text:  # int() and float() would ignore it
            raise ValueError
        timesteps = [number(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"timesteps is {text!r}: {hint}") from None
    for timestep in timesteps:
        if not in_range(timestep):
            raise ValueError(f"timesteps has {timestep}, out of range: {hint}")
    for before, after in zip(timesteps, timesteps[1:], strict=False):
        if after >= before:
            raise ValueError(f"timesteps has {after} after {before}, but must descend: {hint}")
    return timesteps
