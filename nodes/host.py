"""The one file that imports the host's own modules: its objects come in, and become those that tcd/ knows.

The clock here is sigma on the host's scale: variance exploding (x = x0 + sigma * eps), or flow where the model is one.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..tcd import (
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    Level,
    Noise,
    Schedule,
    coverage,
    parse_timesteps,
    sample_tcd,
    seeded_noise,
    timestep_grid,
)
from .lora_file import LoraFile

_LORAS = "loras"


class SparseSchedule:
    """A discrete model that names only some of its timesteps, on its own clock (ModelSamplingDiscrete set to "lcm").

    Its lowest sigma is that of its lowest timestep, 19 of 0 .. 999, and no strategic target but 0 lies below.
    """

    def __init__(self, model_sampling: Any) -> None:
        self._model_sampling = model_sampling

    def sigma(self, timestep: Tensor) -> Tensor:
        """Return the sigma of an int64 timestep of any shape."""
        return self._model_sampling.sigma(timestep)

    def level(self, sigma: Tensor) -> Level:
        """Return the level (1, sigma)."""
        return Level(torch.ones_like(sigma), sigma)

    def target(self, sigma_next: Tensor, gamma: float) -> Tensor:
        """Return sigma(s) with s = floor((1 - gamma) t')."""
        if gamma == 0:
            return sigma_next
        s = torch.floor((1 - gamma) * self._model_sampling.timestep(sigma_next))
        return torch.minimum(self.sigma(s), sigma_next)


def schedule_of(model_sampling: Any) -> Schedule:
    """Return the clock of a model, told apart by the classes by which the host itself tells its models apart."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return FlowSchedule()
    if isinstance(model_sampling, comfy.model_sampling.StableCascadeSampling):
        return ContinuousSchedule()  # a ModelSamplingDiscrete by class only: its time is continuous
    if not isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete):
        return ContinuousSchedule()
    if len(model_sampling.sigmas) != model_sampling.num_timesteps:
        return SparseSchedule(model_sampling)
    return DiscreteSchedule(model_sampling.sigmas)


def tcd_sampler(gamma: float) -> comfy.samplers.KSAMPLER:
    """Return a SAMPLER: strategic stochastic sampling (arXiv 2402.19159) with stochasticity gamma in [0, 1]."""
    return comfy.samplers.KSAMPLER(sample_with_tcd, extra_options={"gamma": gamma}, inpaint_options={})


def sample_with_tcd(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    gamma: float,
) -> Tensor:
    """Sample from noisy x [B, C, ...] along sigmas [N + 1], in the way that the host calls k-diffusion's samplers."""
    extra_args = extra_args or {}
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")

    def denoise(x: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        return model(x, sigma.to(x) * x.new_ones(len(x)), **extra_args)

    with tqdm(total=max(len(sigmas) - 1, 0), disable=disable) as bar:

        def report(i: int, x: Tensor, sigma: Tensor, x0: Tensor) -> None:
            if callback is not None:
                callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})
            bar.update()

        return sample_tcd(
            denoise,
            x,
            sigmas,
            schedule=schedule_of(model_sampling),
            gamma=gamma,
            noise=_noise(extra_args.get("seed"), scale=getattr(model_sampling, "noise_scale", 1.0)),
            report=report,
        )


def _noise(seed: int | None, *, scale: float) -> Noise:
    """Noise by the host's seed, at the scale of the model's own: newer hosts know flow models trained on s * eps."""
    if seed is None:  # the caller wants any noise
        seed = int(torch.randint(2**63 - 1, ()))
    draw = seeded_noise(seed)
    return lambda sigma_next, like: scale * draw(sigma_next, like)


def tcd_sigmas(model: Any, *, steps: int, denoise: float, timesteps: str) -> Tensor:
    """Return SIGMAS [N + 1] of a model with integer timesteps, 0 last: of the timesteps typed, else of the TCD grid.

    Empty for denoise = 0, which the host takes as nothing to do. Raises ValueError as timestep_grid and parse_timesteps
    do, and for a model without integer timesteps.
    """
    model_sampling = model.get_model_object("model_sampling")
    schedule = schedule_of(model_sampling)
    if not isinstance(schedule, (DiscreteSchedule, SparseSchedule)):
        raise ValueError(
            f"TCD Sigmas needs a model with integer timesteps, such as SD 1.5 or SDXL, but {_model_name(model)} has "
            "none: use BasicScheduler instead, with scheduler simple for a flow model and karras for another"
        )
    count = model_sampling.num_timesteps
    if timesteps.strip():
        chosen = parse_timesteps(timesteps, num_timesteps=count)
    else:
        chosen = timestep_grid(steps, num_timesteps=count, denoise=denoise)
    if not chosen:
        return torch.zeros(0)
    sigmas = schedule.sigma(torch.tensor(chosen))
    return torch.cat([sigmas.cpu(), torch.zeros(1)])


def lora_names() -> list[str]:
    """Return the LoRA files that the host lists."""
    return folder_paths.get_filename_list(_LORAS)


def lora_stamp(name: str) -> tuple[str, int, int]:
    """Return (path, modification time, size) of a LoRA file: what changes when the file does."""
    path = Path(folder_paths.get_full_path_or_raise(_LORAS, name))
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


def read_lora(name: str) -> LoraFile:
    """Read a LoRA file, or have it from memory if it was just read; nothing in it is executed.

    Raises FileNotFoundError when there is none of that name, ValueError when it is not readable as tensors.
    """
    return _read(name, *lora_stamp(name))


@lru_cache(maxsize=2)  # a node class of the host keeps no state of its own
def _read(name: str, path: str, _modified_ns: int, _size: int) -> LoraFile:
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be read: it is damaged, incomplete or not a file of tensors. Download it again ({error})"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{name} is not a LoRA: it holds something other than named tensors")
    return LoraFile(name, tensors, metadata or {})


def apply_lora(model: Any, lora: LoraFile, strength: float) -> Any:
    """Return a clone of the model with the whole LoRA on it; the model itself if strength is 0.

    Raises ValueError unless each module of the file is in the model with the same shape, before anything is applied.
    """
    if strength == 0:
        return model
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})  # the default argument is shared between calls
    weights = model.model.state_dict()
    shapes = {name: tuple(weights[key].shape) for name, key in key_map.items() if key in weights}
    fit = coverage(lora.tensors, shapes)
    if not fit.complete:
        raise ValueError(
            f"{lora.name} does not fit the model, and nothing was applied: the file is for {lora.base_model()}, the "
            f"model is {_model_name(model)}. {fit.describe()}"
        )
    patched = model.clone()
    patched.add_patches(comfy.lora.load_lora(lora.tensors, key_map), strength)
    return patched


def _model_name(model: Any) -> str:
    return type(model.model.model_config).__name__
