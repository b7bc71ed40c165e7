"""The command line as a person meets it: one clear message, the right exit code, nothing left behind."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from tiny_base import write_inputs
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.tcd.lora_metadata import DEFAULT_CFG, DEFAULT_ETA, DEFAULT_STEPS
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.format_bytes import format_bytes
from trajectory_consistency.trainer.models.unet import ldm


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(write_inputs(tmp_path)), encoding="utf-8")
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_from_the_shell(inputs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trajectory_consistency.trainer", "run", str(inputs), "training.steps=1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert files(inputs.parent / "out") == [
        "checkpoints",
        "checkpoints/step-00000001.safetensors",
        "config.toml",
        "log.csv",
        "log.txt",
        "loss_by_time.csv",
        "report.html",
        "tcd-lora.safetensors",
    ]
    assert "distilling" in done.stderr and "loss=" in done.stderr and "img/s" in done.stderr


def test_a_dry_run_says_what_it_would_do_and_does_nothing(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(inputs.parent)
    assert main(["run", str(inputs), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "6 captioned pictures" in printed and "rank = 4" in printed and "2 steps of 3 pictures" in printed
    assert files(inputs.parent) == before


def test_a_dry_run_of_a_run_that_is_done_says_so(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(inputs), "training.steps=1"]
    assert main([*arguments, "--dry-run"]) == 0 and "the run is done" not in capsys.readouterr().out
    assert main(arguments) == 0
    before = files(inputs.parent)
    assert main([*arguments, "--dry-run"]) == 0
    assert "1 steps of 3 pictures" in (printed := capsys.readouterr().out) and printed.endswith("the run is done\n")
    assert main([*arguments, "training.lr=1e-5", "--dry-run"]) == 2
    assert "exists: choose another output.folder" in capsys.readouterr().err
    assert files(inputs.parent) == before


@pytest.mark.parametrize("flags_at", [0, 1, 2, 3])
def test_flags_stand_anywhere_among_overrides(inputs: Path, flags_at: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, other = [str(inputs), "training.steps=7", "adapter.rank=5"], inputs.parent / "other"
    assert main(["run", *arguments[:flags_at], "--dry-run", *arguments[flags_at:]]) == 0
    printed = capsys.readouterr().out
    assert "7 steps of 3 pictures" in printed and "rank = 5" in printed
    arguments = [str(inputs), f"data.cache={other}", "training.steps=7"]
    assert main(["cache", *arguments[:flags_at], "--part", "0/2", *arguments[flags_at:]]) == 0
    assert f"part 0 of 2 is cached in {other}" in capsys.readouterr().out


def test_a_flag_that_is_none_is_named_alone(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(inputs), "--dryrun", "training.steps=7"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --dryrun\n")


def test_a_check_of_a_run_that_is_there_tells_all_and_that_it_is_there(
    inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*overrides: str) -> str:
        assert main(["check", str(inputs), *overrides]) == 0
        return capsys.readouterr().out

    assert "not free" not in said()
    assert main(["run", str(inputs), "training.steps=1"]) == 0
    before = files(inputs.parent)
    for overrides, reason in (
        (["training.steps=1"], "exists"),
        (["output.name=x"], "output.name was 'tcd-lora' and is 'x'"),
    ):
        printed = said(*overrides)
        assert re.search(rf"not free for a new run: .*{reason}.*: choose another output.folder", printed), printed
        assert "6 captioned pictures" in printed and "lora_unet_" in printed and "memory    about" in printed
        assert re.search(
            r"memory    about .* at the most: .* in training \(.*\), no previews, .* while caching", printed
        )
    assert main(["check", str(inputs), "data.folder=/none"]) == 2
    assert "there is no data folder at /none" in capsys.readouterr().err
    assert files(inputs.parent) == before


def test_the_base_that_is_shipped_is_checked_without_a_note_or_a_warning(inputs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trajectory_consistency.trainer", "check", str(inputs), "base.path=tiny"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "tiny, predicts eps" in done.stdout, done.stderr
    assert "assumed" not in done.stdout and "float32: []" not in done.stderr


def test_sizes_are_in_units_of_their_own() -> None:
    amounts = [0, 1023, 1024, 46_000_000, 3 * 2**30 // 2, 123 * 2**30, 5000 * 2**40]
    said = ["0 bytes", "1023 bytes", "1.00 KiB", "43.9 MiB", "1.50 GiB", "123 GiB", "5000 TiB"]
    assert list(map(format_bytes, amounts)) == said


@pytest.mark.parametrize("command", ["inspect", "sample"])
def test_no_file_and_a_folder_are_said_to_be_that(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, message in (tmp_path / "none", "there is no file"), (tmp_path, "is a folder: name the .safetensors file"):
        assert main([command, str(path)]) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert len(printed) == 1 and message in printed[0] and str(path) in printed[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.step=5"], "did you mean training.steps?"),
        (["base.path=/none/model.safetensors"], "there is no model at /none/model.safetensors"),
        (["data.folder=/none"], "there is no data folder at /none"),
        (["training.device=warp"], "training.device is 'warp', which cannot be used here"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_bad_input_is_one_line_code_2_and_no_file(
    inputs: Path, overrides: list[str], message: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(inputs.parent)
    assert main(["run", str(inputs), *overrides, *flags]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and printed[0].startswith("error: ") and message in printed[0]
    assert files(inputs.parent) == before


def no_pictures(folder: Path) -> None:
    for path in (folder / "data").iterdir():
        path.unlink()


def no_caption(folder: Path) -> None:
    (folder / "data" / "00002.txt").unlink()


def no_picture(folder: Path) -> None:
    (folder / "data" / "00002.png").write_bytes(b"not a picture")


def truncated(folder: Path) -> None:
    with open(folder / "base.safetensors", "rb+") as file:
        file.truncate(100_000)


def another_architecture(folder: Path) -> None:
    context = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    names = {"input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3), context: torch.zeros(8, 768)}
    save_file({ldm.UNET_PREFIX + name: value for name, value in names.items()}, folder / "base.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_pictures, "has no pictures in it"),
        (no_caption, "1 of 6 pictures have no caption: 00002.png"),
        (no_picture, "1 of 6 pictures do not decode: 00002.png"),
        (truncated, "is not a complete safetensors file"),
        (another_architecture, "is an inpainting model"),
    ],
)
def test_files_that_are_not_right_are_one_line_code_2_and_no_file(
    inputs: Path, spoil: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(inputs.parent)
    before = files(inputs.parent)
    assert main(["run", str(inputs)]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and printed[0].startswith("error: ") and message in printed[0]
    assert files(inputs.parent) == before


def test_a_folder_of_another_run_is_not_touched(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = inputs.parent / "out"
    out.mkdir()
    (out / "tcd-lora.safetensors").write_bytes(b"precious")
    assert main(["run", str(inputs)]) == 2
    assert "choose another output.folder" in capsys.readouterr().err
    (out / "tcd-lora.safetensors").rename(out / "config.toml")
    assert main(["run", str(inputs)]) == 2
    assert "is of a run with other settings" in capsys.readouterr().err
    assert files(out) == ["config.toml"] and (out / "config.toml").read_bytes() == b"precious"


def test_a_run_that_diverges_says_so_with_code_1(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    real = distill_training.step_losses
    monkeypatch.setattr(distill_training, "step_losses", lambda *arguments: real(*arguments) * float("inf"))
    assert main(["run", str(inputs)]) == 1
    assert "error: step 2: loss inf" in capsys.readouterr().err
    assert not (inputs.parent / "out" / "tcd-lora.safetensors").exists()


def test_an_interrupt_is_code_130(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place, command, message in (
        (
            "tcd.distill.training.step_losses",
            "run",
            "error: interrupted; run the same command again to resume from what is saved\n",
        ),
        ("trainer.data.survey.inspect_sample", "check", "error: interrupted\n"),
        (
            "trainer.data.encode.inspect_sample",
            "cache",
            "error: interrupted; run the same command again to resume from what is saved\n",
        ),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"trajectory_consistency.{place}", stop)
            assert main([command, str(inputs), f"data.cache={inputs.parent / command}"]) == 130
        assert capsys.readouterr().err.endswith(message)


def test_no_command_and_an_unknown_one_are_code_2() -> None:
    for arguments in ([], ["fly"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_help_does_not_wait_for_the_model_libraries() -> None:
    program = """
import sys
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.format_bytes import format_bytes
try:
    main(["run", "--help"])
except SystemExit:
    print(sorted({"torch", "diffusers", "transformers", "numpy", "PIL"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_the_help_names_the_settings_that_a_lora_without_recommendations_gets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for option, default in (("--steps", DEFAULT_STEPS), ("--eta", DEFAULT_ETA), ("--cfg", DEFAULT_CFG)):
        assert re.search(rf"{option} \w[^-]* \(default: recommended by the LoRA, or {default:g}\)", said), said


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["trainer", "trainer.cli", "trainer.demo", "trainer.tiny.teach"])
def test_an_older_python_is_refused_in_one_line(module: str, tmp_path: Path) -> None:
    program = f"""
import runpy, sys
sys.version_info, sys.version = (3, 10, 13), "3.10.13 (main, Aug 24 2023)"
runpy.run_module("trajectory_consistency.{module}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: the trainer needs Python 3.11 or newer, and this is Python 3.10.13\n"


@pytest.mark.parametrize("file", ["__init__.py", "trainer/__init__.py"])
def test_an_older_python_reads_what_comes_before_the_refusal(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 10))
    before = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in before for alias in node.names}
    assert names <= {"logging", "sys", "TYPE_CHECKING"}, "modules that every Python has"
