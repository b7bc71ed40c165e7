"""The recipes: each loads, says what it is for, and runs by its name."""

import re
import tomllib
from pathlib import Path

import pytest

from tiny_base import write_inputs
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config import recipes
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.errors import UserError

OWN_MODEL = {"flux1-dev", "flux2-klein", "qwen-image", "sd35-medium", "wan-video", "z-image"}  # they name their model
FROM_PROMPTS = {"fine-tune", "prompts-only"}


def needed(name: str) -> list[str]:
    """Return what a recipe needs to be complete: the arguments that its first lines give."""
    data = "data.prompts=prompts.txt" if name in FROM_PROMPTS else "data.folder=pictures"
    model = [] if name in OWN_MODEL else ["base.path=tiny"]
    return [*model, data, "output.folder=out"]


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_needs_the_arguments_of_its_command_and_nothing_else(name: str) -> None:
    path = recipes.find(Path(name))
    text = path.read_text(encoding="utf-8")
    loaded = config.load(path, needed(name))
    assert loaded.preview.prompts and loaded.training.accumulate == "auto"
    (command,) = re.findall(rf"^#   tcd-train run {name} (.+)$", text, re.MULTILINE)
    keys = [argument.partition("=")[0] for argument in needed(name)]
    assert [argument.partition("=")[0] for argument in command.split()] == keys, "it says how to run it"
    assert sum(line.startswith("#") for line in text.splitlines()) >= 5
    assert "folder" not in {key for table in tomllib.loads(text).values() for key in table}
    for missing in {"base.path", "output.folder"} & set(keys):
        with pytest.raises(UserError, match=missing.replace(".", r"\.")):
            config.load(path, [argument for argument in needed(name) if not argument.startswith(missing)])


def test_what_the_recipes_are_named_for() -> None:
    loaded = {name: config.load(recipes.find(Path(name)), needed(name)) for name in recipes.names()}
    unets = {"fine-tune", "lcm-baseline", "prompts-only", "sd15", "sdxl-8bit", "sdxl"}
    assert loaded.keys() == unets | OWN_MODEL
    assert loaded["lcm-baseline"].method.law == "zero" and loaded["lcm-baseline"].output.eta == 1
    with_target_time = {name for name, each in loaded.items() if each.method.target_time}
    assert with_target_time == loaded.keys() - {"lcm-baseline"} and {
        each.method.ema_decay for each in loaded.values()
    } == {0.95}
    assert {name for name, each in loaded.items() if each.method.weighting == "x0"} == with_target_time
    shared = {name for name, each in loaded.items() if each.method.diagonal and each.method.to_clean}
    assert shared == with_target_time, "the shares need a network that gets s"
    assert {name for name, each in loaded.items() if each.output.eta == each.preview.eta == 0} == shared
    assert {loaded[name].data.resolution for name in ("sdxl-8bit", "sdxl", "fine-tune")} == {1024}


def test_recipes_for_models_of_comfyui() -> None:
    loaded = {name: config.load(recipes.find(Path(name)), needed(name)) for name in OWN_MODEL}
    assert {each.base.engine for each in loaded.values()} == {"comfyui"}
    split = {name for name, each in loaded.items() if each.base.model}
    assert split == OWN_MODEL - {"sd35-medium"}, "its file has its text encoders and its VAE"
    assert all(loaded[name].base.text_encoders and loaded[name].base.vae for name in split)
    for name, each in loaded.items():
        method = each.method
        assert method.guidance_min <= each.data.draw.guidance <= method.guidance_max, "else it draws others"
        assert "Not run at full size" in recipes.find(Path(name)).read_text(encoding="utf-8")
    flux = loaded["flux1-dev"].method
    assert flux.guidance_min == flux.guidance_max == 3.5, "the scale that the student gets"


def test_a_fine_tune_is_a_base_with_loras() -> None:
    text = recipes.find(Path("fine-tune")).read_text(encoding="utf-8")
    assert tomllib.loads(text)["base"] == {"loras": [{"path": "my-style.safetensors", "strength": 0.8}]}


def test_a_recipe_runs_by_its_name_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = write_inputs(tmp_path, pictures=2)
    monkeypatch.chdir(tmp_path)
    given = [f"base.path={values['base']['path']}", "data.folder=data", "output.folder=out", "data.resolution=64"]
    assert main(["run", "sd15", *given, "--dry-run"]) == 0
    assert "4000 steps of 16 pictures" in capsys.readouterr().out
    (tmp_path / "sd15").write_text("[training]\nsteps = 7\n", encoding="utf-8")
    assert main(["run", "sd15", *given, "--dry-run"]) == 0
    assert "7 steps of 8 pictures" in capsys.readouterr().out
    assert main(["run", "sd15-13gb", *given]) == 2
    assert "there is no configuration file at sd15-13gb, nor a recipe of that name" in capsys.readouterr().err
