"""Conditioning: the UNet's other inputs, as one value whose parts stay together."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from trajectory_consistency.trainer.data.buckets import CropPlan, Size
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint


def rows(count: int, *, sdxl: bool = True) -> Conditioning:
    numbers = torch.arange(count, dtype=torch.float32)
    context = numbers.view(-1, 1, 1).expand(-1, 77, 8)
    if not sdxl:
        return Conditioning.of(context=context, pooled=None)
    return Conditioning.of(context=context, pooled=numbers.view(-1, 1) + 10, time_ids=numbers.view(-1, 1) + 100)


def test_a_conditionings_parts_stay_together() -> None:
    three = rows(3)
    for part in (three[torch.tensor([2, 0])], Conditioning.cat([three[2:], three[:1]])):
        assert set(part.tensors) == {"context", "pooled", "time_ids"} and len(part) == 2
        assert part.tensors["context"][:, 0, 0].tolist() == [2, 0]
        assert part.tensors["pooled"].flatten().tolist() == [12, 10]
        assert part.tensors["time_ids"].flatten().tolist() == [102, 100]
    many = three[1:2].expand(4)
    assert many.tensors["context"].shape == (4, 77, 8) and many.tensors["pooled"].flatten().tolist() == [11] * 4
    assert len(three.expand(3)) == 3 and "pooled" not in rows(2, sdxl=False)[:1].to("cpu").tensors
    with pytest.raises(RuntimeError):
        three.expand(4)


def test_conditionings_of_two_kinds_do_not_mix() -> None:
    with pytest.raises(ValueError, match="1 of 2 conditionings have pooled"):
        Conditioning.cat([rows(1), rows(1, sdxl=False)])


def test_captions_of_different_lengths_are_not_joined_without_their_model() -> None:
    short, long = (Conditioning.of(context=torch.zeros(1, tokens, 8)) for tokens in (77, 120))
    with pytest.raises(ValueError, match=r"rows of context have different shapes, \[77, 8\], \[120, 8\]: join them by"):
        Conditioning.cat([short, long])


def test_sizes_are_in_the_order_that_sdxl_was_trained_on() -> None:
    unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=256),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=6 * 256 + 1280)),
    )
    theirs = StableDiffusionXLPipeline._get_add_time_ids(
        SimpleNamespace(unet=unet), (1, 2), (3, 4), (5, 6), torch.float32, text_encoder_projection_dim=1280
    )
    crop = CropPlan(original=Size(1, 2), resized=Size(7, 8), bucket=Size(5, 6), top=3, left=4)
    caption = Conditioning.of(context=torch.zeros(1, 77, 8), pooled=torch.zeros(1, 6))
    ours = UNetCheckpoint.collate(object.__new__(UNetCheckpoint), [caption], crop.framing)
    assert torch.equal(ours.tensors["time_ids"], theirs)


def test_a_framing_is_what_its_rows_say() -> None:
    rows = torch.arange(12, dtype=torch.int32).view(2, 6)
    framing = Framing.from_rows(rows)
    assert framing.original.tolist() == [[0, 1], [6, 7]] and framing.crop.tolist() == [[2, 3], [8, 9]]
    assert framing.target.tolist() == [[4, 5], [10, 11]] and torch.equal(framing.to_rows(), rows)
    whole, crop = Framing.whole(5, 6, 2), CropPlan(Size(5, 6), Size(5, 6), Size(5, 6), 0, 0)
    assert torch.equal(whole.to_rows(), crop.framing.to_rows().expand(2, -1))
