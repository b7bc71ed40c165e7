"""LoRA names: the spellings that must meet, and an account of what fits a model."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from tcd import Coverage, ShapeMismatch, coverage, kohya_name, to_kohya

LINEAR, CONV = "mid_block.attentions.0.proj_in", "down_blocks.0.resnets.1.conv1"
SHAPES = {kohya_name(LINEAR): (6, 5), kohya_name(CONV): (8, 7, 3, 3)}
TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "time_emb_proj", "proj_in"]


def peft_halves(rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{LINEAR}.lora_A.weight": torch.randn(rank, 5),
        f"{LINEAR}.lora_B.weight": torch.randn(6, rank),
        f"{CONV}.lora_A.weight": torch.randn(rank, 7, 3, 3),
        f"{CONV}.lora_B.weight": torch.randn(8, rank, 1, 1),
    }


@pytest.fixture
def lora() -> dict[str, Tensor]:
    return to_kohya(peft_halves(), 2)


# kohya names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
        ),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
        ),
        ("mid_block.resnets.0.time_emb_proj", "lora_unet_mid_block_resnets_0_time_emb_proj"),
        ("conv_in", "lora_unet_conv_in"),
    ],
)
def test_kohya_name(path: str, name: str) -> None:
    assert kohya_name(path) == name


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model.", "unet.base_model.model."])
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_every_spelling_of_peft_becomes_the_same_kohya_names(prefix: str, adapter: str) -> None:
    halves = peft_halves()
    spelled = {prefix + name.replace(".weight", f"{adapter}.weight"): half for name, half in halves.items()}
    lora = to_kohya(spelled, 32)
    assert set(lora) == {
        f"{module}.{part}" for module in SHAPES for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    for path in (LINEAR, CONV):
        assert lora[f"{kohya_name(path)}.lora_down.weight"] is halves[f"{path}.lora_A.weight"]
        assert lora[f"{kohya_name(path)}.lora_up.weight"] is halves[f"{path}.lora_B.weight"]
        alpha = lora[f"{kohya_name(path)}.alpha"]
        assert (float(alpha), alpha.shape, alpha.dtype) == (32, torch.Size([]), torch.float32)


def test_an_adapter_on_a_real_unet_is_covered_to_the_last_tensor() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    shapes = {
        kohya_name(name.removesuffix(".weight")): tuple(weight.shape)
        for name, weight in unet.named_parameters()
        if name.endswith(".weight")
    }
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    halves = get_peft_model_state_dict(unet)
    lora = to_kohya(halves, 4)
    assert len(lora) == len(halves) * 3 // 2
    report = coverage(lora, shapes)
    assert report.complete, report.describe()
    assert len(report.matched) == len(halves) // 2


@pytest.mark.parametrize(
    "name",
    ["conv_in.weight", "conv_in.lora_C.weight", "conv_in.lora_A.other.weight", "conv_in.lora_A.bias", "lora_A.weight"],
)
def test_a_name_that_is_not_peft_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not the name of a PEFT LoRA tensor"):
        to_kohya({name: torch.zeros(2, 5)}, 2)


def test_two_names_that_become_one_are_refused() -> None:
    halves = {"a.b.lora_A.weight": torch.zeros(2, 5), "a_b.lora_A.weight": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match="a_b.lora_A.weight and another tensor would both be named lora_unet_a_b"):
        to_kohya(halves, 2)


@pytest.mark.parametrize(("half", "missing"), [("A", "lora_up.weight"), ("B", "lora_down.weight")])
def test_a_module_with_one_half_is_refused(half: str, missing: str) -> None:
    halves = {name: tensor for name, tensor in peft_halves().items() if f"{CONV}.lora_{half}" in name}
    with pytest.raises(ValueError, match=f"{kohya_name(CONV)} has no {missing}: the LoRA is damaged"):
        to_kohya(halves, 2)


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_a_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha is .* must be a positive number"):
        to_kohya(peft_halves(), alpha)


# Coverage


def test_a_file_for_the_model_is_complete(lora: dict[str, Tensor]) -> None:
    report = coverage(lora, {**SHAPES, "lora_unet_untouched": (3, 3)})
    assert report == Coverage(matched=tuple(SHAPES), missing=(), mismatched=())
    assert report.complete
    assert report.describe() == "2 of 2 LoRA modules fit the model"


def test_alpha_is_optional_in_a_file(lora: dict[str, Tensor]) -> None:
    assert coverage({name: tensor for name, tensor in lora.items() if "alpha" not in name}, SHAPES).complete


def test_modules_that_the_model_lacks_are_missing(lora: dict[str, Tensor]) -> None:
    report = coverage(lora, {kohya_name(CONV): (8, 7, 3, 3)})
    assert report == Coverage(matched=(kohya_name(CONV),), missing=(kohya_name(LINEAR),), mismatched=())
    assert not report.complete
    assert report.describe() == f"1 of 2 LoRA modules fit the model; not in the model: {kohya_name(LINEAR)}"


@pytest.mark.parametrize("shape", [(6, 4), (7, 5), (5, 6)])
def test_a_wrong_shape_is_told_with_both_shapes(lora: dict[str, Tensor], shape: tuple[int, int]) -> None:
    report = coverage(lora, {**SHAPES, kohya_name(LINEAR): shape})
    assert report.mismatched == (ShapeMismatch(kohya_name(LINEAR), (6, 5), shape),)
    assert not report.complete
    assert f"wrong shape: {kohya_name(LINEAR)} is 6 x 5, but the model has {shape[0]} x {shape[1]}" in report.describe()


def test_a_convolution_of_another_kernel_is_a_wrong_shape(lora: dict[str, Tensor]) -> None:
    report = coverage(lora, {**SHAPES, kohya_name(CONV): (8, 7, 1, 1)})
    assert report.mismatched == (ShapeMismatch(kohya_name(CONV), (8, 7, 3, 3), (8, 7, 1, 1)),)


def test_linear_halves_fit_a_convolution_of_one_pixel(lora: dict[str, Tensor]) -> None:
    assert coverage(lora, {**SHAPES, kohya_name(LINEAR): (6, 5, 1, 1)}).complete


def test_names_that_are_not_kohya_are_missing(lora: dict[str, Tensor]) -> None:
    strange = {"unet.conv_in.lora_A.weight": torch.zeros(2, 4), f"{kohya_name(CONV)}.dora_scale": torch.zeros(8)}
    report = coverage({**lora, **strange}, SHAPES)
    assert report.missing == tuple(strange)
    assert len(report.matched) == 2
    assert not report.complete


def test_a_file_without_anything_is_not_complete() -> None:
    assert not coverage({}, SHAPES).complete


def test_a_long_list_is_cut_short() -> None:
    names = tuple(f"lora_unet_{i}" for i in range(10))
    assert Coverage(("lora_unet_x",), names, ()).describe() == (
        "1 of 11 LoRA modules fit the model; not in the model: lora_unet_0, lora_unet_1, lora_unet_2 and 7 more"
    )


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight"])
def test_a_file_with_a_half_lost_is_damaged(lora: dict[str, Tensor], part: str) -> None:
    del lora[f"{kohya_name(LINEAR)}.{part}"]
    with pytest.raises(ValueError, match=f"{kohya_name(LINEAR)} has no {part}: the LoRA is damaged"):
        coverage(lora, SHAPES)


@pytest.mark.parametrize(("down", "up"), [((2, 5), (6, 3)), ((2, 7, 3, 3), (8, 3, 1, 1)), ((), (6, 2)), ((2, 5), (6,))])
def test_halves_of_different_rank_are_damaged(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    halves = {"lora_unet_x.lora_down.weight": torch.zeros(down), "lora_unet_x.lora_up.weight": torch.zeros(up)}
    with pytest.raises(ValueError, match="lora_unet_x has .* not of one rank"):
        coverage(halves, {"lora_unet_x": (6, 5)})
