"""README's commands, run with its configuration, and its diagrams of files."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_architecture import imports_of
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.tiny import world

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SMALL = ["data.resolution=64", "training.steps=6", "training.batch=2", "training.checkpoint_every=2"]
SMALL += ["training.device=cpu", "preview.steps=[1, 4]", "preview.every=3"]
# The command line in a process of its own, which dies by SIGKILL in its fourth step.
KILLED = """
import os, signal, sys, torch
from trajectory_consistency.trainer.training import loop
from trajectory_consistency.trainer import cli
train_step = loop.Training.train_step
def dying(training, *arguments):
    if training.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(training, *arguments)
loop.Training.train_step = dying
torch.set_num_threads(1)
cli.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The order of sums, and so the last bits, depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def section() -> str:
    return README.read_text(encoding="utf-8").split("\n## Train a LoRA\n")[1].split("\n## ")[0]


def commands(name: str) -> list[list[str]]:
    """The commands of that name, with overrides that make those with a configuration small."""
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^    tcd-train (.+)$", section(), re.MULTILINE)]
    return [[*line, *(SMALL if "my-run.toml" in line else [])] for line in lines if line[0] == name]


def test_the_commands_make_a_lora_from_the_configuration_that_stands_below_them(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    (toml,) = re.findall(r"```toml\n(.*?)```", section(), re.DOTALL)
    checkpoint = tomllib.loads(toml)["base"]["path"]
    Path("my-run.toml").write_text(toml.replace(checkpoint, "tiny"), encoding="utf-8")
    world.write_folder(Path("pictures"), 6, seed=0)
    (check,), (cache,), (run, other_run) = commands("check"), commands("cache"), commands("run")
    (report,), (inspect,), (sample,) = commands("report"), commands("inspect"), commands("sample")

    assert main(check) == 0
    assert "6 captioned pictures in pictures" in capsys.readouterr().out and not Path("runs").exists()
    assert main(cache) == 0
    assert f"the data are cached in {tmp_path.resolve() / '.tcd-cache'}" in capsys.readouterr().out
    killed = subprocess.run([sys.executable, "-c", KILLED, *run], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    first = Path("runs/first")
    assert not (first / "tcd-lora.safetensors").exists() and "resuming" not in killed.stderr
    assert main(run) == 0
    assert "resuming at step 2 of 6" in caplog.text and f"look at {first / 'report.html'}" in caplog.text
    (first / "report.html").unlink()
    assert main(report) == 0
    page = (first / "report.html").read_text(encoding="utf-8")
    assert "6 of 6" in page and all(prompt in page for prompt in tomllib.loads(toml)["preview"]["prompts"])
    assert page.count('alt="1 step, after 6 steps of training"') == 2
    capsys.readouterr()
    assert main(inspect) == 0
    assert "a LoRA for tiny" in capsys.readouterr().out
    assert main(sample) == 0
    assert "look at samples/grid.jpg" in capsys.readouterr().out and Path("samples/grid.jpg").is_file()
    assert main(other_run) == 0
    got, never_killed = (load_file(Path(f"runs/{name}/tcd-lora.safetensors")) for name in ("first", "short"))
    assert all(torch.equal(got[key], never_killed[key]) for key in got.keys() | never_killed.keys())


def test_no_command_is_left_out() -> None:
    tried = {name for name in ("check", "cache", "run", "report", "inspect", "sample") if commands(name)}
    assert set(re.findall(r"^    tcd-train (\w+)", section(), re.MULTILINE)) == tried


def test_each_file_in_the_diagrams_imports_the_next() -> None:
    text = README.read_text(encoding="utf-8")
    diagrams = re.findall(r"three files before the equation:\n\n    (.+)$", text, re.MULTILINE)
    assert len(diagrams) == text.count("->  tcd/trajectory.py") == 2
    for diagram in diagrams:
        chain = diagram.split("  ->  ")
        assert len(chain) == 1 + 3 and all((ROOT / file).is_file() for file in chain)
        for file, following in zip(chain, chain[1:], strict=False):
            module = following.removesuffix(".py").replace("/", ".")
            assert module in imports_of(Path(file)), f"{file} takes nothing from {module} itself"
