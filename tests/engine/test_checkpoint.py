"""HostCheckpoint on the stand-ins: what it recognizes, and that its model is the one that ComfyUI samples from."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import comfy.model_patcher
import pytest
import torch
from families import FAMILIES, written
from safetensors.torch import load_file, save_file
from small_models import each_family

from trajectory_consistency.tcd import DiscreteSchedule, FlowSchedule
from trajectory_consistency.tcd.adapter import layer_shapes
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.checkpoint import HostCheckpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_conditionings, to_row
from trajectory_consistency.trainer.models.comfy.library import check_version, load_comfyui

CPU = torch.device("cpu")


def base_of(name: str, folder: Path) -> BaseConfig:
    return base_at(name, written(name, folder))


def base_at(name: str, path: Path) -> BaseConfig:
    return BaseConfig(**FAMILIES[name].base(path))


@each_family
def test_it_recognizes_the_network_without_its_weights(name: str, folder: Path) -> None:
    checkpoint = open_checkpoint(base_of(name, folder))
    assert isinstance(checkpoint, HostCheckpoint)
    family = FAMILIES[name]
    assert checkpoint.latents.channels == family.latent[0]
    assert (checkpoint.latents.frames is not None) == (len(family.latent) == 4)
    empty = checkpoint.load(torch.float32, torch.device("meta"))
    assert all(parameter.is_meta for parameter in empty.network.parameters())
    loaded = checkpoint.load(torch.float32, CPU)
    assert layer_shapes(empty.network) == layer_shapes(loaded.network)
    kind = DiscreteSchedule if name == "sd15" else FlowSchedule
    assert isinstance(checkpoint.schedule, kind)
    assert torch.equal(checkpoint.schedule.sigmas_for(8), loaded.schedule.sigmas_for(8))
    assert loaded.adapter.time_layer == family.time_linear
    if kind is FlowSchedule:
        assert float(checkpoint.lora_metadata()["tcd.shift"]) > 0


@each_family
def test_targets_are_groups_and_kinds_of_layers(name: str, folder: Path) -> None:
    model = open_checkpoint(base_of(name, folder)).load(torch.float32, torch.device("meta"))
    everything = model.layers(["all"])
    if name == "sd15":  # the 14 kinds of the other engine
        assert "input_blocks.0.0" not in everything and "input_blocks.1.0.emb_layers.1" in everything
    else:
        assert everything == list(layer_shapes(model.network))
    attention, feed_forward = model.layers(["attention"]), model.layers(["feed_forward"])
    assert attention and feed_forward and not set(attention) & set(feed_forward)
    kind = model.layer_kind(attention[0])
    assert attention[0] in model.layers([kind]) and len(model.layers([kind])) < len(everything)
    with pytest.raises(UserError, match=re.escape("use the groups all, attention, feed_forward, convolution")):
        model.layers(["atention"])


def test_captions_of_different_lengths_come_back_as_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = [
        [[torch.randn(1, tokens, 8, generator=generator), {"pooled_output": torch.randn(1, 4), "num_tokens": tokens}]]
        for tokens in (3, 5, 1)
    ]
    batch = join([to_row(caption) for caption in captions])
    assert len(batch) == 3
    for caption, back in zip(captions, to_conditionings(batch), strict=True):
        assert torch.equal(back[0][0], caption[0][0])
        assert torch.equal(back[0][1]["pooled_output"], caption[0][1]["pooled_output"])
        assert back[0][1]["num_tokens"] == caption[0][1]["num_tokens"]
    (last,) = to_conditionings(batch[2:])
    assert torch.equal(last[0][0], captions[2][0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooled_output": torch.zeros(2, 4)}, "pooled_output of shape [2, 4]"),
        ({"model": "x"}, "the text model"),
        ({"mask": torch.ones(1, 8, 8)}, "a mask of the picture"),
    ],
)
def test_conditioning_that_is_no_single_caption_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_row([[torch.zeros(1, 3, 8), options]])


def test_files_that_are_missing_or_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base.model is nothing.safetensors: there is no such file"):
        open_checkpoint(BaseConfig(model="nothing.safetensors"))
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="ComfyUI does not recognize the network"):
        open_checkpoint(BaseConfig(model=str(tmp_path / "other.safetensors")))
    (tmp_path / "damaged.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_checkpoint(BaseConfig(model=str(tmp_path / "damaged.safetensors")))


def test_a_network_alone_needs_text_encoders_and_a_vae(folder: Path) -> None:
    base = base_of("flux", folder)
    with pytest.raises(UserError, match="base.text_encoders is empty"):
        open_checkpoint(base).check_encoders()
    with pytest.raises(UserError, match="base.vae is empty"):
        open_checkpoint(replace(base, text_encoders=(base.model,), clip_type="flux")).check_encoders()


def test_a_checkpoint_without_text_encoder_and_vae_is_refused_before_it_is_loaded(folder: Path) -> None:
    for name in ("sd15", "sd3"):
        checkpoint = open_checkpoint(base_of(name, folder))
        with pytest.raises(UserError, match="has no text encoder and no VAE: use a full checkpoint, or set"):
            checkpoint.check_encoders()


def test_a_checkpoint_with_both_is_taken(folder: Path, tmp_path: Path) -> None:
    encoder = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(768)}
    vae = {"first_stage_model.decoder.conv_in.weight": torch.ones(1, 1, 1, 1)}
    for more, missing in ((encoder, "no VAE"), (vae, "no text encoder")):
        save_file(load_file(written("sd15", folder)) | more, tmp_path / "part.safetensors")
        with pytest.raises(UserError, match=f"has {missing}: use a full"):
            open_checkpoint(BaseConfig(path=str(tmp_path / "part.safetensors"), engine="comfyui")).check_encoders()
    save_file(load_file(written("sd15", folder)) | encoder | vae, tmp_path / "whole.safetensors")
    open_checkpoint(BaseConfig(path=str(tmp_path / "whole.safetensors"), engine="comfyui")).check_encoders()


def test_files_of_their_own_complete_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    other = str(written("flux", folder))
    base = base_of("sd15", folder)
    with pytest.raises(UserError, match=r"has no text encoder: .* set base.text_encoders and base.clip_type$"):
        open_checkpoint(replace(base, vae=other)).check_encoders()
    encoders = replace(base, text_encoders=(other,), clip_type="stable_diffusion")
    with pytest.raises(UserError, match=r"has no VAE: .* set base.vae$"):
        open_checkpoint(encoders).check_encoders()
    open_checkpoint(replace(encoders, vae=other)).check_encoders()


@pytest.mark.parametrize(("name", "is_distilled"), [("flux-2-klein-4b", True), ("flux-2-klein-base-4b", False)])
def test_klein_is_distilled_unless_it_is_the_base(name: str, is_distilled: bool, folder: Path, tmp_path: Path) -> None:
    path = shutil.copy(written("flux2", folder), tmp_path / f"{name}.safetensors")
    notes = open_checkpoint(BaseConfig(model=str(path))).notes
    assert any("distilled to few steps already" in note for note in notes) == is_distilled


def test_an_lcm_is_no_teacher(folder: Path, tmp_path: Path) -> None:
    cond_proj = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(320, 256)}
    save_file(load_file(written("sd15", folder)) | cond_proj, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is an LCM, whose network takes the guidance scale as an input"):
        open_checkpoint(BaseConfig(path=str(tmp_path / "a.safetensors"), engine="comfyui"))


def test_an_unknown_clip_type_is_refused_before_weights_are_loaded(folder: Path) -> None:
    base = base_of("flux", folder)
    base = replace(base, text_encoders=(base.model,), clip_type="fluxx", vae=base.model)
    with pytest.raises(UserError, match="base.clip_type is fluxx: use one of stable_diffusion, .*flux"):
        open_checkpoint(base).check_encoders()


@pytest.mark.parametrize(("key", "value", "marker"), [("prediction", "v", "v_pred"), ("zero_snr", "yes", "ztsnr")])
def test_what_the_host_reads_from_the_file_cannot_be_set(key: str, value: str, marker: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"base.{key} is {value}, but ComfyUI reads this from the file.*{marker}"):
        open_checkpoint(replace(base_of("sd15", folder), **{key: value}))


def test_encoders_that_the_host_does_not_recognize_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    checkpoint = open_checkpoint(
        replace(base_of("flux", folder), text_encoders=(str(other),), clip_type="flux", vae=str(other))
    )
    with pytest.raises(UserError, match=r"other\.safetensors, which ComfyUI does not recognize as a text encoder"):
        checkpoint.load_text_encoder(CPU)
    with pytest.raises(UserError, match=r"other\.safetensors has no VAE that ComfyUI recognizes"):
        checkpoint.load_autoencoder(CPU)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('__version__ = "0.3.76"', "has ComfyUI 0.3.76, but training needs 0.33.0 or newer: update ComfyUI"),
        ('__version__ = "0.32.9"', "has ComfyUI 0.32.9, but training needs 0.33.0 or newer: update ComfyUI"),
        ("", "has a ComfyUI without a version in comfyui_version.py, but training needs 0.33.0"),
        ('# made in 2026\n__version__ = "0.33.0"', None),
        ('__version__ = "1.0"', None),
    ],
)
def test_a_host_that_is_too_old_is_refused(content: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "comfyui_version.py").write_text(content, encoding="utf-8")
    if message is None:
        check_version(tmp_path)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            check_version(tmp_path)


def test_no_host_is_an_error_that_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no ComfyUI in .*set COMFYUI_PATH to its folder, or get it with git clone"):
        load_comfyui.__wrapped__()


def test_the_network_is_loaded_without_dynamic_vram(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the host's loaders turn on by replacing the class of their patchers."""

    class Dynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    for name in ("sd3", "flux"):
        assert not open_checkpoint(base_of(name, folder)).load(torch.float32, CPU)._host.patcher.is_dynamic()
