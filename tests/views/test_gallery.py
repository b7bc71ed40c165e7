"""`tcd-train sample`: the pictures that a person gets who loads the base and the file, and nothing written over."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny_base import drawn_by_hand, small_config, write_base, write_inputs
from trajectory_consistency.trainer import run
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.config.settings import Config
from trajectory_consistency.trainer.views.gallery import GRID_NAME
from trajectory_consistency.trainer.views.preview_prompts import load_picture, picture_names

PROMPTS = ["a red circle", "a (blue:1.3) square, " * 20]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose LoRA was trained enough to be seen, and recommends two steps and an eta of 0.7."""
    values = write_inputs(tmp_path_factory.mktemp("sampled"))
    values["output"] |= {"steps": 2, "eta": 0.7}
    config = small_config(values, steps=2, lr=1e-2)
    run.run(config)
    return config


def by_hand(
    config: Config, prompt: str, seed: int, *, steps: int, eta: float, cfg: float, side: int, **base: Any
) -> torch.Tensor:
    opened = BaseConfig(path=config.base.path, **base)
    return drawn_by_hand(opened, config.lora_path, prompt, seed, steps=steps, gamma=eta, cfg=cfg, side=side)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one.int() - other.int()).abs().max() <= 1)


def test_a_run_s_lora_needs_no_more_than_a_prompt(
    done: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(done.lora_path), "--prompt", PROMPTS[0]]) == 0
    assert capsys.readouterr().out == f"look at {Path('samples') / GRID_NAME}\n"
    (name,) = picture_names(PROMPTS[:1], [0])
    picture = load_picture(tmp_path / "samples" / f"{name}-steps-2.png")
    assert same(picture, by_hand(done, PROMPTS[0], 0, steps=2, eta=0.7, cfg=1.0, side=64))
    assert not same(picture, by_hand(done, PROMPTS[0], 0, steps=2, eta=0.0, cfg=1.0, side=64))


def test_the_size_is_that_of_the_training(done: Config, tmp_path: Path) -> None:
    lora = tmp_path / "larger.safetensors"
    save_file(load_file(done.lora_path), lora, metadata={"tcd.resolution": "80"})
    arguments = ["sample", str(lora), "--base", done.base.path, "--prompt", "x", "--steps", "1", "--height", "64"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    (name,) = picture_names(["x"], [0])
    assert load_picture(tmp_path / "out" / f"{name}-steps-1.png").shape == (3, 64, 80)


def test_all_that_can_be_said_is_heeded(done: Config, tmp_path: Path) -> None:
    lora = tmp_path / "elsewhere.safetensors"
    save_file(load_file(done.lora_path), lora)  # without metadata, and with no configuration beside it
    vae = str(write_base(tmp_path / "other.safetensors", seed=1))
    arguments = ["sample", str(lora), "--base", done.base.path, "--out", str(tmp_path / "out"), "--width", "80"]
    arguments += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--seed", "3", "4", "--steps", "1", "4"]
    arguments += ["--height", "80", "--eta", "1", "--cfg", "3", "--device", "cpu", "--vae", vae, "--clip-skip", "2"]
    assert main(arguments) == 0
    names = picture_names(PROMPTS, [3, 4])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{name}-steps-{steps}.png" for name in names for steps in (1, 4)} | {GRID_NAME}
    picture = load_picture(tmp_path / "out" / f"{names[3]}-steps-4.png")
    assert same(picture, by_hand(done, PROMPTS[1], 4, steps=4, eta=1.0, cfg=3.0, side=80, vae=vae, clip_skip=2))
    assert not same(picture, by_hand(done, PROMPTS[1], 4, steps=4, eta=1.0, cfg=3.0, side=80, vae=vae))
    with Image.open(tmp_path / "out" / GRID_NAME) as grid:
        assert grid.width > 4 * 160 and grid.height > 2 * 160


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "there is nothing to draw: give --prompt"),
        (["--prompt", "x", "--steps", "0"], "steps[0] is 0, but must be at least 1"),
        (["--prompt", "x", "--eta", "nan"], "eta is nan, but must be at least 0"),
        (["--prompt", "x", "--width", "63"], "width is 63: use a multiple of 8"),
        (["--prompt", "x", "--device", "warp"], "'warp', which cannot be used here"),
        (["--prompt", "x", "--base", "/none"], "there is no model at /none"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    done: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert main(["sample", str(done.lora_path), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert complaint in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_files_that_cannot_be_used_are_said(done: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str, *arguments: str) -> str:
        assert main(["sample", str(tmp_path / name), "--prompt", "x", "--out", str(tmp_path / "out"), *arguments]) == 2
        return capsys.readouterr().err

    tensors = load_file(done.lora_path)
    save_file(tensors, tmp_path / "alone.safetensors")
    assert "to name the base of alone.safetensors: use --base" in refused("alone.safetensors")
    save_file({f"other_{key}": value for key, value in tensors.items()}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(done.lora_path.read_bytes()[:-10])
    base = "--base", done.base.path
    assert "other.safetensors is not a LoRA for this model: 0 of " in (said := refused("other.safetensors", *base))
    assert "use a base of its family" in said
    shorter = {
        key: value[:, 1:].contiguous() for key, value in tensors.items() if key.endswith("to_q.lora_down.weight")
    }
    save_file(tensors | shorter, tmp_path / "smaller.safetensors")
    assert "wrong shape: " in refused("smaller.safetensors", *base) and not (tmp_path / "out").exists()
    assert "is not a complete safetensors file" in refused("torn.safetensors", *base)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata={"tcd.steps": "few"})
    assert "tcd.steps in the metadata is 'few', but must be a whole number: give --steps" in refused(
        "wrong.safetensors", *base
    )
    save_file(tensors, tmp_path / "wrong.safetensors", metadata={"tcd.resolution": "large"})
    assert "tcd.resolution in the metadata is 'large', but must be a whole number: give --width and --height" in (
        refused("wrong.safetensors", *base)
    )


def test_a_picture_is_never_written_over(done: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = picture_names(PROMPTS[:1], [0])
    precious = tmp_path / f"{name}-steps-2.png"
    precious.write_bytes(b"precious")
    assert main(["sample", str(done.lora_path), "--prompt", PROMPTS[0], "--out", str(tmp_path)]) == 2
    assert f"{precious} exists" in capsys.readouterr().err and precious.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == [precious.name]
