"""The user's own LoRAs on a base of ComfyUI's: applied by ComfyUI itself, in every spelling and kind that it knows.

ComfyUI only logs what it cannot apply, and goes on without it. Here each such message is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....tcd.files.safetensors_file import SafetensorsFile
from ....tcd.lora_keys import is_text_encoder_name
from ...config.base import BaseLora
from ...errors import UserError
from ..base_loras import PlacedLora
from .library import find_model
from .recognize import META

_MAX_LISTED = 3
_NOT_APPLIED = (
    "lora key not loaded: ",
    "NOT LOADED ",
    "ERROR ",
    "Calculate Weight Failed: ",
    "WARNING SHAPE MISMATCH ",
    "patch type not recognized ",
)
"""The starts of ComfyUI's messages about a tensor that it does not apply."""


class _Lora(NamedTuple):
    """The tensors of one file, in the names that ComfyUI maps."""

    setting: str
    """The setting and its value, for messages."""
    strength: float
    network: dict[str, Tensor]
    text: dict[str, Tensor]


class HostLoras:
    """The LoRAs that the base gets when its parts are loaded; their files are read at once."""

    def __init__(self, loras: Sequence[BaseLora]) -> None:
        """Read the files. Raises UserError if one is missing, damaged or empty."""
        self.placed: list[PlacedLora] = []
        self._loras: list[_Lora] = []
        for number, lora in enumerate(loras):
            self._add(f"base.loras[{number}].path", lora)

    def check(self, model: Any) -> None:
        """Raise UserError if a tensor for the network would not be applied; model: the host's, on the meta device.

        Those for text encoders are checked when these are loaded, because only their files say what they are.
        """
        import comfy.model_patcher
        import comfy.utils

        for lora in self._loras:
            patcher = comfy.model_patcher.ModelPatcher(model, load_device=META, offload_device=META)
            with _complaints_are_errors(lora.setting, len(lora.network)):
                patched = _with_lora(patcher, lora)
                for key, patches in patched.patches.items():
                    _check_shape(key, comfy.utils.get_attr(model, key), patches)

    def merge_into_network(self, patcher: Any) -> Any:
        """Return the host's MODEL with the LoRAs in its weights, for good.

        ComfyUI sums in float32 and rounds once to the weight's dtype. A quantised weight is dequantised for the sum,
        and the sum is quantised again, as when ComfyUI samples with the node Load LoRA.
        """
        for lora in self._loras:
            with _complaints_are_errors(lora.setting, len(lora.network)):
                patcher = _with_lora(patcher, lora)
        with _complaints_are_errors("base.loras", len(patcher.patches)):
            _merge(patcher)
        return patcher

    def merge_into_text_encoder(self, clip: Any) -> Any:
        """Return the host's CLIP with the LoRAs in its weights, for good, as `merge_into_network` does."""
        import comfy.sd

        for lora in self._loras:
            with _complaints_are_errors(lora.setting, len(lora.text)):
                _, clip = comfy.sd.load_lora_for_models(None, clip, lora.text, 0, lora.strength)
        with _complaints_are_errors("base.loras", len(clip.patcher.patches)):
            _merge(clip.patcher)
        return clip

    def _add(self, key: str, lora: BaseLora) -> None:
        import comfy.lora_convert
        import comfy.utils

        path = find_model("loras", lora.path, key)
        SafetensorsFile(path)  # whose message says what is wrong with a damaged file
        tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path), safe_load=True))
        if not tensors:
            raise UserError(f"{key} is {path}, which has no tensors: use another file")
        text = {name: tensor for name, tensor in tensors.items() if is_text_encoder_name(name)}
        network = {name: tensor for name, tensor in tensors.items() if name not in text}
        self._loras.append(_Lora(f"{key} is {path}", lora.strength, network, text))
        self.placed.append(PlacedLora(path, lora.strength, bool(text)))


def _with_lora(patcher: Any, lora: _Lora) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, lora.network, lora.strength, 0)[0]


def _check_shape(key: str, weight: Tensor, patches: Any) -> None:
    """Log an error if patches cannot be applied to a weight on the meta device, or change its shape."""
    import comfy.lora

    try:
        shape = comfy.lora.calculate_weight(patches, weight.detach().to(torch.float32, copy=True), key).shape
    except (RuntimeError, ValueError) as error:
        logging.error("ERROR %s: %s", key, error)
        return
    if shape != weight.shape:
        logging.error("ERROR %s would have the shape %s, not %s", key, list(shape), list(weight.shape))


def _merge(patcher: Any) -> None:
    """Put the patches of a patcher into the weights, one after another, and keep no copy of the weights before."""
    with torch.inference_mode(False):
        for key in patcher.patches:
            patcher.patch_weight_to_device(key, device_to=patcher.load_device)
            del patcher.backup[key]
    patcher.patches = {}


@contextmanager
def _complaints_are_errors(setting: str, count: int) -> Iterator[None]:
    """Raise UserError if ComfyUI logs within the block that it does not apply a tensor; other messages are passed on.

    count: the number of tensors, for the message.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    handler = _Collect(handlers)
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
    found = handler.messages
    if found:
        more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
        raise UserError(
            f"{setting}, which does not fit the base: ComfyUI could not apply {len(found)} of its {count} parts "
            f"({', '.join(found[:_MAX_LISTED])}{more}); use a LoRA for this base"
        )


class _Collect(logging.Handler):
    """Keeps the messages about tensors, without the words before a tensor's name; gives others to `handlers`."""

    def __init__(self, handlers: Sequence[logging.Handler]) -> None:
        super().__init__()
        self.messages: list[str] = []
        self._others = handlers

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        start = next((start for start in _NOT_APPLIED if message.startswith(start)), None)
        if start is not None:
            self.messages.append(message.removeprefix(start))
            return
        for handler in self._others:
            if record.levelno >= handler.level:
                handler.handle(record)
