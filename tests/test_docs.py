"""The pages about training say what the code does: every key, every command, every recipe."""

import re
from pathlib import Path

import config_table
from trajectory_consistency.trainer.commands import COMMANDS
from trajectory_consistency.trainer.config import recipes, settings


def page() -> str:
    return config_table.DOCS.read_text(encoding="utf-8")


def test_the_list_of_keys_is_that_of_the_configuration() -> None:
    listed = page().split(config_table.BEGIN)[1].split(config_table.END)[0]
    assert listed == config_table.table() + "\n", "run python tests/config_table.py"


def test_every_key_is_described() -> None:
    assert len(re.findall(r"^\| `\w+\.", config_table.table(), re.MULTILINE)) > 50
    assert config_table.undescribed() == []


def test_every_command_and_recipe_is_described_and_no_other() -> None:
    said = re.findall(r"tcd-train (\w+)", page())
    assert set(said) == set(COMMANDS)
    table = page().split("## 2.")[1].split("## 3.")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == set(recipes.names())


MIGRATING = config_table.DOCS.with_name("migrating.md").read_text(encoding="utf-8")


def test_the_keys_that_take_the_place_of_others_exist() -> None:
    """In each table they are in the last column."""
    keys = set(re.findall(r"^\| `([\w.\[\]]+)`", config_table.table(), re.MULTILINE))
    sections = "|".join({key.split(".")[0] for key in keys})
    columns = [line.strip("|").split(" | ")[-1] for line in MIGRATING.splitlines() if line.startswith("|")]
    named = {name for column in columns for name in re.findall(rf"`((?:{sections})\.[\w.\[\]]+)", column)}
    assert len(named) > 40 and named <= keys


def test_the_example_is_a_configuration() -> None:
    (command,) = re.findall(r"^    tcd-train run ((?:.+\\\n)*.+)", MIGRATING, re.MULTILINE)
    name, *overrides = command.replace("\\\n", " ").split()
    config = settings.load(recipes.find(Path(name)), overrides)
    assert (config.training.batch, config.training.accumulate) == (2 * 4, 4), "batch is their product"
