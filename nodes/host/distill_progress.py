"""What the user sees of a distillation: the host's progress bar, a line of text, and preview pictures."""

import sys
import time
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...tcd.distill import StepRecord
from ...tcd.distill.sampling import initial_noise, sample_latents
from ...tcd.lora_metadata import DEFAULT_STEPS
from ..distill_settings import DistillSettings
from .training import HostNetwork
from .training.data import Captions

_SECONDS = 1.0  # between two lines of text
_AVERAGED = 50  # steps whose mean loss is shown


class Progress:
    """Reports each step, and draws a preview every few steps by the TCD sampler, with the host's previewer."""

    def __init__(self, network: HostNetwork, settings: DistillSettings, preview_every: int) -> None:
        """preview_every: number of steps between previews; 0 for none."""
        self._network, self._settings, self._every = network, settings, preview_every
        self._bar = comfy.utils.ProgressBar(settings.steps)
        self._losses: list[float] = []
        self._started, self._first, self._shown = time.monotonic(), 0, 0.0
        form = network.model.latent_format
        self._previewer = latent_preview.get_previewer(network.device, form) or _plain_previewer(form)

    def draw(self, done: int, total: int) -> None:
        """Report that the teacher has drawn some of the latents."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done, total)
        _show(f"The teacher has drawn {done} of {total} latents")

    def start(self, step: int) -> None:
        """Begin to measure the time, at a step."""
        self._started, self._first = time.monotonic(), step

    def step(self, record: StepRecord, latent: Tensor, caption: Any) -> None:
        """Report a step. latent: one of the data [C, ...], for its shape. caption: for the preview."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        steps, self._losses = self._settings.steps, [*self._losses[1 - _AVERAGED :], record.loss]
        preview = None
        if self._every and self._previewer and record.step % self._every == 0:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", self._sample(latent, caption))
        self._bar.update_absolute(record.step, steps, preview)
        now = time.monotonic()
        if now - self._shown >= _SECONDS or record.step == steps:
            self._shown = now
            left = (now - self._started) / (record.step - self._first) * (steps - record.step)
            loss = sum(self._losses) / len(self._losses)
            _show(f"Step {record.step} of {steps}, loss {loss:.4f}, {_duration(left)} left")

    def _sample(self, latent: Tensor, caption: Any) -> Tensor:
        network, settings = self._network, self._settings
        return sample_latents(
            network,
            Captions((caption,)).map(lambda tensor: tensor.to(network.device)),
            sigmas=network.schedule.sigmas_for(DEFAULT_STEPS),
            gamma=settings.eta,
            noise=initial_noise(settings.seed, (1, *latent.shape)),
            seed=settings.seed,
        )


def _plain_previewer(latent_format: Any) -> Any:
    """Return the host's simplest previewer, for users who have turned off those of the sampler; None for no picture."""
    if latent_format.latent_rgb_factors is None:
        return None
    names = ("latent_rgb_factors", "latent_rgb_factors_bias", "latent_rgb_factors_reshape")  # older hosts lack the last
    return latent_preview.Latent2RGBPreviewer(
        *(getattr(latent_format, each) for each in names if hasattr(latent_format, each))
    )


def _show(text: str) -> None:
    """Show a line of text below the node that runs."""
    context = get_executing_context()
    server = sys.modules.get("server")  # not there where ComfyUI is used as a library
    if context is not None and server is not None:
        server.PromptServer.instance.send_progress_text(text, context.node_id)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
