"""Distillation of a network in memory: the examples, loss and update of each training step.

Needs torch only, as all of tcd/. The trainer and the node TCDDistill both train by this code, each with its own data.
"""

from .examples import Examples, draw_examples, draw_times_and_guidance
from .settings import Conditioning, Distillable, Method, Optimization
from .step import step_losses
from .training import NonFiniteError, StepRecord, Training

__all__ = [
    "Conditioning",
    "Distillable",
    "Examples",
    "Method",
    "NonFiniteError",
    "Optimization",
    "StepRecord",
    "Training",
    "draw_examples",
    "draw_times_and_guidance",
    "step_losses",
]
