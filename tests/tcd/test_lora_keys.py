"""LoRA names: every spelling in use meets in one, on every module of the real networks; what is not one is refused."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_spellings import SPELLINGS, halves_on, sd15_unet, sdxl_unet, spelled
from trajectory_consistency.tcd import kohya_name, lora_modules, split_name, to_kohya
from trajectory_consistency.tcd.unet_layers import TARGETS

LINEAR, CONV = "mid_block.attentions.0.proj_in", "down_blocks.0.resnets.1.conv1"
SHAPES = {kohya_name(LINEAR): (6, 5), kohya_name(CONV): (8, 7, 3, 3)}


def peft_halves(rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{LINEAR}.lora_A.weight": torch.randn(rank, 5),
        f"{LINEAR}.lora_B.weight": torch.randn(6, rank),
        f"{CONV}.lora_A.weight": torch.randn(rank, 7, 3, 3),
        f"{CONV}.lora_B.weight": torch.randn(8, rank, 1, 1),
    }


# Modules


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
        ("lora_unet_conv_in", "lora_unet_conv_in"),
        ("diffusion_model.input_blocks.1.1.proj_in", "lora_unet_input_blocks_1_1_proj_in"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
        ("transformer.transformer_blocks.0.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q"),
        ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_unet_transformer_blocks_0_attn_to_q"),
        ("module.unet.mid_block.resnets.0.conv1", "lora_unet_mid_block_resnets_0_conv1"),
        ("_orig_mod.module.base_model.model.conv_in", "lora_unet_conv_in"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("lora_te2_text_projection", "lora_te2_text_projection"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("base_model.model.text_encoder_2.text_projection", "lora_te2_text_projection"),
        ("text_encoders.clip_l.transformer.x", "text_encoders.clip_l.transformer.x"),
        ("unet.mid.attn1.processor.to_out", "lora_unet_mid_attn1_to_out_0"),
        ("unet.mid.attn1.processor.to_out.0", "lora_unet_mid_attn1_to_out_0"),
    ],
)
def test_kohya_name(path: str, name: str) -> None:
    assert kohya_name(path) == name


@pytest.fixture(scope="module", params=[(sd15_unet, 278), (sdxl_unet, 788)], ids=["SD1.5", "SDXL"])
def halves(request: pytest.FixtureRequest) -> dict[tuple[str, str], Tensor]:
    """A LoRA on all target modules of a real UNet, by diffusers path and side, without numbers."""
    build: Callable[[], UNet2DConditionModel]
    build, count = request.param
    modules = {path: module for path, module in build().named_modules() if path.endswith(TARGETS)}
    assert len(modules) == count
    return halves_on(modules)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_the_same_names(halves: dict[tuple[str, str], Tensor], spelling: str) -> None:
    names = {key: f"lora_unet_{key[0].replace('.', '_')}.lora_{key[1]}.weight" for key in halves}
    found = to_kohya(spelled(halves, SPELLINGS[spelling]))
    assert len(set(names.values())) == len(halves)
    assert set(found) == set(names.values())
    assert all(found[name] is halves[key] for key, name in names.items())


def test_the_parts_of_a_file_keep_their_own_spelling(halves: dict[tuple[str, str], Tensor]) -> None:
    file = spelled(halves, SPELLINGS["diffusers processor"])
    modules, others = lora_modules(file)
    assert not others
    assert all(any(name.startswith(module.path) for name in file) for module in modules.values())
    assert {split_name(name) for name in file} >= {(next(iter(modules.values())).path, "lora_up.weight")}


# Parts


def test_alpha_is_written_for_modules_without() -> None:
    own = torch.tensor(3.0)
    lora = to_kohya({**peft_halves(), f"{LINEAR}.alpha": own}, 32)
    assert lora[f"{kohya_name(LINEAR)}.alpha"] is own
    alpha = lora[f"{kohya_name(CONV)}.alpha"]
    assert (float(alpha), alpha.shape, alpha.dtype) == (32, torch.Size([]), torch.float32)
    assert len(lora) == 6


def test_alpha_by_path_and_rank() -> None:
    asked = []

    def alpha(path: str, rank: int) -> float | None:
        asked.append((path, rank))
        return 5.0 if path == CONV else None

    lora = to_kohya({f"unet.base_model.model.{name}": half for name, half in peft_halves(rank=2).items()}, alpha)
    assert asked == [(LINEAR, 2), (CONV, 2)]
    assert f"{kohya_name(LINEAR)}.alpha" not in lora
    assert float(lora[f"{kohya_name(CONV)}.alpha"]) == 5.0


def test_no_alpha_is_made_up() -> None:
    assert not [name for name in to_kohya(peft_halves()) if name.endswith("alpha")]


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_a_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha is .* must be a positive number"):
        to_kohya(peft_halves(), alpha)


@pytest.mark.parametrize(
    "ending",
    ["", ".weight", ".default", ".default.weight", ".tcd.weight"],
    ids=["plain", "weight", "default", "both", "another adapter"],
)
def test_magnitudes_of_peft_become_scales_of_rows(ending: str) -> None:
    linear, conv = torch.randn(6), torch.randn(1, 8, 1, 1)
    magnitudes = {f"{LINEAR}.lora_magnitude_vector{ending}": linear, f"{CONV}.lora_magnitude_vector{ending}": conv}
    lora = to_kohya({**peft_halves(), **magnitudes})
    assert torch.equal(lora[f"{kohya_name(LINEAR)}.dora_scale"], linear[:, None])
    assert torch.equal(lora[f"{kohya_name(CONV)}.dora_scale"], conv.view(8, 1, 1, 1))


def test_a_dora_scale_is_passed_on_as_it_is() -> None:
    scale = torch.randn(1, 7, 1, 1)  # of the inputs, as LyCORIS had it first
    lora = to_kohya({**peft_halves(), f"lycoris_{CONV.replace('.', '_')}.dora_scale": scale})
    assert lora[f"{kohya_name(CONV)}.dora_scale"] is scale


def test_the_core_of_a_convolution_gives_the_kernel() -> None:
    name = f"lycoris_{CONV.replace('.', '_')}"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, 7, 1, 1),
        f"{name}.lora_mid.weight": torch.randn(2, 2, 3, 3),
        f"{name}.lora_up.weight": torch.randn(8, 2, 1, 1),
    }
    lora = to_kohya(tensors)
    assert lora[f"{kohya_name(CONV)}.lora_mid.weight"] is tensors[f"{name}.lora_mid.weight"]
    assert lora_modules(tensors)[0][kohya_name(CONV)].shape == (8, 7, 3, 3)


@pytest.mark.parametrize(("weight", "bias"), [("diff", "diff_b"), ("w_norm", "b_norm")])
def test_differences_are_modules_without_alpha(weight: str, bias: str) -> None:
    norm = {f"diffusion_model.norm.{weight}": torch.randn(6), f"diffusion_model.norm.{bias}": torch.randn(6)}
    lora = to_kohya({**peft_halves(), **norm, f"{LINEAR}.diff_b": torch.randn(6)}, 4)
    assert lora["lora_unet_norm.diff"] is norm[f"diffusion_model.norm.{weight}"]
    assert lora["lora_unet_norm.diff_b"] is norm[f"diffusion_model.norm.{bias}"]
    assert f"{kohya_name(LINEAR)}.diff_b" in lora and "lora_unet_norm.alpha" not in lora
    modules = lora_modules(lora)[0]
    assert (modules["lora_unet_norm"].shape, modules["lora_unet_norm"].rank) == ((6,), 0)
    assert modules[kohya_name(LINEAR)].shape == (6, 5)


# What is refused


def test_a_weight_with_a_lora_and_a_difference_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{LINEAR} has both a LoRA and a difference of its weight"):
        to_kohya({**peft_halves(), f"{LINEAR}.diff": torch.randn(6, 5)})


def test_two_adapters_of_peft_in_one_file_are_refused() -> None:
    both = {
        name.replace(".weight", f".{adapter}.weight"): half for name, half in peft_halves().items() for adapter in "ab"
    }
    with pytest.raises(ValueError, match=r"lora_A\.a\.weight and .*lora_A\.b\.weight would both be named"):
        to_kohya(both)


@pytest.mark.parametrize(
    "name",
    [
        *("conv_in.weight", "conv_in.lora_C.weight", "conv_in.lora_A.bias", "lora_A.weight", "blocks.0.diff_m"),
        *("conv_in.lora_A.tcd.bias", "conv_in.lora_A.two.names.weight", "lora_unet_x.different"),
    ],
)
def test_a_name_that_is_not_of_a_lora_is_refused(name: str) -> None:
    assert split_name(name) is None
    assert lora_modules({name: torch.zeros(2, 5)}) == ({}, (name,))
    with pytest.raises(ValueError, match=f"{name} is not the name of a LoRA tensor"):
        to_kohya({**peft_halves(), name: torch.zeros(2, 5)}, 2)


def test_two_names_that_become_one_are_refused() -> None:
    halves = {"a.b.lora_A.weight": torch.zeros(2, 5), "lora_unet_a_b.lora_down.weight": torch.zeros(2, 5)}
    both = "a.b.lora_A.weight and lora_unet_a_b.lora_down.weight would both be named lora_unet_a_b.lora_down.weight"
    with pytest.raises(ValueError, match=both):
        to_kohya(halves, 2)


@pytest.mark.parametrize(("half", "missing"), [("A", "lora_up.weight"), ("B", "lora_down.weight")])
def test_a_module_with_one_half_is_refused(half: str, missing: str) -> None:
    halves = {name: tensor for name, tensor in peft_halves().items() if f"{CONV}.lora_{half}" in name}
    with pytest.raises(ValueError, match=f"{CONV} has no {missing}: the LoRA is damaged"):
        to_kohya(halves, 2)


@pytest.mark.parametrize(
    ("down", "up", "mid"),
    [
        ((2, 5), (6, 3), None),
        ((2, 7, 3, 3), (8, 3, 1, 1), None),
        ((), (6, 2), None),
        ((2, 5), (6,), None),
        ((0, 5), (6, 0), None),
        ((2, 7, 1, 1), (8, 2, 1, 1), (3, 2, 3, 3)),
        ((2, 7, 1, 1), (8, 2, 1, 1), (2, 3, 3, 3)),
        ((2, 7, 3, 3), (8, 2, 1, 1), (2, 2, 3, 3)),
        ((2, 7), (8, 2), (2, 2)),
    ],
)
def test_parts_of_different_rank_are_damaged(
    down: tuple[int, ...], up: tuple[int, ...], mid: tuple[int, ...] | None
) -> None:
    parts = {"lora_unet_x.lora_down.weight": torch.zeros(down), "lora_unet_x.lora_up.weight": torch.zeros(up)}
    if mid:
        parts["lora_unet_x.lora_mid.weight"] = torch.zeros(mid)
    with pytest.raises(ValueError, match="lora_unet_x has .* not of one rank"):
        to_kohya(parts)


@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_complex_numbers_are_no_lora(part: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"lora_down.weight": (2, 5), "lora_up.weight": (6, 2), "alpha": ()}
    parts = {f"lora_unet_x.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    parts[f"lora_unet_x.{part}"] = parts[f"lora_unet_x.{part}"].to(torch.complex64)
    with pytest.raises(ValueError, match=f"lora_unet_x has {part} of torch.complex64, which is no weight"):
        lora_modules(parts)


def test_an_alpha_of_many_numbers_is_damaged() -> None:
    with pytest.raises(ValueError, match=f"{LINEAR} has .*alpha 2, which are not of one rank"):
        to_kohya({**peft_halves(), f"{LINEAR}.alpha": torch.zeros(2)})


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("hada_t2", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_b", "LoKr"),
        ("oft_blocks", "OFT"),
        ("oft_diag", "OFT"),
        ("a1.weight", "GLoRA"),
        ("set_weight", "replaced weight"),
        ("reshape_weight", "replaced weight"),
    ],
)
def test_another_kind_of_adapter_is_named(part: str, kind: str) -> None:
    tensors = {"lora_unet_x.alpha": torch.tensor(1.0), f"lora_unet_x.{part}": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=f"kind {kind} .lora_unet_x.{part}., not of a LoRA: use ComfyUI's own"):
        lora_modules(tensors)


def test_an_embedding_of_the_target_time_is_not_left_out_in_silence() -> None:
    tensors = {**peft_halves(), "tcd_target_time.in.weight": torch.zeros(2, 2)}
    assert lora_modules(tensors)[1] == ("tcd_target_time.in.weight",)
    with pytest.raises(ValueError, match=r"tcd_target_time.in.weight is not the name of a LoRA tensor"):
        to_kohya(tensors)
