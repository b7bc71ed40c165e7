"""Stand-ins for the files that the workflows name: model files with random weights and real layouts, and an image.

The networks are the small ones of the other tests. Text encoders and VAEs have full size, because the host builds them
in full size, except those that the pack lent_models lends. The layers of the text encoders are zeros: each then passes
on the sum of token and position embedding, and zeros take no time to write and no space on the disk.
"""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import sd3_state, sd3_transformer, sdxl_unet, write_controlnet_mini
from diffusers import AutoencoderKL, UNet2DConditionModel
from loras import RANK, random_lora
from PIL import Image, ImageDraw
from run_script import run_script
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from trajectory_consistency.tcd import TargetTime
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.tiny import world

HUB = "https://huggingface.co/"
RECOMMENDED_STEPS = 2
SETTINGS = {"tcd.steps": str(RECOMMENDED_STEPS), "tcd.eta": "0.5", "tcd.cfg": "1.0"}  # metadata of the TCD LoRAs
PICTURE = "example.png"  # an image that ComfyUI ships in its input folder

CLIP_L = CLIPTextConfig(**bases.config("sd15", "text_encoder"))
CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    vocab_size=CLIP_L.vocab_size,
    max_position_embeddings=CLIP_L.max_position_embeddings,
)
OPEN_CLIP_LAYER = {  # shapes in multiples of the width
    "attn.in_proj_weight": (3, 1),
    "attn.in_proj_bias": (3,),
    "attn.out_proj.weight": (1, 1),
    "attn.out_proj.bias": (1,),
    "mlp.c_fc.weight": (4, 1),
    "mlp.c_fc.bias": (4,),
    "mlp.c_proj.weight": (1, 4),
    "mlp.c_proj.bias": (1,),
} | {f"{norm}.{end}": (1,) for norm in ("ln_1", "ln_2") for end in ("weight", "bias")}


class StandIns:
    """Stand-in files in a host's base folder, written before a workflow that names them is opened or run."""

    def __init__(self, server: ComfyServer, unet: UNet2DConditionModel) -> None:
        self._models, self._unet = server.models, unet
        self._addresses: dict[Path, str] = {}
        self._input = server.base / "input"
        _picture().save(self._input / PICTURE)
        self._split = server.base / "split"
        """The files that only the host's own code can write."""
        self._split.mkdir()
        self._time_layers = run_script(server.host, "split_files.py", str(self._split))

    def provide(self, workflow: Mapping[str, Any]) -> None:
        """Write each model file for which a workflow has a download URL, and the LoRAs and pictures that a user has.

        A file of the same name from a different URL is replaced: both official TCD LoRAs have the same name.
        """
        for node in workflow["nodes"]:
            for model in node["properties"].get("models", []):
                self._provide(self._models / model["directory"] / model["name"], model["url"])
            if node["type"] == "TCDLoraLoader" and node["widgets_values"][0] in TRAINED:
                self._provide(self._models / "loras" / node["widgets_values"][0], "trained by the user")
            if node["type"] == "LoraLoader":
                self._provide(self._models / "loras" / node["widgets_values"][0], STYLE)
            if node["type"] == "LoadImageTextDataSetFromFolder":
                world.write_folder(self._input / node["widgets_values"][0], 3, seed=0)

    def _provide(self, path: Path, address: str) -> None:
        if self._addresses.get(path) == address:
            return
        path.parent.mkdir(exist_ok=True)
        new = path.with_suffix(".new")
        if path.name in TRAINED:
            name = TRAINED[path.name]
            _s_plus_lora(new, self._split / f"{name}.safetensors", self._time_layers[name])
        elif address in SPLIT:
            shutil.copy(self._split / f"{SPLIT[address]}.safetensors", new)
        else:
            WRITERS[address](new, self._unet)
        new.replace(path)
        self._addresses[path] = address

    def remove(self) -> None:
        """Delete the model files, because they are large."""
        for path in self._addresses:
            with suppress(PermissionError):  # on Windows a file that the host has open cannot be deleted
                path.unlink()


def save_with_holes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file in fp16; meta tensors become holes of the sparse file, which read as zeros."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data = file.tell()
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                file.seek(data + header[name]["data_offsets"][0])
                file.write(tensor.detach().half().contiguous().numpy().tobytes())
        file.truncate(data + end)


def clip(config: CLIPTextConfig) -> dict[str, Tensor]:
    """Return a text encoder under the names of transformers, with its layers on the meta device."""
    with torch.device("meta"):
        tensors = dict(CLIPTextModelWithProjection(config).state_dict())
    width = config.hidden_size
    tensors["text_model.final_layer_norm.weight"] = torch.ones(width)
    tensors["text_model.embeddings.position_embedding.weight"] = torch.randn(config.max_position_embeddings, width)
    tensors["text_projection.weight"] = torch.randn(width, width) / width**0.5
    if config is CLIP_L:  # it is enough that one encoder distinguishes words
        tensors["text_model.embeddings.token_embedding.weight"] = torch.randn(config.vocab_size, width)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def open_clip(config: CLIPTextConfig) -> dict[str, Tensor]:
    """Return the same under the names of OpenCLIP, as used for the larger encoder in SDXL checkpoints."""
    tensors = clip(config)
    embeddings, norm = "text_model.embeddings", "text_model.final_layer_norm"
    renamed = {
        "token_embedding.weight": tensors[f"{embeddings}.token_embedding.weight"],
        "positional_embedding": tensors[f"{embeddings}.position_embedding.weight"],
        "ln_final.weight": tensors[f"{norm}.weight"],
        "ln_final.bias": tensors[f"{norm}.bias"],
        "text_projection": tensors["text_projection.weight"].T,
    }
    for i in range(config.num_hidden_layers):
        for name, widths in OPEN_CLIP_LAYER.items():
            shape = [n * config.hidden_size for n in widths]
            renamed[f"transformer.resblocks.{i}.{name}"] = torch.empty(shape, device="meta")
    return renamed


_sdxl_unet = cache(sdxl_unet)


@cache
def vae(channels: int) -> Mapping[str, Tensor]:
    """Return a VAE with this many latent channels: 4 as in SD 1.5 and SDXL, or 16 as in SD3."""
    torch.manual_seed(0)
    config = bases.config("sd15", "vae") | {"latent_channels": channels}
    if channels == 16:
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    model = AutoencoderKL.from_config(config)
    return ldm.vae_to_ldm(model.state_dict(), model.config)


def _sd15(path: Path, unet: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    network = ldm.unet_to_ldm(unet.state_dict(), unet.config)
    text = {name: tensor for name, tensor in clip(CLIP_L).items() if name.startswith("text_model.")}
    save_with_holes({**network, **vae(4), **ldm.text_to_ldm(text)}, path)


def _sdxl(path: Path, _: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    unet = _sdxl_unet()
    network = ldm.unet_to_ldm(unet.state_dict(), unet.config)
    small = {name: tensor for name, tensor in clip(CLIP_L).items() if name.startswith("text_model.")}
    text = _prefixed("conditioner.embedders.0.transformer.", small)
    text |= _prefixed("conditioner.embedders.1.model.", open_clip(CLIP_G))
    save_with_holes({**network, **vae(4), **text}, path)


def _sd3(path: Path, _: UNet2DConditionModel) -> None:
    torch.manual_seed(0)
    text = _prefixed("text_encoders.clip_l.transformer.", clip(CLIP_L))
    text |= _prefixed("text_encoders.clip_g.transformer.", clip(CLIP_G))
    save_with_holes({**_prefixed(ldm.UNET_PREFIX, sd3_state()), **vae(16), **text}, path)


def _sd15_lora(path: Path, unet: UNet2DConditionModel) -> None:
    save_file(random_lora(unet), path, metadata=SETTINGS)


def _sdxl_lora(path: Path, _: UNet2DConditionModel) -> None:
    save_file(random_lora(_sdxl_unet()), path, metadata=SETTINGS)


def _sd3_lora(path: Path, _: UNet2DConditionModel) -> None:
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, module in sd3_transformer().named_modules():
        if name.startswith("transformer_blocks") and isinstance(module, torch.nn.Linear) and "norm" not in name:
            out, into = module.weight.shape
            down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, into), (out, RANK)))
            lora |= {f"transformer.{name}.lora_A.weight": down / into**0.5, f"transformer.{name}.lora_B.weight": up}
    save_file(lora, path)


def _vae16(path: Path, _: UNet2DConditionModel) -> None:
    save_with_holes({name.removeprefix("first_stage_model."): tensor for name, tensor in vae(16).items()}, path)


def _lent(path: Path, _: UNet2DConditionModel, **sizes: int) -> None:
    """Write a file that the pack lent_models loads as a text encoder."""
    save_file({"lent": torch.zeros(1)}, path, metadata={"lent": json.dumps(sizes)})


def _s_plus_lora(path: Path, network: Path, time_layer: str) -> None:
    """Write a random LoRA for every layer of a network, in the host's names, with an embedding of the target time."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: tensor for name, tensor in load_file(network).items() if name.endswith(".weight")}
    lora = {}
    for name, weight in weights.items():
        if weight.ndim > 1:
            out, into, *kernel = weight.shape
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            down = torch.randn(RANK, into, *kernel, generator=generator) / weight[0].numel() ** 0.5
            lora[f"{layer}.lora_down.weight"] = down
            lora[f"{layer}.lora_up.weight"] = torch.randn(out, RANK, *[1] * len(kernel), generator=generator) * 0.2
            lora[f"{layer}.alpha"] = torch.tensor(float(RANK))
    width = len(weights[f"{time_layer}.weight"])
    embedding = TargetTime.seeded(256, width, target_input="s", seed=0, device=torch.device("cpu"))
    torch.nn.init.normal_(embedding["out"].weight, std=0.02, generator=generator)
    lora |= {f"tcd_target_time.{name}": tensor for name, tensor in embedding.state_dict().items()}
    save_file(lora, path, metadata=SETTINGS | {"tcd.target_time": "s", "tcd.target_time.module": time_layer})


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _picture() -> Image.Image:
    """Return an image of 64 x 64 with edges to detect, and a transparent hole to inpaint."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGBA")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 40, 40), fill=(220, 40, 40, 255))
    draw.rectangle((36, 36, 59, 59), fill=(0, 0, 0, 0))
    return image


_SPLIT = "resolve/main/split_files/"
_FLUX_TEXT = f"{HUB}comfyanonymous/flux_text_encoders/resolve/main/"
_QWEN = f"{HUB}Comfy-Org/Qwen-Image_ComfyUI/{_SPLIT}"
_WAN = f"{HUB}Comfy-Org/Wan_2.1_ComfyUI_repackaged/{_SPLIT}"
SPLIT = {  # files that split_files.py writes, by name
    f"{HUB}Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors": "flux",
    f"{HUB}Comfy-Org/z_image/{_SPLIT}diffusion_models/z_image_bf16.safetensors": "z-image",
    f"{_QWEN}diffusion_models/qwen_image_fp8_e4m3fn.safetensors": "qwen-image",
    f"{_QWEN}vae/qwen_image_vae.safetensors": "wan-vae",  # both models have this kind of VAE
    f"{_WAN}diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors": "wan",
    f"{_WAN}vae/wan_2.1_vae.safetensors": "wan-vae",
}
TRAINED = {  # the LoRAs that the recipes of the same models write, and the networks that they are for
    "tcd-flux1-dev.safetensors": "flux",
    "tcd-z-image.safetensors": "z-image",
    "tcd-qwen-image.safetensors": "qwen-image",
    "tcd-wan.safetensors": "wan",
}
_CONTROLNETS = f"{HUB}comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
STYLE = "a style LoRA that the user has"
_HYPER = f"{HUB}ByteDance/Hyper-SD/resolve/main/"
WRITERS: dict[str, Callable[[Path, UNet2DConditionModel], object]] = {
    f"{HUB}Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors": _sd15,
    f"{HUB}stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors": _sdxl,
    f"{HUB}stabilityai/stable-diffusion-3-medium/resolve/main/sd3_medium_incl_clips.safetensors": _sd3,
    f"{HUB}h1t/TCD-SD15-LoRA/resolve/main/pytorch_lora_weights.safetensors": _sd15_lora,
    f"{HUB}h1t/TCD-SDXL-LoRA/resolve/main/pytorch_lora_weights.safetensors": _sdxl_lora,
    f"{_HYPER}Hyper-SD15-8steps-lora.safetensors": _sd15_lora,
    STYLE: _sd15_lora,
    f"{_HYPER}Hyper-SDXL-1step-lora.safetensors": _sdxl_lora,
    f"{_HYPER}Hyper-SD3-8steps-CFG-lora.safetensors": _sd3_lora,
    f"{_CONTROLNETS}control_v11p_sd15_canny_fp16.safetensors": write_controlnet_mini,
    f"{_FLUX_TEXT}clip_l.safetensors": partial(_lent, width=4096, pooled=768),
    f"{_FLUX_TEXT}t5xxl_fp16.safetensors": partial(_lent, width=4096, pooled=768),
    f"{HUB}Comfy-Org/z_image_turbo/{_SPLIT}text_encoders/qwen_3_4b.safetensors": partial(_lent, width=64),
    f"{_QWEN}text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors": partial(_lent, width=64),
    f"{_WAN}text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": partial(_lent, width=4096),
    f"{HUB}Comfy-Org/Lumina_Image_2.0_Repackaged/{_SPLIT}vae/ae.safetensors": _vae16,
    f"{HUB}Comfy-Org/z_image_turbo/{_SPLIT}vae/ae.safetensors": _vae16,
}
