"""A checkpoint file comes back as the model that was written, and anything else is told what it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_base import write_base
from trainer import bases, ldm
from trainer.errors import UserError
from trainer.teacher import identify, load_base


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


def originals() -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return bases.empty_unet("tiny"), bases.empty_vae("tiny"), bases.empty_text_encoder("tiny")


def test_a_single_file_gives_back_every_weight(checkpoint: Path) -> None:
    base = load_base(str(checkpoint))
    for loaded, original in zip((base.unet, base.vae, base.text_encoder), originals(), strict=True):
        ours, theirs = loaded.state_dict(), original.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key].half().float()) for key in theirs)
    assert (base.family, base.prediction, len(base.alpha_bar)) == ("tiny", "eps", 1000)


def test_a_loaded_base_is_frozen_and_in_evaluation(checkpoint: Path) -> None:
    base = load_base(str(checkpoint), dtype=torch.bfloat16)
    for model in (base.unet, base.vae, base.text_encoder):
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (base.unet.dtype, base.text_encoder.dtype, base.vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_diffusers_folder_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    base = load_base(str(checkpoint))
    for name in ("unet", "vae", "text_encoder"):
        getattr(base, name).save_pretrained(tmp_path / name)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    folder = load_base(str(tmp_path))
    assert (folder.family, folder.prediction) == ("tiny", "v")
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(folder, name).state_dict(), getattr(base, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_the_unet_predicts_is_read_or_set(checkpoint: Path, tmp_path: Path) -> None:
    marked = {**load_file(checkpoint), "v_pred": torch.zeros(0)}
    save_file(marked, tmp_path / "v.safetensors")
    assert load_base(str(tmp_path / "v.safetensors")).prediction == "v"
    assert load_base(str(checkpoint), prediction="v").prediction == "v"


@pytest.mark.parametrize("family", ["sd15", "tiny"])
def test_every_weight_of_a_family_has_one_name_in_the_file(family: bases.Family) -> None:
    with torch.device("meta"):
        unet, vae, text = bases.empty_unet(family), bases.empty_vae(family), bases.empty_text_encoder(family)
    state = ldm.unet_to_ldm(unet.state_dict(), unet.config) | ldm.vae_to_ldm(vae.state_dict(), vae.config)
    state |= ldm.text_to_ldm(text.state_dict())
    assert len(state) == sum(len(model.state_dict()) for model in (unet, vae, text))
    assert state["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4


def test_nothing_there(tmp_path: Path) -> None:
    for call in (identify, load_base):
        with pytest.raises(UserError, match="there is no model at"):
            call(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("size", [0, 5, 1000, -1000])
def test_a_truncated_file(checkpoint: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        identify(str(path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(UserError, match="is not an SD1.5 checkpoint: it has no UNet"):
        identify(str(path))
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="or of another format"):
        identify(str(tmp_path / "old.ckpt"))


@pytest.mark.parametrize(
    ("channels", "width", "name"), [(320, 2048, "SDXL"), (320, 1024, "SD2.x"), (64, 99, "unknown")]
)
def test_a_checkpoint_of_another_architecture_is_named(tmp_path: Path, channels: int, width: int, name: str) -> None:
    path = tmp_path / "other.safetensors"
    context = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    save_file(
        {
            ldm.UNET_PREFIX + "input_blocks.0.0.weight": torch.zeros(channels, 4, 3, 3),
            ldm.UNET_PREFIX + context: torch.zeros(8, width),
        },
        path,
    )
    with pytest.raises(UserError, match=f"is .*{name}.*text width {width}"):
        identify(str(path))


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("first_stage_model.", "use a full checkpoint with VAE and text encoder"),
        ("cond_stage_model.", "use a full checkpoint with VAE and text encoder"),
        ("first_stage_model.decoder.conv_out", "does not hold a whole tiny vae"),
        ("model.diffusion_model.middle_block.2.in_layers.2", "does not hold a whole tiny unet"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp", "does not hold a whole CLIP-L text encoder"),
    ],
)
def test_a_checkpoint_that_lacks_a_part(checkpoint: Path, tmp_path: Path, dropped: str, message: str) -> None:
    path = tmp_path / "part.safetensors"
    save_file({key: value for key, value in load_file(checkpoint).items() if not key.startswith(dropped)}, path)
    with pytest.raises(UserError, match=message):
        load_base(str(path))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no unet/config\.json in it"):
        identify(str(tmp_path))
