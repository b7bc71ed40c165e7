"""HostCheckpoint on the stand-ins: what it recognizes, and that its model is the one that ComfyUI samples from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, written
from small_models import each_family

from trajectory_consistency.tcd import DiscreteSchedule, FlowSchedule
from trajectory_consistency.tcd.adapter import layer_shapes
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.checkpoint import HostCheckpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_conditionings, to_row

CPU = torch.device("cpu")


def base_of(name: str, folder: Path) -> BaseConfig:
    path = str(written(name, folder))
    return BaseConfig(path=path, engine="comfyui") if FAMILIES[name].prefix else BaseConfig(model=path)


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
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="ComfyUI does not recognize the network"):
        open_checkpoint(BaseConfig(model=str(tmp_path / "other.safetensors")))
    (tmp_path / "damaged.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_checkpoint(BaseConfig(model=str(tmp_path / "damaged.safetensors")))


def test_a_network_alone_needs_text_encoders_and_a_vae(folder: Path) -> None:
    checkpoint = open_checkpoint(base_of("flux", folder))
    with pytest.raises(UserError, match="base.text_encoders is empty"):
        checkpoint.check_encoders()
