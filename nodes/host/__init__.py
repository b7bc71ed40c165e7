"""The only package that imports ComfyUI's modules. It converts between ComfyUI's objects and the classes of tcd/."""

from .distill import DataInputs, distill
from .ksampler_lists import register, set_eta
from .lora import apply_lora
from .lora_files import lora_names, lora_stamp, read_lora
from .lora_model import lora_in_memory, save_lora
from .model_schedule import schedule_of, scheduler_sigmas, tcd_sigmas
from .sampling import sample_with_tcd, tcd_sampler
from .schedulers import SETUP_SCHEDULERS, setup_sigmas

__all__ = [
    "SETUP_SCHEDULERS",
    "DataInputs",
    "apply_lora",
    "distill",
    "lora_in_memory",
    "lora_names",
    "lora_stamp",
    "read_lora",
    "register",
    "sample_with_tcd",
    "save_lora",
    "schedule_of",
    "scheduler_sigmas",
    "set_eta",
    "setup_sigmas",
    "tcd_sampler",
    "tcd_sigmas",
]
