"""The user's own LoRAs on the base: merged by hand, and what else in a run they change."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from small_bases import random_parts, shrink, to_state, write
from trajectory_consistency.tcd.adapter import layer_shapes
from trajectory_consistency.tcd.distill.distilled import distilled_note
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.data.cache import cache_paths, input_fingerprints
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.files.metadata import lora_metadata
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.unet import ldm
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.families import Family

CPU, FLOAT = torch.device("cpu"), torch.float32
ALPHA, RANK = 1.0, 2
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TEXT = {
    "kohya": {"sd15": ["lora_te_"], "sd2": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"]},
    "diffusers": {
        "sd15": ["text_encoder."],
        "sd2": ["text_encoder."],
        "sdxl": ["text_encoder.", "text_encoder_2."],
    },
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "bases")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", to_state(random_parts("sd15")))


def halves(model: nn.Module, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for each layer of a model, by path."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: (
            torch.randn(RANK, *shape[1:], generator=generator),
            torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator),
        )
        for path, shape in layer_shapes(model).items()
    }


def named(parts: dict[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    """A LoRA in kohya's names, or, for a prefix that ends in a dot, in those of diffusers."""
    tensors = {}
    for path, (down, up) in parts.items():
        module = prefix + (path if prefix.endswith(".") else path.replace(".", "_"))
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
    return tensors if not prefix.endswith(".") else {name.replace(".lora_", ".lora."): v for name, v in tensors.items()}


def in_file(path: str) -> str:
    """The path of a text encoder's layer as files have it, in every version of transformers."""
    return path if path == "text_projection" else f"text_model.{path.removeprefix('text_model.')}"


def write_lora(path: Path, *parts: dict[str, Tensor]) -> Path:
    save_file({name: tensor for part in parts for name, tensor in part.items()}, path)
    return path


def merged(weight: Tensor, *updates: tuple[float, tuple[Tensor, Tensor]]) -> Tensor:
    """The weight with LoRAs, in float64."""
    for strength, (down, up) in updates:
        product = up.double().flatten(1) @ down.double().flatten(1)
        weight = weight.double() + strength * ALPHA / RANK * product.view(weight.shape)
    return weight


def settings(base: Path, *loras: tuple[Path, float]) -> Config:
    tables = [{"path": str(path), "strength": strength} for path, strength in loras]
    prompts = base.with_name("prompts.txt")
    prompts.write_text("a star", encoding="utf-8")
    given = {
        "base": {"path": str(base), "loras": tables},
        "data": {"prompts": str(prompts)},
        "output": {"folder": str(base.with_name("out"))},
    }
    return from_mapping(given)


def opened(base: Path, *loras: tuple[Path, float]) -> UNetCheckpoint:
    return UNetCheckpoint(settings(base, *loras).base)


def unet_lora(path: Path, seed: int = 1) -> Path:
    return write_lora(path, named(halves(random_parts("sd15").unet, seed), "lora_unet_"))


@pytest.mark.parametrize("spelling", TEXT)
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_every_weight_gets_each_lora_at_its_strength(family: Family, spelling: str, tmp_path: Path) -> None:
    parts = random_parts(family)
    path = write(tmp_path / "model.safetensors", to_state(parts))
    unet = [halves(parts.unet, seed) for seed in (1, 2)]
    text = [halves(model, seed) for seed, model in enumerate(parts.text_encoder, 3)]
    prefixes = TEXT[spelling][family]
    first = write_lora(tmp_path / "first.safetensors", named(unet[0], "lora_unet_"))
    for_text = [
        named({in_file(layer): each for layer, each in found.items()}, prefix)
        for prefix, found in zip(prefixes, text, strict=True)
    ]
    second = write_lora(tmp_path / "second.safetensors", named(unet[1], "unet."), *for_text)
    checkpoint = opened(path, (first, 0.8), (second, -0.5))
    network, encoder = checkpoint.load(FLOAT, CPU).network, checkpoint.load_text_encoder(CPU)
    for layer in unet[0]:
        weights = (model.get_submodule(layer).weight for model in (network, parts.unet))
        found, plain = weights
        torch.testing.assert_close(
            found.double(), merged(plain, (0.8, unet[0][layer]), (-0.5, unet[1][layer])), **CLOSE
        )
        assert not found.requires_grad
    for model, plain_model, updates in zip(encoder, parts.text_encoder, text, strict=True):
        for layer, update in updates.items():
            plain = plain_model.get_submodule(layer).weight
            torch.testing.assert_close(
                model.get_submodule(layer).weight.double(), merged(plain, (-0.5, update)), **CLOSE
            )


def test_a_file_with_the_names_of_single_files_is_the_same_lora(tmp_path: Path) -> None:
    """As sd-scripts writes it for SDXL: lora_unet_input_blocks_4_1_proj_in."""
    parts = random_parts("sdxl")
    path = write(tmp_path / "model.safetensors", to_state(parts))
    given = {layer: each for layer, each in halves(parts.unet, 1).items() if layer.startswith("down_blocks.1")}
    locations = ldm.unet_locations([f"{layer}.weight" for layer in given], parts.unet.config)
    keys = {layer: locations[f"{layer}.weight"].name.removesuffix(".weight") for layer in given}
    native = named({keys[layer].removeprefix(ldm.UNET_PREFIX): each for layer, each in given.items()}, "lora_unet_")
    assert "lora_unet_input_blocks_4_1_proj_in.lora_up.weight" in native
    file = write_lora(tmp_path / "native.safetensors", native)
    own = write_lora(tmp_path / "own.safetensors", named(given, "lora_unet_"))
    expected = opened(path, (own, 1.0)).load(FLOAT, CPU)
    found = opened(path, (file, 1.0)).load(FLOAT, CPU)
    for layer in given:
        assert torch.equal(*(each.network.get_submodule(layer).weight for each in (found, expected)))
    weights = load_weights(opened(path).load(FLOAT, CPU), file)
    assert set(weights.paths) == set(given)
    twice = write_lora(tmp_path / "twice.safetensors", native, load_file(own))
    with pytest.raises(UserError, match=r"lora_unet_\w+ and lora_unet_\w+, which are the same layer: remove one"):
        opened(path, (twice, 1.0))


def test_in_half_precision_the_sum_of_all_is_rounded_once(base: Path, tmp_path: Path) -> None:
    loras = [unet_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    network = opened(base, *((path, 1.0) for path in loras)).load(torch.bfloat16, CPU).network
    plain = opened(base).load(torch.bfloat16, CPU).network
    updates = [halves(random_parts("sd15").unet, seed) for seed in (1, 2)]
    for layer in updates[0]:
        weight = plain.get_submodule(layer).weight.float()
        expected = merged(weight, *((1.0, each[layer]) for each in updates)).bfloat16()
        wrong = (network.get_submodule(layer).weight != expected).float().mean()
        assert wrong < 1e-3, "but for ties between float32 and float64"


def test_what_the_base_has_no_place_for_is_counted_and_named(base: Path, tmp_path: Path) -> None:
    whole = named(halves(random_parts("sd15").unet, 1), "lora_unet_")
    extra = {
        "lora_unet_no_such.lora_down.weight": torch.ones(2, 4),
        "lora_unet_no_such.lora_up.weight": torch.ones(4, 2),
    }
    for name, tensors, message in (
        ("more", whole | extra, r"of \d+ LoRA modules fit the model; not in the model: lora_unet_no_such"),
        ("t5", whole | {f"lora_te3_x.{k}": v for k, v in _plain(4).items()}, "not in the model: .*lora_te3_x"),
        ("dora", whole | {"lora_unet_conv_in.dora_scale": torch.ones(16, 1, 1, 1)}, "conv_in has dora_scale"),
        ("loha", {"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "of the kind LoHa"),
        ("s+", whole | _embedding(), "has an embedding of the target time, and a base has none"),
    ):
        path = write_lora(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(UserError, match=rf"base\.loras\[0\].*{message}"):
            opened(base, (path, 1.0))
    with pytest.raises(UserError, match=r"base\.loras\[0\]: there is no file"):
        opened(base, (tmp_path / "nothing.safetensors", 1.0))


def test_a_lora_for_another_family_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "xl.safetensors", named(halves(random_parts("sdxl").unet, 1), "lora_unet_"))
    with pytest.raises(UserError, match=r"base\.loras\[0\].*does not fit the base.*use a LoRA for this base"):
        opened(base, (path, 1.0))


def _plain(width: int) -> dict[str, Tensor]:
    return {"lora_down.weight": torch.ones(2, width), "lora_up.weight": torch.ones(width, 2)}


def _embedding() -> dict[str, Tensor]:
    shapes = {"in.weight": (8, 4), "in.bias": (8,), "out.weight": (8, 8), "out.bias": (8,)}
    return {f"tcd_target_time.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def test_another_lora_or_strength_is_another_base_with_the_same_latents(base: Path, tmp_path: Path) -> None:
    style = unet_lora(tmp_path / "style.safetensors")
    encoder = random_parts("sd15").text_encoder[0]
    text_halves = {in_file(layer): each for layer, each in halves(encoder, 3).items()}
    words = write_lora(tmp_path / "words.safetensors", named(text_halves, "lora_te_"))
    cases = {
        "plain": settings(base),
        "style": settings(base, (style, 1.0)),
        "weaker": settings(base, (style, 0.5)),
        "other": settings(base, (unet_lora(tmp_path / "other.safetensors", 2), 1.0)),
        "words": settings(base, (words, 1.0)),
        "weaker words": settings(base, (words, 0.5)),
    }
    prints = {name: input_fingerprints(each, FLOAT)["the base"] for name, each in cases.items()}
    assert len(set(prints.values())) == len(cases)
    paths = {name: cache_paths(each, open_checkpoint(each.base), FLOAT) for name, each in cases.items()}
    assert len({each.rows_folder("latents") for each in paths.values()}) == 1
    assert len({each.rows_folder("drawn") for each in paths.values()}) == len(cases)
    captions = {name: each.rows_folder("captions") for name, each in paths.items()}
    assert captions["plain"] == captions["style"] == captions["weaker"] == captions["other"]
    assert len({captions[name] for name in ("plain", "words", "weaker words")}) == 3


def test_the_plan_and_the_file_say_which_loras_to_load_too(base: Path, tmp_path: Path) -> None:
    config = settings(base, (unet_lora(tmp_path / "my-style.safetensors"), 0.8))
    checkpoint = open_checkpoint(config.base)
    assert checkpoint.describe().endswith("with my-style.safetensors at 0.8")
    assert any("load the same where it is used" in note for note in checkpoint.notes)
    assert lora_metadata(config, checkpoint)["tcd.base_loras"] == "my-style.safetensors at 0.8"
    plain = settings(base)
    assert "tcd.base_loras" not in lora_metadata(plain, open_checkpoint(plain.base))
    assert not any("LoRA" in note for note in open_checkpoint(plain.base).notes)


@pytest.mark.parametrize(
    ("name", "is_distilled"),
    [
        ("sd_xl_turbo_1.0_fp16", True),
        ("dreamshaperXL_turboDPMSDE", True),
        ("RealVisXL_V4.0_Lightning", True),
        ("LCM_Dreamshaper_v7", True),
        ("Hyper-SDXL-1step", True),
        ("flux1-schnell-fp8", True),
        ("ltxv-2b-0.9.8-distilled", True),
        ("flux-dev-de-distilled", False),
        ("flux-dedistilled", False),
        ("undistilled", False),
        ("hyperrealism_v3", False),
        ("v1-5-pruned-emaonly", False),
    ],
)
def test_a_base_of_few_steps_is_known_by_its_name(name: str, is_distilled: bool) -> None:
    notes = distilled_note(["base", name])
    assert bool(notes) == is_distilled
    if is_distilled:
        assert len(notes) == 1 and re.search(rf"warning: .*{re.escape(name)} has .*no teacher", notes[0])


def test_the_warning_comes_once_in_the_notes_of_the_base(base: Path, tmp_path: Path) -> None:
    turbo = base.rename(base.with_name("my-turbo.safetensors"))
    lightning = unet_lora(tmp_path / "lightning.safetensors")
    for checkpoint in (opened(turbo), opened(turbo, (lightning, 1.0))):
        assert sum("no teacher" in note for note in checkpoint.notes) == 1
    plain = turbo.rename(base)
    assert not any("no teacher" in note for note in opened(plain).notes)
    assert any("lightning has lightning" in note for note in opened(plain, (lightning, 1.0)).notes)
