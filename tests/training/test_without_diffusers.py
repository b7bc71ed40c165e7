"""Where diffusers, transformers, peft, accelerate and tomli-w are missing, as in ComfyUI's environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_base import small_config, write_inputs
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.preflight import check

PROGRAM = Path(__file__).with_name("without_diffusers.py")
TESTS = Path(__file__).parents[1]  # where fake_flow.py is
BLOCKED = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"accelerate", "bitsandbytes", "diffusers", "peft", "tomli_w", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
sys.path.append(sys.argv[2])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    program = [sys.executable, "-c", BLOCKED, str(PROGRAM), str(TESTS), str(folder)]
    return subprocess.run(program, capture_output=True, text=True, env=environment | variables)


def test_the_trainer_is_imported_and_trains_a_model_that_it_does_not_know(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr


def test_one_of_several_processes_is_told_that_it_needs_accelerate(tmp_path: Path) -> None:
    done = run(tmp_path, WORLD_SIZE="2")
    assert done.returncode == 1
    assert "WORLD_SIZE is set, as for one of several processes, which need accelerate" in done.stderr


def test_a_run_is_told_at_its_start_that_it_needs_tomli_w(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(write_inputs(tmp_path))
    check(config)
    monkeypatch.setitem(sys.modules, "tomli_w", None)  # which makes importing it fail
    with pytest.raises(UserError, match="needs tomli-w .*: pip install tomli-w"):
        check(config)
