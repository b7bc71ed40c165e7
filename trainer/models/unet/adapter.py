"""The adapter on the UNet, a LoRA and perhaps an embedding of the target time: put on, switched off, and taken out.

Flows in: a frozen UNet.  Flows out: the same UNet with float32 trainable adapters, whatever the dtype of its weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Reader
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ....tcd import TargetInput, lora_modules, to_kohya
from ....tcd.lora_keys import ALPHA
from ....tcd.target_time import PREFIX
from ...config.targets import kinds_of
from ...errors import UserError
from ...files.adapter_file import read_adapter
from . import target_time

NAME = "tcd"
_SECOND = "file"
_AVERAGE = "average"


def add_adapter(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    alpha: float,
    seed: int,
    targets: Sequence[str] = ("all",),
    told: TargetInput | None = None,
) -> list[nn.Parameter]:
    """Put an adapter on `unet`, which starts as the identity, and return its parameters: float32, and alone trainable.

    told: what of the target time the UNet is told; None for nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initialization is peft's, which draws from the global generator
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=kinds_of(targets)), adapter_name=NAME)
    if told:
        target_time.put(unet, NAME, target_time.new_embedding(unet, told, seed))
        target_time.use(unet, NAME)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def freeze_lora(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """Leave the LoRA as it is from here on, and return the parameters of the embedding, which alone is trained."""
    unet.class_embedding.alone = True
    use_adapter(unet, NAME)
    return embedding_parameters(unet)


def embedding_parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """The parameters of the embedding of the target time in training, if there is one."""
    embedding = target_time.embedding_of(unet, NAME)
    return [] if embedding is None else list(embedding.parameters())


@contextmanager
def adapters_off(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within the block the UNet is the teacher: its adapters are off, and are on again after it, whatever happens."""
    if not getattr(unet, "peft_config", None):  # which peft gives a UNet with its first adapter
        yield
        return
    unet.disable_adapters()
    try:
        with target_time.not_told(unet):
            yield
    finally:
        unet.enable_adapters()
        _keep_frozen(unet)


def use_adapter(unet: UNet2DConditionModel, name: str) -> None:
    """Have one of the adapters on the UNet in use."""
    unet.set_adapters([name])
    target_time.use(unet, name)
    _keep_frozen(unet)


def _keep_frozen(unet: UNet2DConditionModel) -> None:
    """Have no gradient for a LoRA that is not trained: peft switches them on with every adapter that it activates."""
    if unet.class_embedding is not None and unet.class_embedding.alone:
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(False)


def add_average(unet: UNet2DConditionModel) -> None:
    """Put a second adapter on `unet`, a copy of the one in training, to hold its exponential moving average."""
    with _second_allowed():
        unet.add_adapter(unet.peft_config[NAME], adapter_name=_AVERAGE)
    embedding = target_time.embedding_of(unet, NAME)
    if embedding is not None:
        target_time.put(unet, _AVERAGE, deepcopy(embedding))
    use_adapter(unet, NAME)
    for average, parameter in _pairs(unet):
        average.data = parameter.detach().clone()
        average.requires_grad_(False)


@torch.no_grad()
def update_average(unet: UNet2DConditionModel, decay: float) -> None:
    """Move the average towards the adapter in training: average = decay * average + (1 - decay) * adapter."""
    for average, parameter in _pairs(unet):
        average.lerp_(parameter, 1 - decay)


@contextmanager
def averaged(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within the block the average stands in for the adapter in training, which is back after it."""
    use_adapter(unet, _AVERAGE)
    try:
        yield
    finally:
        use_adapter(unet, NAME)


@contextmanager
def _second_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft warns that the UNet has another adapter, which is what a second one is for.
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        yield


def _pairs(unet: UNet2DConditionModel) -> Iterator[tuple[Tensor, Tensor]]:
    parameters = dict(unet.named_parameters())
    for name, parameter in parameters.items():
        if f".{NAME}." in name:
            yield parameters[name.replace(f".{NAME}.", f".{_AVERAGE}.")], parameter


def adapter_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The tensors of the adapter in training and of its average, if there is one, themselves, by parameter name."""
    ours = (f".{NAME}.", f".{_AVERAGE}.")
    return {name: parameter for name, parameter in unet.named_parameters() if any(each in name for each in ours)}


@torch.no_grad()
def load_adapter_tensors(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapters with what `adapter_tensors` gave of a UNet with the same ones.

    Raises UserError when they are not the same.
    """
    own = adapter_tensors(unet)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError("the checkpoint is of another adapter: choose another output.folder")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def adapter_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA's tensors, detached, under PEFT's names."""
    state = get_peft_model_state_dict(unet, adapter_name=NAME)
    return {key: value.detach() for key, value in state.items()}


def file_tensors(unet: UNet2DConditionModel, alpha: float) -> dict[str, Tensor]:
    """The adapter as a file has it: the LoRA under kohya's names, with `alpha`, and the embedding's tensors."""
    embedding = target_time.embedding_of(unet, NAME)
    told = {} if embedding is None else embedding.state_dict()
    return to_kohya(adapter_state(unet), alpha) | {PREFIX + name: tensor for name, tensor in told.items()}


def load_adapter(unet: UNet2DConditionModel, path: Path, name: str = NAME) -> None:
    """Put the adapter of a file on `unet` as its active one, the LoRA through diffusers' own reader.

    Raises UserError when the file is not a whole LoRA for this UNet.
    """
    file = read_adapter(path)
    try:
        state, alphas = Reader.lora_state_dict(file.lora)
        with _second_allowed():
            Reader.load_lora_into_unet(state, alphas, unet=unet, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a LoRA for this model: {error}") from error
    if file.target_time is not None:
        target_time.put(unet, name, file.target_time.requires_grad_(False))
    use_adapter(unet, name)


@torch.no_grad()
def start_from(unet: UNet2DConditionModel, path: Path, alpha: float) -> None:
    """Fill the adapter in training with that of a file, of the same modules, rank and alpha.

    Where the UNet is told the target time and the file has no embedding of it, that stays as it is: without effect.
    Raises UserError when the file has another one, or is no LoRA.
    """
    file = read_adapter(path)
    given, _ = lora_modules(file.lora)
    own, _ = lora_modules(adapter_state(unet))
    strange = sorted(given.keys() ^ own.keys())
    if strange:
        raise UserError(
            f"adapter.start_from is {path}, with {len(given)} modules, and the adapter has {len(own)}; not in both are "
            f"{', '.join(strange[:3])} ...: use a LoRA for this base, and the adapter.targets that it was trained with"
        )
    for name, module in given.items():
        found = {part: tuple(module.tensors[part].shape) for part in module.tensors.keys() - {ALPHA}}
        wanted = {part: tuple(tensor.shape) for part, tensor in own[name].tensors.items()}
        its_alpha = float(module.tensors[ALPHA])
        if found != wanted or its_alpha != alpha:
            raise UserError(
                f"adapter.start_from is {path}, where {name} has {found} and alpha {its_alpha:g}, but the adapter has "
                f"{wanted} and alpha {alpha:g}: use its adapter.rank, {module.rank}, and adapter.alpha, {its_alpha:g}"
            )
        for part, tensor in own[name].tensors.items():
            tensor.copy_(module.tensors[part])
    if file.target_time is not None:
        embedding = target_time.embedding_of(unet, NAME)
        if embedding is None or embedding.target_input != file.target_time.target_input:
            raise UserError(
                f"adapter.start_from is {path}, whose network is told {file.target_time.target_input}: use "
                f'method.target_time = true and method.told = "{file.target_time.target_input}"'
            )
        embedding.load_state_dict(file.target_time.state_dict())


@contextmanager
def second_adapter(unet: UNet2DConditionModel, path: Path) -> Iterator[None]:
    """Within the block the adapter of a file stands in for the one in training, which is back after it."""
    load_adapter(unet, path, _SECOND)
    try:
        yield
    finally:
        use_adapter(unet, NAME)
        unet.delete_adapters([_SECOND])
        target_time.take(unet, _SECOND)
