"""Describing, converting and merging LoRA files: each result gives the same prediction as the file it was made from."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from small_bases import random_parts, shrink, to_state, write
from tiny_base import context, model_of, small_config, with_adapter, write_base, write_inputs
from trajectory_consistency.tcd.adapter import FILE, layer_shapes
from trajectory_consistency.tcd.distill.sampling import initial_noise
from trajectory_consistency.tcd.files import verified_file
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config.base import BaseConfig, BaseLora
from trajectory_consistency.trainer.errors import RunError, UserError
from trajectory_consistency.trainer.files import layout
from trajectory_consistency.trainer.files.adapter_weights import file_tensors, load_weights
from trajectory_consistency.trainer.files.convert import convert
from trajectory_consistency.trainer.files.describe_file import describe_file
from trajectory_consistency.trainer.files.merge import merge
from trajectory_consistency.trainer.files.write_lora import write_lora
from trajectory_consistency.trainer.models import lora_layouts
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint

COND = context(torch.randn((1, 77, 32), generator=torch.Generator().manual_seed(5)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a LoRA for it that does something, of rank 4 and alpha 2."""
    folder = tmp_path_factory.mktemp("files")
    values = write_inputs(folder, pictures=1)
    net = model_of(folder / "base.safetensors")
    with_adapter(net, rank=4, alpha=2.0, effect=0.05)
    write_lora(folder / "lora.safetensors", net, small_config(values), {"tcd.law": "uniform", "tcd.steps": "4"}, COND)
    return folder


def predicted(base: Path, lora: Path | None = None) -> torch.Tensor:
    net = model_of(base)
    if lora:
        net.adapter.add(FILE, load_weights(net, lora))
    with torch.no_grad():
        return net.x0(initial_noise(0, (1, 4, 8, 8)), net.schedule.point(torch.tensor([499]), 4), COND)


def close(one: torch.Tensor, other: torch.Tensor, limit: float = 2e-3) -> bool:
    return bool((one - other).norm() < limit * other.norm())


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-3)])
def test_pefts_names_and_back_again_are_the_same_lora(folder: Path, tmp_path: Path, dtype: str, limit: float) -> None:
    base, lora = folder / "base.safetensors", folder / "lora.safetensors"
    peft, again = tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors"
    assert main(["export", str(lora), str(peft), "--names", "peft", "--dtype", dtype]) == 0
    assert main(["export", str(peft), str(again), "--dtype", dtype]) == 0
    assert not close(predicted(base), predicted(base, lora), 0.01)
    for path in (peft, again):
        assert close(predicted(base, path), predicted(base, lora), limit)
    named = load_file(peft)
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in named)
    assert {tensor.dtype for tensor in named.values()} == {getattr(torch, dtype)}
    assert set(load_file(again)) == set(load_file(lora))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_checkpoint_with_the_lora_in_it_is_the_base_with_the_lora(
    folder: Path, tmp_path: Path, strength: float
) -> None:
    base, lora, merged = folder / "base.safetensors", folder / "lora.safetensors", tmp_path / "merged.safetensors"
    merge(lora, base, merged, strength=strength, dtype=torch.float32)
    scaled = load_file(lora)
    scaled = {key: value * strength if key.endswith("lora_up.weight") else value for key, value in scaled.items()}
    save_file(scaled, tmp_path / "scaled.safetensors")
    assert close(predicted(merged), predicted(base, tmp_path / "scaled.safetensors"))
    assert not close(predicted(merged), predicted(base), 0.01)
    old, new = load_file(base), load_file(merged)
    changed = {key for key in old if not torch.equal(old[key].float(), new[key])}
    assert old.keys() == new.keys() and len(changed) == sum(key.endswith("alpha") for key in scaled)
    assert all(key.startswith("model.diffusion_model.") for key in changed)


def quantised_base(folder: Path, path: Path, more: dict[str, torch.Tensor]) -> Path:
    """The base with its network in float8, rounded, and other tensors."""
    state = load_file(folder / "base.safetensors")
    small = {key: value.to(torch.float8_e4m3fn) for key, value in state.items() if key.startswith("model.")}
    save_file(state | small | more, path)
    return path


MERGED = "model.diffusion_model.middle_block.0.in_layers.2."


@pytest.mark.parametrize(
    ("more", "dtype", "message"),
    [
        ({}, None, r"has weights of 8 bits .* use --dtype float16"),
        ({MERGED + "scale_weight": torch.ones(())}, torch.float16, "has quantised weights .*scale_weight"),
        ({MERGED + "weight_scale": torch.ones(())}, None, "has quantised weights .*weight_scale"),
        ({MERGED + "weight.absmax": torch.ones(2)}, torch.float16, "has quantised weights .*absmax"),
        ({MERGED + "weight": torch.zeros(64, 64, 3, 3, dtype=torch.int8)}, torch.float16, "has quantised weights"),
    ],
)
def test_a_lora_is_not_rounded_away_in_a_quantised_checkpoint(
    folder: Path, tmp_path: Path, more: dict[str, torch.Tensor], dtype: torch.dtype | None, message: str
) -> None:
    base = quantised_base(folder, tmp_path / "small.safetensors", more)
    with pytest.raises(UserError, match=message):
        merge(folder / "lora.safetensors", base, tmp_path / "merged.safetensors", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_a_lora_in_a_checkpoint_of_8_bits_is_whole_in_16(folder: Path, tmp_path: Path) -> None:
    lora, merged = folder / "lora.safetensors", tmp_path / "merged.safetensors"
    base = quantised_base(folder, tmp_path / "small.safetensors", {})
    merge(lora, base, merged, dtype=torch.float16)
    assert close(predicted(merged), predicted(base, lora))
    assert not close(predicted(merged), predicted(base), 0.01)


def test_nothing_is_written_over_or_made_of_what_is_no_lora(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora = folder / "base.safetensors", folder / "lora.safetensors"
    before = lora.read_bytes(), base.read_bytes()
    assert main(["export", str(lora), str(base), "--into", str(base)]) == 2
    assert main(["export", str(lora), str(lora)]) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    assert (lora.read_bytes(), base.read_bytes()) == before
    with pytest.raises(UserError, match="is not a LoRA that can be used|known here"):
        convert(base, tmp_path / "new.safetensors", naming="peft", dtype=torch.float16)
    with pytest.raises(UserError, match="there is no folder"):
        convert(lora, tmp_path / "none" / "new.safetensors", naming="peft", dtype=torch.float16)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is not a tiny checkpoint"):
        merge(lora, tmp_path / "other.safetensors", tmp_path / "new.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_a_strength_that_is_no_number_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], strength: str
) -> None:
    base, lora = folder / "base.safetensors", folder / "lora.safetensors"
    with pytest.raises(UserError, match=f"the strength is {strength}.* use one such as 1"):
        merge(lora, base, tmp_path / "new.safetensors", strength=float(strength))
    assert (
        main(["export", str(lora), str(tmp_path / "new.safetensors"), f"--into={base}", f"--strength={strength}"]) == 2
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_finite(folder: Path, tmp_path: Path) -> None:
    base, lora = folder / "base.safetensors", folder / "lora.safetensors"
    with pytest.raises(UserError, match="would have model.diffusion_model.* with numbers that are not finite: use"):
        merge(lora, base, tmp_path / "new.safetensors", strength=1e9, dtype=torch.float16)
    spoiled = load_file(lora)
    spoiled["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"][0] = float("nan")
    save_file(spoiled, tmp_path / "spoiled.safetensors")
    with pytest.raises(UserError, match="mid_block_resnets_0_conv1.lora_up.weight with numbers that are not finite"):
        convert(tmp_path / "spoiled.safetensors", tmp_path / "new.safetensors", naming="kohya", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.safetensors"]


@pytest.mark.parametrize("fault", ["a changed bit", "cut off"])
def test_what_is_written_is_read_back_before_it_has_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def faulty(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        save_file(tensors, path, **options)  # type: ignore[arg-type]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content if fault == "a changed bit" else content[:-100])

    monkeypatch.setattr(verified_file, "save_file", faulty)
    base, lora, new = folder / "base.safetensors", folder / "lora.safetensors", tmp_path / "new.safetensors"
    with pytest.raises(RunError, match="new.safetensors was removed: reading it back gave different content"):
        merge(lora, base, new)
    with pytest.raises(RunError, match="reading it back gave different content"):
        convert(lora, new, naming="peft", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_described_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "lora.safetensors")]) == 0
    said = capsys.readouterr().out
    count = len(load_file(folder / "lora.safetensors")) // 3
    assert "a LoRA for tiny" in said and f"rank      4 ({count} modules)" in said
    assert f"scale     0.5 ({count} modules)" in said and "float16" in said and "tcd.law = uniform" in said
    assert main(["inspect", str(folder / "none.safetensors")]) == 2
    assert describe_file(folder / "lora.safetensors") + "\n" == said


def test_pefts_settings_in_the_metadata_give_the_alpha(folder: Path, tmp_path: Path) -> None:
    named = {
        "unet.mid_block.resnets.0.conv1.lora_A.weight": torch.zeros(4, 64, 3, 3),
        "unet.mid_block.resnets.0.conv1.lora_B.weight": torch.zeros(64, 4, 1, 1),
    }
    path = tmp_path / "peft.safetensors"
    save_file(named, path, metadata={"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 12}'})
    assert "scale     3 (1 modules)" in describe_file(path)
    save_file(named, path)
    assert "scale     1 (1 modules)" in describe_file(path)


def test_a_lora_for_another_base_is_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.zeros(1, 7, 3, 3),
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.zeros(7, 1, 1, 1),
        },
        path,
    )
    with pytest.raises(UserError, match="a LoRA for no family that is known here"):
        merge(path, write_base(tmp_path / "base.safetensors"), tmp_path / "new.safetensors")


# Text encoders, and what fits several families


def with_text(tensors: dict[str, torch.Tensor], base: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The LoRA with one for the text encoder too, in the spelling of kohya or, for "text_encoder.", of PEFT."""
    (encoder,) = checkpoint_of(base).load_text_encoder(torch.device("cpu")).models()
    found = dict(tensors)
    generator = torch.Generator().manual_seed(3)
    for path, (out, into) in layer_shapes(encoder).items():
        module = prefix + f"text_model.{path.removeprefix('text_model.')}"
        module = module if prefix.endswith(".") else module.replace(".", "_")
        parts = ("lora_A", "lora_B") if prefix.endswith(".") else ("lora_down", "lora_up")
        found[f"{module}.{parts[0]}.weight"] = torch.randn(2, into, generator=generator)
        found[f"{module}.{parts[1]}.weight"] = torch.randn(out, 2, generator=generator)
    return found


def checkpoint_of(base: Path, *loras: Path) -> UNetCheckpoint:
    return UNetCheckpoint(BaseConfig(path=str(base), loras=tuple(BaseLora(path=str(lora)) for lora in loras)))


def captions_encoded(checkpoint: UNetCheckpoint) -> torch.Tensor:
    encoder = checkpoint.load_text_encoder(torch.device("cpu"))
    return encoder.encode(["a star"])[0].tensors["context"]


@pytest.mark.parametrize("prefix", ["lora_te1_", "text_encoder."])
def test_a_lora_with_weights_for_a_text_encoder(
    folder: Path, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, plain = folder / "base.safetensors", folder / "lora.safetensors"
    style, kohya, peft, merged = (tmp_path / f"{name}.safetensors" for name in ("style", "kohya", "peft", "merged"))
    save_file(with_text(load_file(plain), base, prefix), style)

    assert main(["inspect", str(style)]) == 0
    said = capsys.readouterr().out
    assert "a LoRA for tiny" in said and "text      12 of the modules are for a text encoder" in said
    assert torch.equal(predicted(base, style), predicted(base, plain)), "a network has no text encoder"
    save_file(with_text({}, base, prefix), tmp_path / "words.safetensors")
    with pytest.raises(UserError, match="has weights for a text encoder alone"):
        predicted(base, tmp_path / "words.safetensors")

    for target, *options in ((kohya,), (peft, "--names=peft"), (merged, f"--into={base}")):
        assert main(["export", str(style), str(target), "--dtype=float32", *options]) == 0
    text = [name for name in load_file(kohya) if name.startswith("lora_te")]
    assert len(text) == 3 * 12 and not [name for name in load_file(kohya) if name.startswith("lora_unet_lora_te")]
    assert sum(name.startswith("text_encoder.text_model.") for name in load_file(peft)) == 2 * 12
    expected = captions_encoded(checkpoint_of(base, style))
    assert not close(captions_encoded(checkpoint_of(base)), expected, 0.01)
    for found in (checkpoint_of(base, kohya), checkpoint_of(base, peft), checkpoint_of(merged)):
        assert close(captions_encoded(found), expected)
    assert close(predicted(merged), predicted(base, plain))


@pytest.mark.parametrize(
    ("module", "shape", "families"),
    [
        ("down_blocks_0_resnets_0_conv1", (320, 320, 3, 3), "sd15 or sd2 or sdxl"),
        ("up_blocks_3_attentions_0_transformer_blocks_0_ff_net_2", (320, 1280), "sd15 or sd2"),
        ("up_blocks_3_attentions_0_transformer_blocks_0_attn2_to_k", (320, 1024), "sd2"),
        ("input_blocks_4_1_transformer_blocks_1_attn2_to_k", (640, 2048), "sdxl"),
        ("output_blocks_11_1_transformer_blocks_0_attn2_to_k", (320, 768), "sd15"),
        ("down_blocks_0_resnets_0_conv1", (320, 321, 3, 3), "no family that is known here"),
    ],
)
def test_every_family_that_a_lora_fits_is_named(
    tmp_path: Path, module: str, shape: tuple[int, ...], families: str
) -> None:
    out, *into = shape
    path = tmp_path / "lora.safetensors"
    halves = {"lora_down": torch.zeros(1, *into), "lora_up": torch.zeros(out, 1, *[1] * (len(into) - 1))}
    save_file({f"lora_unet_{module}.{side}.weight": half for side, half in halves.items()}, path)
    assert f": a LoRA for {families}\n" in describe_file(path)


def test_the_checkpoint_at_hand_decides_between_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A projection is a convolution in SD1.5 and a Linear in SD2.x: its LoRA fits both."""
    shrink(monkeypatch, tmp_path / "bases")
    monkeypatch.setattr(layout, "lora_layouts", lambda: islice(lora_layouts(), 3))  # all but the tiny one
    lora = tmp_path / "lora.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 16), f"{name}.lora_up.weight": torch.ones(16, 1)}, lora)
    assert ": a LoRA for sd15 or sd2" in describe_file(lora)
    for family in ("sd15", "sd2"):
        state = to_state(random_parts(family))
        base, merged = write(tmp_path / f"{family}.safetensors", state), tmp_path / f"{family}-merged.safetensors"
        merge(lora, base, merged)
        changed = {key: value for key, value in load_file(merged).items() if not torch.equal(value, state[key])}
        assert list(changed) == ["model.diffusion_model.input_blocks.1.1.proj_in.weight"]
        for key, value in changed.items():
            torch.testing.assert_close(value, state[key] + 1)
    with pytest.raises(UserError, match="it is not a sd15 or sd2 checkpoint, for which"):
        merge(lora, write(tmp_path / "sdxl.safetensors", to_state(random_parts("sdxl"))), tmp_path / "new.safetensors")


def test_a_target_time_is_left_out_only_on_demand(folder: Path, tmp_path: Path) -> None:
    base, lora, new = folder / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "new.safetensors"
    net = model_of(base)
    weights = with_adapter(net, rank=4, alpha=2.0, effect=0.05, target_input="s")
    save_file({name: tensor.detach().contiguous() for name, tensor in file_tensors(net, weights).items()}, lora)
    plain = tmp_path / "plain.safetensors"
    assert main(["export", str(lora), str(plain), "--without-target-time", "--dtype=float32"]) == 0
    assert not any("target_time" in name for name in load_file(plain))
    for options in (["--names=peft"], [f"--into={base}"]):
        arguments = ["export", str(lora), str(new), "--dtype=float32", *options]
        assert main(arguments) == 2 and not new.exists()
        assert main([*arguments, "--without-target-time"]) == 0
        found = predicted(new) if "--into" in options[0] else predicted(base, new)
        assert close(found, predicted(base, plain))
        new.unlink()


@pytest.mark.parametrize("part", ["diff", "diff_b", "w_norm"])
def test_differences_are_kept_by_export_and_refused_by_name_elsewhere(
    folder: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora, new = folder / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "new.safetensors"
    norm = {f"lora_unet_mid_block_resnets_0_norm1.{part}": torch.ones(64)}
    save_file(load_file(folder / "lora.safetensors") | norm, lora)
    assert main(["inspect", str(lora)]) == 0
    assert main(["export", str(lora), str(new)]) == 0
    kept = f"lora_unet_mid_block_resnets_0_norm1.{part.replace('w_norm', 'diff')}"
    assert torch.equal(load_file(new)[kept], torch.ones(64).half())
    new.unlink()
    for options in (["--names=peft"], [f"--into={base}"]):
        assert main(["export", str(lora), str(new), *options]) == 2 and not new.exists()
        assert "norm1 has diff" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"norm1 has diff\w*, which is more than a plain LoRA"):
        load_weights(model_of(base), lora)
