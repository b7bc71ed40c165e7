"""Captions of several chunks in one batch of a UNet: each row is predicted as if it were alone."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from small_bases import random_parts, shrink, to_state, write
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.conditioning import join
from trajectory_consistency.trainer.models.unet.families import Family

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "word " * 80, "(tag:1.3), " * 80]


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_padding(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, tmp_path / "bases")
    base = UNetCheckpoint(BaseConfig(path=str(write(tmp_path / "a.safetensors", to_state(random_parts(family))))))
    model, framing = base.load(torch.float32, CPU), Framing.whole(64, 64, 3)
    rows = base.load_text_encoder(CPU).encode([*CAPTIONS, ""])
    assert [row.tensors["context"].shape[1] for row in rows] == [77, 154, 231, 77]
    cond, one = base.collate(rows[:3], framing), Framing.whole(64, 64)
    x = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    t = model.schedule.point(torch.tensor([700, 400, 100]), x.ndim)
    together = model.x0(x, t, cond)
    alone = [
        model.x0(x[k : k + 1], model.schedule.point(t.time[k : k + 1], x.ndim), base.collate([rows[k]], one))
        for k in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    cut = Conditioning({**cond.tensors, "mask": torch.ones_like(cond.tensors["mask"])})
    assert not torch.allclose(model.x0(x, t, cut), together, rtol=1e-3, atol=1e-3), "the padding must matter"

    w, uncond = torch.tensor([2.0, 3.0, 4.0]), base.collate(rows[3:], one)
    raw = [model._predict(x, t, each, None) for each in (cond, uncond.expand(3))]
    guided = model.guided_x0(x, t, cond, uncond, w)
    expected = raw[1] + w.view(-1, 1, 1, 1) * (raw[0] - raw[1])
    alpha, sigma = t.level
    torch.testing.assert_close(
        guided,
        (x - sigma * expected) / alpha if model.prediction == "eps" else alpha * x - sigma * expected,
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_mask_stands_only_where_lengths_differ() -> None:
    short, long = (Conditioning.of(context=torch.ones(1, tokens, 8), pooled=torch.ones(1, 2)) for tokens in (77, 154))
    assert join([long, long]).tensors.keys() == {"context", "pooled"}
    mixed = join([short, long])
    assert mixed.tensors["mask"].sum(1).tolist() == [77, 154] and mixed.tensors["context"][0, 77:].abs().max() == 0
    again = join([mixed[:1], short, mixed])
    assert again.tensors["mask"].sum(1).tolist() == [77, 77, 77, 154]


@torch.no_grad()
def test_a_repeated_caption_is_the_caption_as_in_comfyuis_batches() -> None:
    """ComfyUI repeats the shorter caption of a batch instead of masking; both are the shorter caption alone."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 8)
    mixed = join([Conditioning.of(context=context), Conditioning.of(context=torch.randn(1, 154, 8))])[:1].tensors
    masked = unet(x, 500, mixed["context"], encoder_attention_mask=mixed["mask"]).sample
    torch.testing.assert_close(masked, unet(x, 500, context.repeat(1, 2, 1)).sample, rtol=1e-4, atol=1e-5)
