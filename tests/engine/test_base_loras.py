"""The user's own LoRAs on a base: the teacher is the MODEL that the node Load LoRA gives, and nothing is left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from comfy.supported_models_base import ClipTarget
from families import FAMILIES, written
from quantized_files import write_quantized
from safetensors.torch import save_file
from small_models import batch_for, load, open_network, sampled_x0
from torch import Tensor

from trajectory_consistency.nodes.host.training import HostNetwork
from trajectory_consistency.tcd.adapter import layer_shapes
from trajectory_consistency.trainer.config.base import BaseConfig, BaseLora
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.comfy.base_loras import HostLoras, _complaints_are_errors
from trajectory_consistency.trainer.models.comfy.checkpoint import HostCheckpoint

CPU = torch.device("cpu")
RANK, STRENGTH = 2, 0.8


def plain_lora(name: str, folder: Path, prefix: str = "diffusion_model.", seed: int = 0) -> dict[str, Tensor]:
    """A LoRA on every layer of a stand-in, in the host's own names or, for another prefix, in kohya's."""
    tensors, generator = {}, torch.Generator().manual_seed(seed)
    for path, shape in layer_shapes(open_network(name, folder).network).items():
        module = prefix + (path if prefix.endswith(".") else path.replace(".", "_"))
        down = torch.randn(RANK, *shape[1:], generator=generator)
        tensors[f"{module}.lora_down.weight"] = down / down[0].numel() ** 0.5
        tensors[f"{module}.lora_up.weight"] = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    return tensors


def other_kinds(name: str, folder: Path) -> dict[str, Tensor]:
    """A LoHa, a difference of a bias, and a DoRA, which only the host knows how to apply."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = list(layer_shapes(open_network(name, folder).network).items())[-3:]
    (path, (out, into)), tensors = first, {}
    for part, shape in {"w1_a": (out, RANK), "w1_b": (RANK, into), "w2_a": (out, RANK), "w2_b": (RANK, into)}.items():
        tensors[f"diffusion_model.{path}.hada_{part}"] = torch.randn(shape, generator=generator) * 0.3
    path, (out, into) = second
    tensors[f"diffusion_model.{path}.diff_b"] = torch.randn(out, generator=generator)
    path, (out, into) = third
    tensors[f"diffusion_model.{path}.lora_down.weight"] = torch.randn(RANK, into, generator=generator)
    tensors[f"diffusion_model.{path}.lora_up.weight"] = torch.randn(out, RANK, generator=generator)
    tensors[f"diffusion_model.{path}.dora_scale"] = torch.rand(out, 1, generator=generator)
    return tensors


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's folder of LoRAs."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def base_of(path: Path, *loras: BaseLora, **more: Any) -> BaseConfig:
    return BaseConfig(model=str(path), loras=loras, **more)


def by_the_host(patcher: Any, loras: Path, *names: str) -> Any:
    """The MODEL with LoRAs, as the node Load LoRA gives it."""
    from nodes import LoraLoader  # ComfyUI's module

    for name in names:
        patcher, _ = LoraLoader().load_lora(patcher, None, name, STRENGTH, 0.0)
    return patcher


@pytest.mark.parametrize("kind", ["native", "kohya", "other kinds"])
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_the_teacher_is_the_model_with_the_loras_by_the_host(name: str, kind: str, folder: Path, loras: Path) -> None:
    first = {
        "native": lambda: plain_lora(name, folder),
        "kohya": lambda: plain_lora(name, folder, "lora_unet_"),
        "other kinds": lambda: other_kinds(name, folder),
    }[kind]()
    save_file(first, loras / "first.safetensors")
    save_file(plain_lora(name, folder, seed=1), loras / "second.safetensors")
    names = ("first.safetensors", "second.safetensors")
    settings = base_of(written(name, folder), *(BaseLora(path=each, strength=STRENGTH) for each in names))
    model = HostCheckpoint(settings).load(torch.float32, CPU)
    network = open_network(name, folder)
    batch = batch_for(name, network)
    cond, sigma = batch.conds[0], network.schedule.sigmas_for(4)[1]
    point = network.schedule.point_at(sigma.expand(2), batch.x0.ndim)
    plain = sampled_x0(load(name, folder), batch.x_t, sigma, cond)
    expected = sampled_x0(by_the_host(load(name, folder), loras, *names), batch.x_t, sigma, cond)
    with torch.no_grad():
        found = model._host.x0(batch.x_t, point, [cond, cond])
    assert (found - expected).norm() <= 1e-5 * expected.norm() < (expected - plain).norm()
    assert not model._host.patcher.patches and not model._host.patcher.backup, "there is one copy of the weights"


@pytest.mark.parametrize("kind", ["scaled float8", "int8"])
def test_quantised_weights_are_those_that_the_host_samples_with(kind: str, folder: Path, loras: Path) -> None:
    path = loras / "quantised.safetensors"
    write_quantized(written("flux", folder), path, kind)
    save_file(plain_lora("flux", folder), loras / "style.safetensors")
    settings = base_of(path, BaseLora(path="style.safetensors", strength=STRENGTH))
    model = HostCheckpoint(settings).load(torch.bfloat16, CPU)
    plain, patched = FAMILIES["flux"].load(path), by_the_host(FAMILIES["flux"].load(path), loras, "style.safetensors")
    expected = HostNetwork(patched, FAMILIES["flux"].time_linear).network.state_dict()
    found, before = model.network.state_dict(), plain.model.diffusion_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(_bits(found[key]), _bits(expected[key])) for key in expected)
    changed = [key for key in expected if not torch.equal(_bits(found[key]), _bits(before[key]))]
    assert any("double_blocks" in key for key in changed)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_what_the_host_would_leave_out_is_an_error(folder: Path, loras: Path) -> None:
    wan = plain_lora("wan", folder)
    flux = plain_lora("flux", folder)
    wide = {
        name: torch.cat([each] * 2, 1) if name.endswith("0.ffn.0.lora_down.weight") else each
        for name, each in wan.items()
    }
    for tensors, message in (
        (flux, r"could not apply \d+ of its \d+ parts .*diffusion_model\.double_blocks"),
        (wan | {"diffusion_model.no_such.lora_up.weight": torch.ones(2, 2)}, "apply 1 of its .*no_such.lora_up.weight"),
        (wan | {"tcd_target_time.in.weight": torch.ones(2, 2)}, "apply 1 of its .*tcd_target_time.in.weight"),
        (wide, r"apply 1 of its .*blocks\.0\.ffn\.0\.weight"),
    ):
        save_file(tensors, loras / "x.safetensors")
        with pytest.raises(
            UserError, match=rf"base\.loras\[0\]\.path is .*x\.safetensors, which does not fit.*{message}"
        ):
            HostCheckpoint(base_of(written("wan", folder), BaseLora(path="x.safetensors")))
    with pytest.raises(UserError, match=r"base\.loras\[0\]\.path is nothing: there is no such file"):
        HostCheckpoint(base_of(written("wan", folder), BaseLora(path="nothing")))


class SmallClip(SD1ClipModel):
    """CLIP-L with two small layers."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        config = {**sizes, "hidden_act": "quick_gelu", "max_position_embeddings": 77, "vocab_size": 49408}
        config |= {"num_positions": 77, "eos_token_id": 49407, "projection_dim": 16, "layer_norm_eps": 1e-5}

        def small(**options: Any) -> SDClipModel:
            return SDClipModel(**{**options, "textmodel_json_config": config})

        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=small)


def small_clip() -> Any:
    options = {"dtype": torch.float32, "load_device": CPU, "offload_device": CPU, "initial_device": CPU}
    clip = comfy.sd.CLIP(ClipTarget(SD1Tokenizer, SmallClip), model_options=options)
    generator = torch.Generator().manual_seed(0)
    for parameter in clip.cond_stage_model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return clip


def test_the_text_encoder_gets_its_part_of_a_lora(folder: Path, loras: Path) -> None:
    layer = "lora_te_text_model_encoder_layers_{}_mlp_fc1"
    text = {
        f"{layer.format(0)}.lora_down.weight": torch.randn(RANK, 16),
        f"{layer.format(0)}.lora_up.weight": torch.randn(32, RANK),
    }
    save_file(plain_lora("sd15", folder) | text, loras / "style.safetensors")
    lora = BaseLora(path="style.safetensors", strength=STRENGTH)
    merged = HostLoras([lora]).merge_into_text_encoder(small_clip())
    expected, plain = comfy.sd.load_lora_for_models(None, small_clip(), text, 0, STRENGTH)[1], small_clip()
    (found, by_host, before) = (
        clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))[0][0] for clip in (merged, expected, plain)
    )
    assert (found - by_host).norm() <= 1e-5 * by_host.norm() < (by_host - before).norm()
    weight = merged.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1.weight
    assert not merged.patcher.patches and not weight.requires_grad
    for extra in (layer.format(7), "lora_te3_encoder_block_0"):
        wrong = text | {name.replace(layer.format(0), extra): each.clone() for name, each in text.items()}
        save_file(wrong, loras / "style.safetensors")
        with pytest.raises(UserError, match=rf"could not apply 2 of its 4 parts \({extra}"):
            HostLoras([lora]).merge_into_text_encoder(small_clip())


def test_they_are_said_and_change_the_base_but_not_its_captions(folder: Path, loras: Path) -> None:
    save_file(plain_lora("flux", folder), loras / "style.safetensors")
    path = written("flux", folder)
    plain, once, weaker = (
        HostCheckpoint(base_of(path, *(BaseLora(path="style.safetensors", strength=each) for each in strengths)))
        for strengths in ((), (1.0,), (0.5,))
    )
    assert once.describe().endswith("with style.safetensors at 1") and "style" not in plain.describe()
    assert len({each.fingerprints().base for each in (plain, once, weaker)}) == 3
    captions = {each.fingerprints().text_encoders or each.fingerprints().base for each in (plain, once, weaker)}
    assert len(captions) == 1
    encode = {f"lora_te1_x.{k}": torch.ones(2, 2) for k in ("lora_down.weight", "lora_up.weight")}
    save_file(plain_lora("flux", folder) | encode, loras / "style.safetensors")
    words = HostCheckpoint(base_of(path, BaseLora(path="style.safetensors")))
    assert words.fingerprints().text_encoders not in captions


def test_a_base_that_says_itself_that_it_is_distilled_gets_one_warning(folder: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "my-model.safetensors"
    renamed.symlink_to(written("flux-schnell", folder))
    for path in (renamed, written("flux-schnell", folder)):
        (note,) = HostCheckpoint(base_of(path)).notes
        assert "it is Flux schnell" in note and "no teacher" in note
    assert not HostCheckpoint(base_of(written("flux", folder))).notes


def test_other_messages_are_passed_on_and_are_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    with _complaints_are_errors("base.loras", 1):
        logging.warning("a package is old")
    assert "a package is old" in caplog.messages
    with (
        pytest.raises(UserError, match=r"could not apply 1 of its 2 parts \(blocks\.0\)"),
        _complaints_are_errors("x", 2),
    ):
        logging.warning("a package is old")
        logging.warning("lora key not loaded: blocks.0")
