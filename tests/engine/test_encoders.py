"""HostAutoencoder and HostTextEncoder: encoders that do not fit the network are refused in words."""

from __future__ import annotations

from typing import Any
from unittest import mock

import comfy.latent_formats
import pytest
import torch
from lent_encoders import SmallVae
from torch import nn

from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.comfy.autoencoder import HostAutoencoder
from trajectory_consistency.trainer.models.comfy.text_encoder import HostTextEncoder


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
