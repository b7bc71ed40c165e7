"""The metadata of a run's LoRA file."""

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import get_args

import pytest

from trajectory_consistency.tcd.files import metadata
from trajectory_consistency.tcd.times import Law
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.files.metadata import lora_metadata
from trajectory_consistency.trainer.models import open_checkpoint


def test_every_law_has_the_name_of_a_method_of_its_own() -> None:
    names = set()
    for law in get_args(Law):
        settings = {"base": {"path": "tiny"}, "data": {"folder": "in"}, "output": {"folder": "out"}}
        config = from_mapping({**settings, "method": {"law": law, "diagonal": 0.0, "to_clean": 0.0}})
        names.add(lora_metadata(config, open_checkpoint(config.base))["tcd.method"])
    assert len(names) == len(get_args(Law))


def test_kohyas_key_names_the_layer_of_the_text_encoder_if_it_is_not_the_usual_one() -> None:
    for base, expected in (({}, None), ({"clip_skip": 2}, "2")):
        settings = {"base": {"path": "tiny", **base}, "data": {"folder": "in"}, "output": {"folder": "out"}}
        config = from_mapping(settings)
        assert lora_metadata(config, open_checkpoint(config.base)).get("ss_clip_skip") == expected


def test_the_version_is_known_where_nothing_is_installed_as_in_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata.own_version() == project["version"]
    monkeypatch.setattr(metadata, "version", missing)
    assert metadata.own_version() == project["version"]
