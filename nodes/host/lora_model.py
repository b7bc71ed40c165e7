"""LORA_MODEL, the host's type for a LoRA in memory, with the metadata that a file would have."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ...tcd.files.verified_file import write_verified
from ..lora_file import LoraFile
from .lora_files import LORAS

_NAME = "the LORA_MODEL"
_log = logging.getLogger("trajectory-consistency")


class LoraModel(dict[str, Tensor]):
    """A LORA_MODEL: the tensors by name, which is all that the host's own nodes know of, and `metadata`."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def lora_in_memory(lora: Mapping[str, Tensor]) -> LoraFile:
    """Return a LORA_MODEL as a file that has been read. Raises ValueError if it is not a LoRA that can be applied."""
    return LoraFile(_NAME, None, lora, getattr(lora, "metadata", {}))


def save_lora(lora: Mapping[str, Tensor], prefix: str) -> str:
    """Write a LORA_MODEL into the host's folder of LoRAs, read it back, and return its name in the host's list.

    prefix: of the file's name, with folders; a number follows. The weights are rounded to float16. Raises ValueError if
    it is not a LoRA, or a number is not finite, and RuntimeError if what is read back differs.
    """
    file = lora_in_memory(lora)
    folder = folder_paths.get_folder_paths(LORAS)[0]
    target, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder)
    path = Path(target) / f"{name}_{counter:05}_.safetensors"
    tensors = {key: tensor.to("cpu", torch.float16) for key, tensor in lora.items()}
    write_verified(path, tensors, {**file.metadata, "modelspec.title": path.stem})
    _log.info("wrote %s", path)
    return os.path.join(subfolder, path.name)
