"""An account of what of a LoRA fits a model."""

import pytest
import torch
from torch import Tensor

from trajectory_consistency.tcd import Coverage, ShapeMismatch, coverage, kohya_name

LINEAR, CONV = "mid_block.attentions.0.proj_in", "down_blocks.0.resnets.1.conv1"
SHAPES = {kohya_name(LINEAR): (6, 5), kohya_name(CONV): (8, 7, 3, 3)}


@pytest.fixture
def lora() -> dict[str, Tensor]:
    return {
        f"{LINEAR}.lora_A.weight": torch.randn(2, 5),
        f"{LINEAR}.lora_B.weight": torch.randn(6, 2),
        f"{CONV}.lora_A.weight": torch.randn(2, 7, 3, 3),
        f"{CONV}.lora_B.weight": torch.randn(8, 2, 1, 1),
    }


def test_a_file_for_the_model_is_complete(lora: dict[str, Tensor]) -> None:
    report = coverage(lora, {**SHAPES, "lora_unet_untouched": (3, 3)})
    assert report == Coverage(matched=tuple(SHAPES), missing=(), mismatched=())
    assert report.complete
    assert report.describe() == "2 of 2 LoRA modules fit the model"


def test_numbers_are_not_looked_at(lora: dict[str, Tensor]) -> None:
    header = {name: tensor.to("meta") for name, tensor in lora.items()}
    assert coverage({**header, f"{LINEAR}.alpha": torch.empty((), device="meta")}, SHAPES).complete


def test_modules_that_the_model_lacks_are_missing(lora: dict[str, Tensor]) -> None:
    report = coverage(lora, {kohya_name(CONV): (8, 7, 3, 3)})
    assert report == Coverage(matched=(kohya_name(CONV),), missing=(LINEAR,), mismatched=())
    assert not report.complete
    assert report.describe() == f"1 of 2 LoRA modules fit the model; not in the model: {LINEAR}"


@pytest.mark.parametrize("shape", [(6, 4), (7, 5), (5, 6)])
def test_a_wrong_shape_is_reported_with_both_shapes(lora: dict[str, Tensor], shape: tuple[int, int]) -> None:
    report = coverage(lora, {**SHAPES, kohya_name(LINEAR): shape})
    assert report.mismatched == (ShapeMismatch(LINEAR, (6, 5), shape),)
    assert not report.complete
    assert f"wrong shape: {LINEAR} is 6 x 5, but the model has {shape[0]} x {shape[1]}" in report.describe()


def test_a_convolution_of_another_kernel_is_a_wrong_shape(lora: dict[str, Tensor]) -> None:
    report = coverage(lora, {**SHAPES, kohya_name(CONV): (8, 7, 1, 1)})
    assert report.mismatched == (ShapeMismatch(CONV, (8, 7, 3, 3), (8, 7, 1, 1)),)


def test_linear_halves_fit_a_convolution_of_one_pixel(lora: dict[str, Tensor]) -> None:
    assert coverage(lora, {**SHAPES, kohya_name(LINEAR): (6, 5, 1, 1)}).complete


def test_tensors_that_are_not_a_loras_are_missing(lora: dict[str, Tensor]) -> None:
    strange = {"unet.conv_in.weight": torch.zeros(2, 4), "lora_unet_conv_in.bias": torch.zeros(8)}
    report = coverage({**lora, **strange}, SHAPES)
    assert report.missing == tuple(strange)
    assert len(report.matched) == 2
    assert not report.complete


@pytest.mark.parametrize("path", ["lora_te_model_x", "lora_te2_x", "text_encoder.text_model.x", "text_encoder_2.x"])
def test_text_encoders_are_listed_separately(lora: dict[str, Tensor], path: str) -> None:
    halves = {f"{path}.lora_down.weight": torch.zeros(2, 5), f"{path}.lora_up.weight": torch.zeros(5, 2)}
    report = coverage({**lora, **halves}, SHAPES)
    assert report.missing == (path,)
    assert report.describe() == (f"2 of 3 LoRA modules fit the model; for a text encoder, not in the model: {path}")


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 7, 1, 1)])
def test_a_dora_scale_is_of_the_outputs_or_the_inputs(lora: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    assert coverage({**lora, f"{CONV}.dora_scale": torch.zeros(shape)}, SHAPES).complete


@pytest.mark.parametrize("shape", [(8, 1), (8,), (7, 1, 1, 1), (1, 8, 1, 1), (8, 7, 1, 1), ()])
def test_a_dora_scale_of_another_shape_is_a_wrong_shape(lora: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    report = coverage({**lora, f"{CONV}.dora_scale": torch.zeros(shape)}, SHAPES)
    assert report.mismatched == (ShapeMismatch(f"{CONV}.dora_scale", shape, (8, 7, 3, 3)),)
    assert report.matched == (kohya_name(LINEAR),)


NORM = {"lora_unet_norm": (8,)}


def test_differences_fit_a_weight_and_a_bias_of_their_shape(lora: dict[str, Tensor]) -> None:
    more = {"norm.diff": torch.zeros(8), "norm.diff_b": torch.zeros(8), f"{CONV}.diff_b": torch.zeros(8)}
    report = coverage({**lora, **more}, {**SHAPES, **NORM}, biases={"lora_unet_norm", kohya_name(CONV)})
    assert report.complete and len(report.matched) == 3


@pytest.mark.parametrize(
    ("name", "shape", "biases", "complaint"),
    [
        ("norm.diff", (7,), [], "wrong shape: norm is 7, but the model has 8"),
        ("norm.diff", (8, 1), [], "wrong shape: norm is 8 x 1, but the model has 8"),
        ("norm.diff_b", (8,), [], "not in the model: norm.diff_b"),
        ("norm.diff_b", (7,), ["lora_unet_norm"], "wrong shape: norm.diff_b is 7, but the model has 8"),
        (f"{CONV}.diff_b", (8,), [], f"not in the model: {CONV}.diff_b"),
        ("other.diff", (8,), [], "not in the model: other"),
    ],
)
def test_differences_that_do_not_fit_are_reported(
    lora: dict[str, Tensor], name: str, shape: tuple[int, ...], biases: list[str], complaint: str
) -> None:
    report = coverage({**lora, name: torch.zeros(shape)}, {**SHAPES, **NORM}, biases=biases)
    assert not report.complete
    assert complaint in report.describe()


def test_a_file_without_anything_is_not_complete() -> None:
    assert not coverage({}, SHAPES).complete


def test_a_long_list_is_cut_short() -> None:
    names = tuple(f"lora_unet_{i}" for i in range(10))
    assert Coverage(("lora_unet_x",), names, ()).describe() == (
        "1 of 11 LoRA modules fit the model; not in the model: lora_unet_0, lora_unet_1, lora_unet_2 and 7 more"
    )
