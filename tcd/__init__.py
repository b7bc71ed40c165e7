"""The core of trajectory consistency (TCD, arXiv 2402.19159): schedules, the jump, sampling, the loss, the adapter.

It needs only torch: no files, no logging, no host and no training framework. The trainer and the nodes call the same
functions of this package, so the sampler follows the equations that the student was trained with.
"""

from .adapter import Adapter, AdapterWeights, Lora
from .continuous_schedules import ContinuousSchedule, FlowSchedule
from .levels import alpha_bar_to_sigma, scaled_linear_alpha_bar, sigma_to_alpha_bar, vp_level, zero_terminal_snr
from .lora_alpha import PEFT_CONFIG_KEY, alpha_by_metadata, peft_alpha
from .lora_coverage import Coverage, ShapeMismatch, coverage
from .lora_keys import LoraModule, kohya_name, lora_modules, split_name, to_kohya
from .prediction import Prediction, from_x0, to_x0
from .sampling import Denoise, Noise, Report, sample_tcd, seeded_noise
from .schedule import BridgeSchedule, DiscreteSchedule, Schedule, TimePoint
from .target_time import TargetInput, TargetTime, split_target_time
from .timesteps import parse_flow_times, parse_timesteps, refined_origin_steps, timestep_grid
from .trajectory import Level, add_noise, jump, renoise

__all__ = [
    "PEFT_CONFIG_KEY",
    "Adapter",
    "AdapterWeights",
    "BridgeSchedule",
    "ContinuousSchedule",
    "Coverage",
    "Denoise",
    "DiscreteSchedule",
    "FlowSchedule",
    "Level",
    "Lora",
    "LoraModule",
    "Noise",
    "Prediction",
    "Report",
    "Schedule",
    "ShapeMismatch",
    "TargetInput",
    "TargetTime",
    "TimePoint",
    "add_noise",
    "alpha_by_metadata",
    "alpha_bar_to_sigma",
    "coverage",
    "from_x0",
    "jump",
    "kohya_name",
    "lora_modules",
    "parse_flow_times",
    "parse_timesteps",
    "peft_alpha",
    "refined_origin_steps",
    "renoise",
    "sample_tcd",
    "scaled_linear_alpha_bar",
    "seeded_noise",
    "sigma_to_alpha_bar",
    "split_name",
    "split_target_time",
    "timestep_grid",
    "to_kohya",
    "to_x0",
    "vp_level",
    "zero_terminal_snr",
]
