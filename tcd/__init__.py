"""The core of trajectory consistency (TCD, arXiv 2402.19159): schedules, predictions, the jump, sampling, LoRA names.

Tensors in, tensors out, with torch as the only dependency: no files, no logging, no host and no training framework.
What the trainer trains is what the nodes sample, because both call the functions of this package.
"""

from .lora_keys import Coverage, ShapeMismatch, coverage, kohya_name, to_kohya
from .prediction import Prediction, from_x0, to_x0
from .sampling import Denoise, Noise, Report, sample_tcd, seeded_noise
from .schedule import (
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    Schedule,
    alpha_bar_to_sigma,
    parse_timesteps,
    scaled_linear_alpha_bar,
    sigma_to_alpha_bar,
    timestep_grid,
    vp_level,
    zero_terminal_snr,
)
from .trajectory import Level, add_noise, jump, renoise

__all__ = [
    "ContinuousSchedule",
    "Coverage",
    "Denoise",
    "DiscreteSchedule",
    "FlowSchedule",
    "Level",
    "Noise",
    "Prediction",
    "Report",
    "Schedule",
    "ShapeMismatch",
    "add_noise",
    "alpha_bar_to_sigma",
    "coverage",
    "from_x0",
    "jump",
    "kohya_name",
    "parse_timesteps",
    "renoise",
    "sample_tcd",
    "scaled_linear_alpha_bar",
    "seeded_noise",
    "sigma_to_alpha_bar",
    "timestep_grid",
    "to_kohya",
    "to_x0",
    "vp_level",
    "zero_terminal_snr",
]
