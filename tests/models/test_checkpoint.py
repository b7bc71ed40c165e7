"""A checkpoint file comes back as the model that was written, and anything else is refused with what it is."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_base import write_base
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


CPU, FLOAT = torch.device("cpu"), torch.float32


def opened(path: Path, **base: Any) -> UNetCheckpoint:
    return UNetCheckpoint(BaseConfig(path=str(path), **base))


def originals() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return bases.empty_unet("tiny"), bases.empty_vae("tiny"), bases.empty_text_encoder("tiny")


def test_a_single_file_gives_back_every_weight(checkpoint: Path) -> None:
    base = opened(checkpoint)
    models = (base.load(FLOAT, CPU).network, base.load_autoencoder(CPU).vae, base.load_text_encoder(CPU)[0])
    for loaded, original in zip(models, originals(), strict=True):
        ours, theirs = loaded.state_dict(), original.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key].half().float()) for key in theirs)
    assert (base.family, base.prediction, len(base.schedule.alpha_bar)) == ("tiny", "eps", 1000)


def test_a_loaded_base_is_frozen_and_in_evaluation(checkpoint: Path) -> None:
    base = opened(checkpoint)
    unet = base.load(torch.bfloat16, CPU).network
    models = (unet, base.load_text_encoder(CPU)[0], base.load_autoencoder(CPU).vae)
    for model in models:
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert [model.dtype for model in models] == [torch.bfloat16, torch.float32, torch.float32]


def test_what_the_unet_predicts_is_read_or_set(checkpoint: Path, tmp_path: Path) -> None:
    marked = {**load_file(checkpoint), "v_pred": torch.zeros(0)}
    save_file(marked, tmp_path / "v.safetensors")
    for base in (opened(tmp_path / "v.safetensors"), opened(checkpoint, prediction="v")):
        assert base.prediction == base.load(FLOAT, CPU).prediction == "v"


@pytest.mark.parametrize("family", ["sd15", "tiny"])
def test_every_weight_of_a_family_has_one_name_in_the_file(family: bases.Family) -> None:
    with torch.device("meta"):
        unet, vae, text = bases.empty_unet(family), bases.empty_vae(family), bases.empty_text_encoder(family)
    state = ldm.unet_to_ldm(unet.state_dict(), unet.config) | ldm.vae_to_ldm(vae.state_dict(), vae.config)
    state |= ldm.text_to_ldm(text.state_dict())
    assert len(state) == sum(len(model.state_dict()) for model in (unet, vae, text))
    assert state["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model at"):
        opened(tmp_path / "none.safetensors")


CONV_IN, LABEL = "input_blocks.0.0.weight", "label_emb.0.0.weight"
CONTEXT = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


def unet_of(inputs: int, width: int, label: int = 0, channels: int = 320) -> dict[str, tuple[int, ...]]:
    """The shapes by which a UNet is recognized."""
    shapes = {CONV_IN: (channels, inputs, 3, 3), CONTEXT: (8, width)} | ({LABEL: (8, label)} if label else {})
    return {ldm.UNET_PREFIX + name: shape for name, shape in shapes.items()}


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # whoever reads it waits for somebody who writes
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path} is not a file, but a device or a pipe"):
            opened(path)


@pytest.mark.parametrize("name", [CONV_IN, CONTEXT, LABEL])
def test_a_tensor_without_its_dimensions_is_named(tmp_path: Path, name: str) -> None:
    shapes = unet_of(4, 2048, 2816) | {ldm.UNET_PREFIX + name: (8,)}
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "flat.safetensors")
    with pytest.raises(UserError, match=rf"flat\.safetensors has .*{name} in the shape \[8\]: it is damaged"):
        opened(tmp_path / "flat.safetensors")


@pytest.mark.parametrize("size", [0, 5, 1000, -1000])
def test_a_truncated_file(checkpoint: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        opened(path)


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (unet_of(9, 768), "an inpainting model"),
        (unet_of(9, 1024), "an inpainting model"),
        (unet_of(9, 2048, 2816), "an inpainting model"),
        (unet_of(8, 768), "a model that edits or animates a picture"),
        (unet_of(5, 1024), "a depth-to-image model"),
        (unet_of(4, 1280, 2560, 384), "an SDXL refiner"),
        (unet_of(4, 1024, 2048), "an SD2.1 unCLIP model"),
        (unet_of(4, 99, channels=64), r"of an unknown architecture \(64 channels, text width 99\)"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "an SD3 model"),
        ({"model.diffusion_model.out.2.scale_weight": (1,)}, "a model with quantised weights"),
        ({"model.diffusion_model.out.2.weight_scale": (1,)}, "a model with quantised weights"),
        ({"model.diffusion_model.out.2.comfy_quant": (1,)}, "a model with quantised weights"),
        ({"model.diffusion_model.scaled_fp8": (1,)}, "a model with quantised weights"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, "a Flux model"),
        ({"double_blocks.0.x": (1,)}, "a Flux model"),
        (unet_of(4, 2048, 2816) | {"edm_mean": (1,)}, "Playground v2.5"),
        (unet_of(4, 2048, 2816) | {"edm_vpred.sigma_max": (1,)}, "a CosXL model"),
        ({"control_model.x": (1,)}, "a ControlNet"),
        ({"lora_unet_x.lora_down.weight": (4, 4)}, "a LoRA"),
        ({"x": (1,)}, "no checkpoint of Stable Diffusion"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, shapes: dict[str, tuple[int, ...]], name: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    with pytest.raises(UserError, match=f"is {name}.*SD1.5, SD2.x and SDXL models"):
        opened(path)


def test_a_file_of_another_format(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="or of another format"):
        opened(tmp_path / "old.ckpt")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="or of another format, such as .ckpt or .gguf"):
        opened(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("first_stage_model.", "has no VAE .* set base.vae to the file of one, or use a full checkpoint"),
        ("cond_stage_model.", "has no text encoder .* use a full checkpoint"),
        ("first_stage_model.decoder.conv_out", "does not hold a whole tiny vae"),
        ("model.diffusion_model.middle_block.2.in_layers.2", "does not hold a whole tiny unet"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1.mlp",
            "not hold a whole tiny text_encoder: 4 of its",
        ),
    ],
)
def test_a_checkpoint_that_lacks_a_part(checkpoint: Path, tmp_path: Path, dropped: str, message: str) -> None:
    path = tmp_path / "part.safetensors"
    save_file({key: value for key, value in load_file(checkpoint).items() if not key.startswith(dropped)}, path)
    if "whole" not in message:  # a part that is missing altogether is missed at once
        with pytest.raises(UserError, match=message):
            opened(path).check_encoders()
    with pytest.raises(UserError, match=message):
        opened(path).load(FLOAT, CPU)
        opened(path).load_autoencoder(CPU)
        opened(path).load_text_encoder(CPU)


SDXL_UNET = bases.config("sdxl", "unet")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"there is no unet/config\.json in it"),
        ({"unet/config.json": []}, r"config\.json is no configuration of a model, but '\[\]'"),
        ({"unet/config.json": SDXL_UNET | {"block_out_channels": 320}}, "an unknown architecture"),
        ({"transformer/config.json": {"_class_name": "SD3Transformer2DModel"}}, "a SD3Transformer2DModel, not a UNet"),
        ({"unet/config.json": SDXL_UNET | {"in_channels": 9}}, "an inpainting model"),
        (
            {
                "unet/config.json": SDXL_UNET,
                "scheduler/scheduler_config.json": {"_class_name": "EDMDPMSolverMultistepScheduler"},
            },
            "another noise schedule than Stable Diffusion's",
        ),
        (
            {
                "unet/config.json": SDXL_UNET,
                "scheduler/scheduler_config.json": {"beta_schedule": "linear"},
            },
            "another noise schedule than Stable Diffusion's",
        ),
        ({"unet/config.json": SDXL_UNET}, "has no text_encoder/"),
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, files: dict[str, dict[str, object]], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        opened(tmp_path).check_encoders()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 0}, "a config.json of no model"),
        ({"block_out_channels": [None]}, "a config.json of no model|is not a complete diffusers folder"),
        ({"latent_channels": "four"}, "a config.json of no model|is not a complete diffusers folder"),
    ],
)
def test_settings_that_build_no_model_are_named(
    checkpoint: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = bases.config("tiny", "vae") | change
    bases.empty_vae("tiny").save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        opened(checkpoint, vae=str(tmp_path)).load_autoencoder(CPU)
    (tmp_path / "vae" / "config.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        opened(checkpoint, vae=str(tmp_path)).load_autoencoder(CPU)


def test_text_encoder_files_are_only_for_the_other_engine(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="base.text_encoders is set, which only the engine comfyui takes"):
        opened(checkpoint, text_encoders=("clip.safetensors",), clip_type="flux")
