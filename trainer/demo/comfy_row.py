"""The demo's last rows: the same captions and noise, sampled with the same LoRA file by the nodes in ComfyUI."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

from ..find_comfyui import Host
from ..models.unet.checkpoint import TINY_PATH
from ..models.unet.families import config
from ..tiny.world import SIZE_PX
from ..views.preview_prompts import load_picture
from .comfy_server import ComfyServer

_TINY_PACK = Path(__file__).parent / "tiny_pack"
_CHECKPOINT, _LORA = "tiny-sd.safetensors", "tcd-lora.safetensors"


class ComfyOutput(NamedTuple):
    """What ComfyUI sampled for B captions."""

    latents: Tensor
    """Normalized latents, float32 [B, 4, h, w]."""
    pictures: Tensor
    """uint8 [B, 3, H, W]."""


def sample_in_comfy(
    host: Host, lora: Path, captions: Sequence[str], *, seed: int, steps: Sequence[int], eta: float
) -> list[ComfyOutput]:
    """Sample caption k with seed + k in a ComfyUI started for it; return one output for each number of steps.

    Raises ComfyError, with ComfyUI's own message, if it does not start or a node fails.
    """
    with tempfile.TemporaryDirectory(prefix="tcd-demo-") as folder:
        server = ComfyServer(Path(folder), packs=[_TINY_PACK], host=host)
        shutil.copyfile(TINY_PATH, server.models / "checkpoints" / _CHECKPOINT)
        shutil.copyfile(lora, server.models / "loras" / _LORA)
        with server:
            return [_run(server, _prompt(captions, seed=seed, steps=each, eta=eta), len(captions)) for each in steps]


def _run(server: ComfyServer, graph: dict[str, Any], count: int) -> ComfyOutput:
    outputs = server.run(graph)
    latents = [load(server.fetch(outputs[f"latent {k}"]["latents"][0]))["latent_tensor"] for k in range(count)]
    files = [io.BytesIO(server.fetch(outputs[f"image {k}"]["images"][0])) for k in range(count)]
    pictures = [load_picture(file) for file in files]
    # ComfyUI saves latents in the scale of the VAE.
    return ComfyOutput(torch.cat(latents) * config("tiny", "vae")["scaling_factor"], torch.stack(pictures))


def _prompt(captions: Sequence[str], *, seed: int, steps: int, eta: float) -> dict[str, Any]:
    """Return the node graph in ComfyUI's API format: one set of loaders, then one chain of nodes for each caption."""
    graph: dict[str, Any] = {
        "base": _node("CheckpointLoaderSimple", ckpt_name=_CHECKPOINT),
        "vae": _node("TinyShapesVAE", ckpt_name=_CHECKPOINT),
        "lora": _node("TCDLoraLoader", model=["base", 0], lora_name=_LORA, strength_model=1.0),
        "sigmas": _node("TCDSigmas", model=["lora", 0], steps=steps, denoise=1.0),
        "sampler": _node("TCDSampler", eta=eta),
        "empty": _node("EmptyLatentImage", width=SIZE_PX, height=SIZE_PX, batch_size=1),
        "nothing": _node("CLIPTextEncode", clip=["base", 1], text=""),
    }
    for k, caption in enumerate(captions):
        graph |= {
            f"caption {k}": _node("CLIPTextEncode", clip=["base", 1], text=caption),
            f"sample {k}": _node(
                "SamplerCustom",
                model=["lora", 0],
                add_noise=True,
                noise_seed=seed + k,
                cfg=1.0,
                positive=[f"caption {k}", 0],
                negative=["nothing", 0],
                sampler=["sampler", 0],
                sigmas=["sigmas", 0],
                latent_image=["empty", 0],
            ),
            f"latent {k}": _node("SaveLatent", samples=[f"sample {k}", 0], filename_prefix=f"latent-{k}"),
            f"decoded {k}": _node("VAEDecode", samples=[f"sample {k}", 0], vae=["vae", 0]),
            f"image {k}": _node("SaveImage", images=[f"decoded {k}", 0], filename_prefix=f"image-{k}"),
        }
    return graph


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
