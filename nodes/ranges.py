"""The range of a number that reaches a node: the host checks what is typed, but not NaN, nor what comes by a link."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high, which NaN never is."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, but must be from {low:g} to {high:g}")
