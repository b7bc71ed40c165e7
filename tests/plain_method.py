"""TCD without any addition, also for tests that run where diffusers is missing."""

PLAIN: dict[str, object] = {
    "target_time": False,
    "weighting": "none",
    "diagonal": 0.0,
    "to_clean": 0.0,
    "ema_decay": 0.0,
    "huber_c": 0.001,
}
"""TCD without any addition, for tests that add one at a time; the default is the recommended method."""
