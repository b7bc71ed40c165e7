"""Lets ComfyUI recognize the network in a file, without loading its weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....tcd.distill.distilled import refuse_lcm
from ....tcd.files.safetensors_file import SafetensorsFile
from ...errors import UserError

TEXT, VAE = "text encoder", "VAE"
META = torch.device("meta")


class Recognized(NamedTuple):
    """What ComfyUI finds out about the network in a file."""

    config: Any
    """The host's supported_models config."""
    model: Any
    """The host's BaseModel, with its network on the meta device."""
    is_quantised: bool
    """Whether weights are stored in 8 bits or fewer."""
    float8: torch.dtype | None
    """The dtype of weights that are stored in 8 bits without scales, as float8; None if they are not."""
    others: tuple[str, ...]
    """The other parts that are in the file: TEXT, VAE."""


def recognize(path: Path, dtype: torch.dtype = torch.float32) -> Recognized:
    """Let ComfyUI recognize the network in a file; its weights stay on the disk.

    dtype: of the network's weights, except those that are stored in 8 bits or fewer.

    Raises UserError if it does not know the network, or cannot read the file.
    """
    import comfy.model_detection
    import comfy.utils

    refuse_lcm(SafetensorsFile(path).shapes, path)  # SafetensorsFile says what is wrong with a damaged file
    state, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    if not any(key.startswith(prefix) for key in state):
        prefix = ""
    state, metadata = comfy.utils.convert_old_quants(state, prefix, metadata=metadata)
    config = comfy.model_detection.model_config_from_unet(state, prefix, metadata=metadata)
    if config is None:
        raise UserError(f"ComfyUI does not recognize the network in {path}: give a file that its loader nodes take")
    stored = comfy.utils.weight_dtype(state, prefix)
    found = {
        TEXT: bool(config.process_clip_state_dict(dict(state))),
        VAE: any(key.startswith(tuple(config.vae_key_prefix)) for key in state),
    }
    others = tuple(part for part, is_there in found.items() if is_there)
    has_layouts, is_small = config.quant_config is not None, stored is not None and stored.itemsize == 1
    # Beside weights with layouts of their own, such as INT8, the host has the others in a usual dtype.
    float8 = stored if is_small and not has_layouts else None
    config.set_inference_dtype(float8 or dtype, dtype if has_layouts or is_small else None)
    model = config.get_model(state, prefix, device=META)
    if has_layouts:  # the host makes such weights when it loads them
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of torch: nothing is copied to meta
            model.load_model_weights(state, prefix)
    return Recognized(config, model, has_layouts or is_small, float8, others)


def unquantised(config: Any) -> Any:
    """Return the host's BaseModel on the meta device, with plain weights also where the file's are quantised."""
    return type(config)(config.unet_config).get_model({}, "", device=META)
