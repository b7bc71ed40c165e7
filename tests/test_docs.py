"""The page about training says what the code does: every key, every command, every recipe."""

import re

import config_table
from trajectory_consistency.trainer.commands import COMMANDS
from trajectory_consistency.trainer.config import recipes


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
