"""The recipes: each loads, says what it is for, and runs by its name."""

import tomllib
from pathlib import Path

import pytest

from tiny_base import write_inputs
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config import recipes
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.errors import UserError

NEEDED = ["base.path=tiny", "output.folder=out"]


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_needs_a_model_data_and_a_place_and_nothing_else(name: str) -> None:
    path = recipes.find(Path(name))
    text = path.read_text(encoding="utf-8")
    data = "data.prompts=prompts.txt" if name == "prompts-only" else "data.folder=pictures"
    loaded = config.load(path, [*NEEDED, data])
    assert loaded.preview.prompts and loaded.training.batch % loaded.training.accumulate == 0
    assert f"tcd-train run {name} base.path=" in text.split("\n\n")[0] + text, "it says how to run it"
    assert sum(line.startswith("#") for line in text.splitlines()) >= 5
    assert not {"path", "folder"} & {key for table in tomllib.loads(text).values() for key in table}
    for missing, others in (("base.path", ["output.folder=o", data]), ("output.folder", ["base.path=tiny", data])):
        with pytest.raises(UserError, match=missing.replace(".", r"\.")):
            config.load(path, others)


def test_what_the_recipes_are_named_for() -> None:
    loaded = {
        name: config.load(recipes.find(Path(name)), [*NEEDED, "data.folder=pictures"]) for name in recipes.names()
    }
    assert list(loaded) == ["lcm-baseline", "prompts-only", "sd15-12gb", "sdxl-16gb", "sdxl-24gb"]
    assert loaded["lcm-baseline"].method.law == "zero" and loaded["lcm-baseline"].output.eta == 1
    with_target_time = {name for name, each in loaded.items() if each.method.target_time}
    assert with_target_time == loaded.keys() - {"lcm-baseline"} and {
        each.method.ema_decay for each in loaded.values()
    } == {0.95}
    assert {name for name, each in loaded.items() if each.method.weighting == "x0"} == with_target_time
    shared = {name for name, each in loaded.items() if each.method.diagonal and each.method.to_clean}
    assert shared == with_target_time, "the shares need a network that gets s"
    assert {name for name, each in loaded.items() if each.output.eta == each.preview.eta == 0} == shared
    assert {loaded[name].data.resolution for name in ("sdxl-16gb", "sdxl-24gb")} == {1024}


def test_a_recipe_runs_by_its_name_and_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = write_inputs(tmp_path, pictures=2)
    monkeypatch.chdir(tmp_path)
    given = [f"base.path={values['base']['path']}", "data.folder=data", "output.folder=out", "data.resolution=64"]
    assert main(["run", "sd15-12gb", *given, "--dry-run"]) == 0
    assert "4000 steps of 16 pictures" in capsys.readouterr().out
    (tmp_path / "sd15-12gb").write_text("[training]\nsteps = 7\n", encoding="utf-8")
    assert main(["run", "sd15-12gb", *given, "--dry-run"]) == 0
    assert "7 steps of 8 pictures" in capsys.readouterr().out
    assert main(["run", "sd15-13gb", *given]) == 2
    assert "there is no configuration file at sd15-13gb, nor a recipe of that name" in capsys.readouterr().err
