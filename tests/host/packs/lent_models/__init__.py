"""A ComfyUI pack for the tests: models of families whose smallest real files are too large.

A file of one tensor is loaded as a text encoder if its metadata say that it is lent. Z-Image and Qwen-Image are also
recognized at a small size; the networks are the host's own.
"""

import json

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
from comfy.supported_models_base import ClipTarget

from .small_networks import QWEN_IMAGE, Z_IMAGE
from .small_text import SmallText

_load_clip = comfy.sd.load_clip


def load_clip(ckpt_paths, *args, **options):
    """Return a small CLIP where the first file is lent, otherwise what the host loads."""
    _, metadata = comfy.utils.load_torch_file(ckpt_paths[0], return_metadata=True)
    if "lent" not in (metadata or {}):
        return _load_clip(ckpt_paths, *args, **options)
    text = type("Text", (SmallText,), json.loads(metadata["lent"]))
    return comfy.sd.CLIP(ClipTarget(comfy.sd1_clip.SD1Tokenizer, text))


class SmallZImage(comfy.supported_models.ZImage):
    """Z-Image with two heads, recognized by its width."""

    unet_config = {"image_model": "lumina2", "dim": Z_IMAGE["dim"]}
    unet_extra_config = Z_IMAGE


class SmallQwenImage(comfy.supported_models.QwenImage):
    """Qwen-Image with one head, recognized by its number of blocks."""

    unet_config = {"image_model": "qwen_image", "num_layers": QWEN_IMAGE["num_layers"]}
    unet_extra_config = QWEN_IMAGE


if comfy.sd.load_clip.__module__ == comfy.sd.__name__:
    comfy.sd.load_clip = load_clip
    comfy.supported_models.models[:0] = [SmallZImage, SmallQwenImage]

NODE_CLASS_MAPPINGS = {}
