"""Range checks of node inputs: the host checks only typed values, not values from a link and not NaN."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high; NaN is refused."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, but must be from {low:g} to {high:g}")
