"""`tcd-train check`, `sample`, `inspect` and `export` on ComfyUI's models."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
import torch
from families import FAMILIES
from lent_encoders import lend
from safetensors import safe_open
from safetensors.torch import load_file
from test_run import settings

from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.tiny import world
from trajectory_consistency.trainer.views.preview_prompts import load_picture


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_every_command_takes_the_file_of_a_run(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.write_folder(folder / "pictures", 4, seed=0)
    values = settings(name, folder, tmp_path / "out")
    del values["preview"]
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    with lend(FAMILIES[name]):
        assert main(["check", str(path)]) == 0
        assert "memory    about" in capsys.readouterr().out
        lora = run(from_mapping(values))
        capsys.readouterr()
        drawn = [tmp_path / "one", tmp_path / "again"]
        for out in drawn:
            options = ["--prompt", "a star", "--out", str(out), "--steps", "1", "2", "--device", "cpu"]
            assert main(["sample", str(lora), *options]) == 0
        if name == "flux":
            capsys.readouterr()
            options = ["--prompt", "a star", "--out", str(tmp_path / "none"), "--cfg", "3"]
            assert main(["check", str(path), "method.negative_prompt=blurry", f"output.folder={tmp_path / 'new'}"]) == 2
            assert "method.negative_prompt is 'blurry', but the network of this base" in capsys.readouterr().err
            assert main(["sample", str(lora), *options]) == 2
            assert "cfg is 3, but the network of this base takes the guidance scale as an" in capsys.readouterr().err
    pictures = [sorted(each.glob("*.png")) for each in drawn]
    assert [load_picture(each).shape for each in pictures[0]] == [(3, 64, 64)] * 2, "as in training"
    assert all(one.read_bytes() == again.read_bytes() for one, again in zip(*pictures, strict=True))

    capsys.readouterr()
    assert main(["inspect", str(lora)]) == 0
    said = capsys.readouterr().out
    family = {"sd3": "SD3", "flux": "Flux"}[name]
    assert f"a LoRA for {family}\n" in said and "the network gets the target time, as s" in said
    for fact in ("base      ", "shift     ", "steps     4", "eta       0.0", "cfg       1.0"):
        assert f"\n{fact}" in said, said

    other = tmp_path / "bfloat16.safetensors"
    assert main(["export", str(lora), str(other), "--dtype", "bfloat16"]) == 0
    assert len(load_file(other)) == len(load_file(lora))
    assert {value.dtype for key, value in load_file(other).items() if "lora_up" in key} == {torch.bfloat16}
    with safe_open(lora, "pt") as file, safe_open(other, "pt") as exported:
        assert file.metadata() == exported.metadata()
    assert main(["export", str(lora), str(tmp_path / "peft.safetensors"), "--names", "peft"]) == 2
    assert "load the file itself in ComfyUI" in capsys.readouterr().err


def test_a_network_of_comfyui_is_not_compiled(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(settings("sd3", folder, tmp_path / "out")), encoding="utf-8")
    with lend(FAMILIES["sd3"]):
        assert main(["check", str(path), "training.compile=true"]) == 2
    assert "training.compile is set, but the engine comfyui" in capsys.readouterr().err


def test_peft_names_are_refused_with_what_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.write_folder(folder / "pictures", 4, seed=0)
    values = settings("sd3", folder, tmp_path / "out")
    del values["preview"]
    values["method"] = {"target_time": False, "diagonal": 0.0, "to_clean": 0.0}
    with lend(FAMILIES["sd3"]):
        lora = run(from_mapping(values))
    assert main(["export", str(lora), str(tmp_path / "peft.safetensors"), "--names", "peft"]) == 2
    said = capsys.readouterr().err
    assert "is a LoRA for SD3, a family that ComfyUI loads: PEFT's names and merged checkpoints" in said
    assert "export --names kohya" in said and not (tmp_path / "peft.safetensors").exists()
