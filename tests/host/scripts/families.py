"""The smallest network of each model family that ComfyUI's own detection accepts, with seeded weights.

Those of Z-Image and Qwen-Image would have gigabytes: the pack lent_models lets ComfyUI recognize smaller ones.

To be run by ComfyUI's Python: `python families.py FOLDER NAME...` writes the files. Imported there, it also gives what
a call of the network needs: the shape of a latent, and CONDITIONING as a text encoder of the family returns it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Family:
    """A model family's stand-in."""

    build: Callable[..., nn.Module]
    """Builds the network; the keyword arguments are dtype, device and operations."""
    latent: tuple[int, ...]
    """The shape of one latent, [C, h, w] or [C, F, h, w]."""
    context: tuple[int, int]
    """Tokens and width of the text encoder's output."""
    pooled: int | None = None
    """Width of the pooled output, if there is one."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Other entries of the CONDITIONING."""
    has_mask: bool = False
    time_linear: str = ""
    """The last Linear of the MLP that embeds t."""
    prefix: str = ""
    """Of the file's keys: CHECKPOINT_PREFIX for a checkpoint, none for the file of a network alone."""
    is_lent: bool = False
    """Whether the host recognizes the network only with the pack lent_models."""

    def conditioning(self, seed: int) -> list[Any]:
        """Return random CONDITIONING with one entry."""
        generator = torch.Generator().manual_seed(seed)
        tokens, width = self.context
        entries = dict(self.extras)
        context = torch.randn(1, tokens, width, generator=generator)
        if self.pooled:
            entries["pooled_output"] = torch.randn(1, self.pooled, generator=generator)
        if self.has_mask:
            entries["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        return [[context, entries]]

    def base(self, path: Path) -> dict[str, str]:
        """Return the section [base] of a configuration that trains the network in a file by the host."""
        return {"path" if self.prefix else "model": str(path), "engine": "comfyui"}

    def write(self, path: Path, seed: int = 0) -> None:
        """Write the network with random weights."""
        import comfy.ops

        network = self.build(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
        fill(network, seed)
        state = {self.prefix + name: _contiguous(value) for name, value in network.state_dict().items()}
        save_file(state, path)

    def load(self, path: Path, **options: Any) -> Any:
        """Return the host's MODEL of a file, as its loader nodes load it; options: the host's, such as dtype."""
        import comfy.sd

        if self.prefix:
            return comfy.sd.load_checkpoint_guess_config(
                str(path), output_vae=False, output_clip=False, model_options=options
            )[0]
        return comfy.sd.load_diffusion_model(str(path), model_options=options)


def written(name: str, folder: Path) -> Path:
    """Return the file of a family's stand-in in a folder; it is written on the first call."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        FAMILIES[name].write(path)
    return path


def fill(network: nn.Module, seed: int) -> None:
    """Give every parameter and buffer of floating point random values of a usual scale, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if not value.is_floating_point() or not value.numel():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 3:  # a table of modulations
                value.copy_(noise * value.shape[-1] ** -0.5)
            elif value.ndim >= 2:
                value.copy_(noise * value[0].numel() ** -0.5)
            else:
                is_gain = name.endswith(("weight", "scale", "gamma"))
                value.copy_(is_gain + 0.1 * noise)


def _contiguous(value: Tensor) -> Tensor:
    return value.detach().clone().contiguous()


def _sd15(**settings: Any) -> nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    defaults = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [1],
        "channel_mult": [1],
        "num_heads": 8,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "context_dim": 768,
        "transformer_depth": [1],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1],
        "use_linear_in_transformer": False,
    }
    return UNetModel(**{**defaults, **settings})


def _sd3(**settings: Any) -> nn.Module:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    depth = 2  # the width is always 64 * depth
    return OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        depth=depth,
        adm_in_channels=2048,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64 * depth},
        },
        num_patches=1024,
        pos_embed_max_size=32,
        **settings,
    )


def _flux(**settings: Any) -> nn.Module:
    from comfy.ldm.flux.model import Flux

    defaults = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 128,  # a multiple of the head's 128
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    }
    return Flux(**{**defaults, **settings})


def _schnell(**settings: Any) -> nn.Module:
    return _flux(guidance_embed=False, **settings)


def _flux2(**settings: Any) -> nn.Module:
    return _flux(
        in_channels=128,
        out_channels=128,
        vec_in_dim=None,
        context_in_dim=256,
        axes_dim=[32, 32, 32, 32],
        mlp_ratio=3.0,
        theta=2000,
        global_modulation=True,
        mlp_silu_act=True,
        qkv_bias=False,
        ops_bias=False,
        patch_size=1,
        txt_ids_dims=[3],
        **settings,
    )


def _z_image(**settings: Any) -> nn.Module:
    from comfy.ldm.lumina.model import NextDiT
    from lent_models.small_networks import Z_IMAGE

    return NextDiT(**Z_IMAGE, **settings)


def _qwen_image(**settings: Any) -> nn.Module:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
    from lent_models.small_networks import QWEN_IMAGE

    return QwenImageTransformer2DModel(**QWEN_IMAGE, **settings)


def _wan(**settings: Any) -> nn.Module:
    from comfy.ldm.wan.model import WanModel

    defaults = {
        "model_type": "t2v",
        "patch_size": (1, 2, 2),
        "in_dim": 16,
        "dim": 128,  # a multiple of the head's 128
        "ffn_dim": 256,
        "freq_dim": 256,
        "text_dim": 4096,
        "out_dim": 16,
        "num_heads": 1,
        "num_layers": 2,
        "cross_attn_norm": True,
    }
    return WanModel(**{**defaults, **settings})


def _hunyuan_video(**settings: Any) -> nn.Module:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    return HunyuanVideo(
        in_channels=16,
        out_channels=16,
        patch_size=[1, 2, 2],
        vec_in_dim=768,
        context_in_dim=256,
        hidden_size=128,  # a multiple of the head's 128
        mlp_ratio=4.0,
        num_heads=1,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16, 56, 56],
        theta=256,
        qkv_bias=True,
        guidance_embed=True,
        byt5=False,
        meanflow=False,
        use_cond_type_embedding=False,
        vision_in_dim=None,
        meanflow_sum=False,
        **settings,
    )


def _ltxv(**settings: Any) -> nn.Module:
    from comfy.ldm.lightricks.model import LTXVModel

    return LTXVModel(
        in_channels=128,
        cross_attention_dim=128,
        attention_head_dim=4,
        num_attention_heads=32,
        caption_channels=4096,
        num_layers=2,
        **settings,
    )


FAMILIES = {
    "sd15": Family(_sd15, (4, 8, 8), (77, 768), time_linear="time_embed.2", prefix=CHECKPOINT_PREFIX),
    "sd3": Family(_sd3, (16, 8, 8), (20, 4096), pooled=2048, time_linear="t_embedder.mlp.2", prefix=CHECKPOINT_PREFIX),
    "flux": Family(
        _flux, (16, 8, 8), (16, 4096), pooled=768, extras={"guidance": 3.5}, time_linear="time_in.out_layer"
    ),
    "flux-schnell": Family(_schnell, (16, 8, 8), (16, 4096), pooled=768, time_linear="time_in.out_layer"),
    "flux2": Family(_flux2, (128, 8, 8), (16, 256), extras={"guidance": 3.5}, time_linear="time_in.out_layer"),
    "wan": Family(_wan, (16, 2, 8, 8), (16, 4096), time_linear="time_embedding.2"),
    "hunyuan-video": Family(
        _hunyuan_video, (16, 2, 8, 8), (16, 256), pooled=768, extras={"guidance": 6.0}, time_linear="time_in.out_layer"
    ),
    "ltxv": Family(
        _ltxv, (128, 2, 4, 4), (16, 4096), has_mask=True, time_linear="adaln_single.emb.timestep_embedder.linear_2"
    ),
    "z-image": Family(_z_image, (16, 8, 8), (16, 64), has_mask=True, time_linear="t_embedder.mlp.2", is_lent=True),
    "qwen-image": Family(
        _qwen_image,
        (16, 1, 8, 8),
        (12, 64),
        has_mask=True,
        time_linear="time_text_embed.timestep_embedder.linear_2",
        is_lent=True,
    ),
}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        FAMILIES[name].write(Path(sys.argv[1]) / f"{name}.safetensors")
