"""Every way in which a configuration can be wrong, and that a right one survives being written."""

import re
from pathlib import Path

import pytest

from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.errors import UserError

RIGHT = {"base": {"path": "tiny"}, "data": {"folder": "pictures"}, "output": {"folder": "out"}}


def with_value(section: str, key: str, value: object) -> dict[str, dict[str, object]]:
    return {**RIGHT, section: {**RIGHT.get(section, {}), key: value}}


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    original = config.from_mapping(with_value("training", "lr", 3e-4))
    path = tmp_path / "config.toml"
    path.write_text(original.to_toml(), encoding="utf-8")
    assert config.load(path) == original
    assert original.training.lr == 3e-4


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("training", "step", 5, "unknown key training.step: did you mean training.steps?"),
        ("trainin", "steps", 5, "unknown key trainin: did you mean training?"),
        ("method", "zzz", 5, "the keys here are law"),
        ("training", "steps", "many", "training.steps is 'many', but must be a whole number"),
        ("training", "steps", 2.5, "training.steps is 2.5, but must be a whole number"),
        ("training", "steps", True, "training.steps is True, but must be a whole number"),
        ("training", "steps", 0, "training.steps is 0, but must be at least 1"),
        ("training", "accumulate", 0, "training.accumulate is 0, but must be at least 1"),
        ("training", "accumulate", "many", "training.accumulate is 'many', but must be one of 'auto'"),
        ("training", "warmup_steps", 3000, "training.warmup_steps is 3000, and training.steps 3000: the learning rate"),
        ("training", "lr", float("nan"), "training.lr is nan, but must be at least 0"),
        ("training", "lr", float("inf"), "training.lr is inf, but must be at least 0"),
        ("output", "eta", 1.5, "output.eta is 1.5, but must be at least 0 and at most 1"),
        ("method", "law", "tcd", "method.law is 'tcd', but must be one of 'uniform', 'zero'"),
        ("base", "path", 5, "base.path is 5, but must be a string"),
        ("method", "guidance_min", 9.0, "exchange them"),
        ("method", "origin_steps", 7, "use a divisor of 1000"),
        ("method", "order", True, "method.order is True, but must be one of 1, 2"),
        ("method", "phases", 4, "method.phases is 4, but must be a list: write [4]"),
        ("preview", "seeds", 3, "preview.seeds is 3, but must be a list: write [3]"),
        ("preview", "prompts", 'a "fox"', r"""'a "fox"', but must be a list: write ["a \"fox\""]"""),
        ("preview", "steps", 99, "preview.steps is 99, but must be a list, each item a whole number"),
        ("data", "sources", {"path": "x"}, "but must be a list: write [[data.sources]] above the keys of each"),
        ("method", "phases", ["x"], "method.phases[0] is 'x', but must be a whole number"),
        ("output", "name", "a/b", "use a plain file name"),
        ("base", "path", "C:\new", r"base.path is 'C:\new', with a character that no path has"),
        ("base", "text_encoders", ["C:\text"], r"base.text_encoders[0] is 'C:\text', with a character"),
        ("data", "cache", "D:\base", r"data.cache is 'D:\x08ase', with a character"),
        ("data", "sources", [{"path": "D:\food"}], r"data.sources[0].path is 'D:\x0cood', with a character"),
        ("output", "folder", "runs\revised", r"so write / for it, or the path in single quotes"),
    ],
)
def test_a_wrong_value_is_refused_by_name(section: str, key: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.from_mapping(with_value(section, key, value))
    assert message in str(error.value)


@pytest.mark.parametrize("section", ["base", "data", "output"])
def test_a_required_key_that_is_missing_is_named(section: str) -> None:
    with pytest.raises(UserError, match=rf"{section}\.(path|folder) is missing"):
        config.from_mapping({key: value for key, value in RIGHT.items() if key != section})


def test_a_section_that_is_no_section() -> None:
    with pytest.raises(UserError, match=r"training is 5, but must be a section: write \[training\]"):
        config.from_mapping({**RIGHT, "training": 5})


@pytest.mark.parametrize("phases", [[], [0], [4, 51]])
def test_phases_must_be_steps_of_a_sampler_where_the_law_has_them(phases: list[int]) -> None:
    with pytest.raises(UserError, match=r"use numbers from 1 to method\.origin_steps, 50, such as \[8, 4, 2, 1\]"):
        config.from_mapping({**RIGHT, "method": {"law": "phase", "phases": phases, "diagonal": 0.0, "to_clean": 0.0}})
    config.from_mapping({**RIGHT, "method": {"law": "uniform", "phases": phases}})


def test_a_word_in_place_of_a_number(tmp_path: Path) -> None:
    original = config.from_mapping(with_value("training", "accumulate", "auto"))
    path = tmp_path / "config.toml"
    path.write_text(original.to_toml(), encoding="utf-8")
    assert config.load(path) == original and original.training.parts == 1
    assert config.load(path, ["training.accumulate=4"]).training.parts == 4
    assert not config.changes(original, config.load(path, ["training.accumulate=4", "training.steps=2000"]))


def test_a_whole_number_is_a_number() -> None:
    lr = config.from_mapping(with_value("training", "lr", 1)).training.lr
    assert lr == 1.0 and isinstance(lr, float)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(config.from_mapping(RIGHT).to_toml(), encoding="utf-8")
    return path


def test_overrides_take_precedence_and_may_be_bare_text(written: Path) -> None:
    loaded = config.load(written, ["training.steps=7", "base.path=/models/my model.safetensors", 'output.name="x"'])
    assert (loaded.training.steps, loaded.base.path, loaded.output.name) == (7, "/models/my model.safetensors", "x")


@pytest.mark.parametrize("override", ["training.steps", "steps=5", "=5", "training.=5"])
def test_an_override_that_is_none(written: Path, override: str) -> None:
    with pytest.raises(UserError, match="is not an override"):
        config.load(written, [override])


def test_a_base_is_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "vae.safetensors", "lora.safetensors", "tiny"):
        (tmp_path / name).touch()
    loras = [{"path": "lora.safetensors"}, {"path": "in-comfyui.safetensors"}]
    values = {**RIGHT, "base": {"path": "./a.safetensors", "vae": "x/../vae.safetensors", "loras": loras}}
    (tmp_path / "x").mkdir()
    original = config.from_mapping(values)
    assert original == config.from_mapping({**values, "base": {**values["base"], "path": "a.safetensors"}})
    (tmp_path / "config.toml").write_text(original.to_toml(), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "x")
    base = config.load(tmp_path / "config.toml").base
    assert base == original.base and [base.path, base.vae] == [
        str(tmp_path / name) for name in ("a.safetensors", "vae.safetensors")
    ]
    assert [lora.path for lora in base.loras] == [str(tmp_path / "lora.safetensors"), "in-comfyui.safetensors"]
    monkeypatch.chdir(tmp_path)
    assert config.from_mapping(RIGHT).base.path == "tiny"  # the embedded model, whatever else has this name


def test_an_override_is_validated_too(written: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean training\.batch"):
        config.load(written, ["training.batches=5"])


def test_no_file_and_no_toml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no configuration file at"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 5", encoding="utf-8")
    with pytest.raises(UserError, match="is not a TOML file"):
        config.load(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text('[base]\npath = "C:\\models"', encoding="utf-8")
    with pytest.raises(UserError, match="is not a TOML file.*a path with backslashes needs single quotes"):
        config.load(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"model": "x", "engine": "diffusers"}, "base.model is set, which only the engine comfyui takes"),
        (
            {"path": "x", "text_encoders": ["y"], "clip_type": "flux", "engine": "diffusers"},
            "base.text_encoders is set, which only the engine comfyui takes: set base.engine=comfyui",
        ),
        ({"model": "x", "text_encoders": ["y"]}, "base.clip_type is missing: base.text_encoders needs the type"),
        ({"model": "x", "clip_type": "flux"}, "base.clip_type is flux, but base.text_encoders is empty"),
    ],
)
def test_keys_of_the_base_that_do_not_fit_each_other_are_refused(base: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config.from_mapping({**RIGHT, "base": base})


def test_a_file_of_a_windows_editor_is_read(written: Path) -> None:
    written.write_bytes(b"\xef\xbb\xbf" + written.read_bytes().replace(b"\n", b"\r\n"))
    assert config.load(written) == config.from_mapping(RIGHT)
    loaded = config.load(
        written, [r"base.path='C:\new\base.safetensors'", r"data.folder=D:\tiny", r'preview.prompts=["a\nb"]']
    )
    assert (loaded.base.path, loaded.data.folder) == (r"C:\new\base.safetensors", r"D:\tiny")
    assert loaded.preview.prompts == ("a\nb",), "a line break in a prompt is none of a path"


def test_text_that_no_file_can_hold_is_refused() -> None:
    """As an argument is whose bytes are not UTF-8."""
    for section, key in (("output", "folder"), ("base", "path")):
        with pytest.raises(UserError, match=rf"{section}\.{key} is 'a\\udcff', which is not valid Unicode"):
            config.from_mapping(with_value(section, key, "a\udcff"))
    with pytest.raises(UserError, match=r"preview\.prompts\[0\] is .*, which is not valid Unicode"):
        config.from_mapping(with_value("preview", "prompts", ["\ud800"]))


def test_nesting_that_cannot_be_followed_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(f"a = {'[' * 100_000}", encoding="utf-8")
    with pytest.raises(UserError, match=r"deep\.toml is not a TOML file"):
        config.load(path)
    path.write_text(config.from_mapping(RIGHT).to_toml(), encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.folder is '\[\[.* is not|data\.sources is"):
        config.load(path, [f"data.sources={'[' * 100_000}"])


def test_a_name_without_a_home_is_part_of_the_path() -> None:
    assert config.from_mapping(with_value("output", "folder", "~nobody-here/x")).output_folder == Path("~nobody-here/x")
    assert config.from_mapping(with_value("data", "cache", "~/x")).cache_folder == Path.home() / "x"
