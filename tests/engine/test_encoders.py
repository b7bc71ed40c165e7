"""HostAutoencoder and HostTextEncoder: encoders that do not fit the network are refused, and layers are skipped."""

from __future__ import annotations

from typing import Any
from unittest import mock

import comfy.latent_formats
import comfy.sd
import pytest
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.supported_models_base import ClipTarget
from lent_encoders import SmallVae
from torch import nn

from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.comfy.autoencoder import HostAutoencoder
from trajectory_consistency.trainer.models.comfy.text_encoder import HostTextEncoder, skip_layers


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (comfy.latent_formats.Flux, (16, 8, 8), [((4, 8, 8), 8), ((16, 1, 8, 8), 8), ((16, 4, 4), 16)]),
        (comfy.latent_formats.Wan21, (16, 1, 8, 8), [((16, 8, 8), 8), ((48, 1, 8, 8), 8)]),
    ],
)
def test_a_vae_of_another_family_is_refused(form: Any, right: tuple[int, ...], wrong: list[Any]) -> None:
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert HostAutoencoder(SmallVae(right, 8), form()).encode(pixels).mean.shape == (2, *right)
    for shape, stride in wrong:
        with pytest.raises(UserError, match=r"the network takes \[16, .*: name the VAE of this model in base\.vae"):
            HostAutoencoder(SmallVae(shape, stride), form()).encode(pixels)


def test_conditioning_that_cannot_be_used_is_an_error_of_the_user() -> None:
    clip = mock.Mock(cond_stage_model=nn.Identity())
    clip.encode_from_tokens_scheduled.return_value = [[torch.zeros(1, 3, 8), {"hooks": object()}]]
    with pytest.raises(UserError, match="the caption 'a star' cannot be used: the CONDITIONING has hooks"):
        HostTextEncoder(clip).encode(["a star"])


def clip_of(layers: int, *, like: Any = None) -> Any:
    """A small CLIP-L of random weights, or with those of the first layers of another one."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": layers}
    cpu = torch.device("cpu")
    options = {"dtype": torch.float32, "load_device": cpu, "offload_device": cpu, "clip_l_model_config": sizes}
    clip = comfy.sd.CLIP(ClipTarget(SD1Tokenizer, SD1ClipModel), model_options=options)
    generator = torch.Generator().manual_seed(0)
    weights = like.cond_stage_model.state_dict() if like else {}
    for name, parameter in clip.cond_stage_model.named_parameters():
        parameter.data = weights.get(name, torch.randn(parameter.shape, generator=generator)).clone()
    return clip


def test_the_layer_before_the_last_is_the_last_of_an_encoder_with_one_layer_less() -> None:
    clip = clip_of(3)
    (last,) = HostTextEncoder(clip).encode(["a (red:1.2) circle"])
    skip_layers(clip, 2)
    (found,), (expected,) = (
        HostTextEncoder(each).encode(["a (red:1.2) circle"]) for each in (clip, clip_of(2, like=clip))
    )
    assert torch.equal(found.tensors["cross_attn"], expected.tensors["cross_attn"])
    assert not torch.equal(found.tensors["cross_attn"], last.tensors["cross_attn"])
    assert [HostTextEncoder(clip).chunks("word " * count) for count in (75, 76)] == [1, 2]
    for layer in (0, 4):
        with pytest.raises(UserError, match=f"base.clip_skip is {layer}, but the text encoder has 3 layers"):
            skip_layers(clip, layer)
