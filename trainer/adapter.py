"""The LoRA on the UNet: put on, switched off for the teacher, and taken out as tensors.

Flows in: a frozen UNet.  Flows out: the same UNet with float32 trainable adapters, whatever the dtype of its weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Reader
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from trainer.errors import UserError

NAME = "tcd"
_SECOND = "file"
# The 14 kinds of module that consistency LoRAs for Stable Diffusion are trained on: all attention, feed-forward and
# convolution layers of the blocks, and the projections of the time embedding into them.
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


def add_adapter(unet: UNet2DConditionModel, *, rank: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Put a LoRA on `unet`, which starts as the identity, and return its parameters: float32, and alone trainable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initialization is peft's, which draws from the global generator
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS)), adapter_name=NAME)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


@contextmanager
def adapters_off(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within the block the UNet is the teacher: its adapters are off, and are on again after it, whatever happens."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def adapter_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter's tensors, detached, under PEFT's names."""
    state = get_peft_model_state_dict(unet, adapter_name=NAME)
    return {key: value.detach() for key, value in state.items()}


def load_adapter(unet: UNet2DConditionModel, path: Path, name: str = NAME) -> None:
    """Put the LoRA of a file on `unet` as its active adapter, through diffusers' own reader.

    Raises UserError when the file is not a whole LoRA for this UNet.
    """
    try:
        state, alphas = Reader.lora_state_dict(path.parent, weight_name=path.name, local_files_only=True)
        with warnings.catch_warnings():
            # peft warns that the UNet has another adapter, which is what a second one is for.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            Reader.load_lora_into_unet(state, alphas, unet=unet, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a LoRA for this model: {error}") from error
    unet.set_adapters([name])


@contextmanager
def second_adapter(unet: UNet2DConditionModel, path: Path) -> Iterator[None]:
    """Within the block the LoRA of a file stands in for the one in training, which is back after it."""
    load_adapter(unet, path, _SECOND)
    try:
        yield
    finally:
        unet.set_adapters([NAME])
        unet.delete_adapters([_SECOND])
