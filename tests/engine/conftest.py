"""ComfyUI as a library, on the CPU. Imported before the tests, and so before ComfyUI chooses the device."""

import sys
from pathlib import Path

import comfy.cli_args
import pytest
import torch

comfy.cli_args.args.cpu = True
comfy.cli_args.args.use_pytorch_cross_attention = True
torch.set_num_threads(1)
TESTS = Path(__file__).parents[1]
sys.path += map(str, (TESTS, TESTS / "bench", TESTS / "host", TESTS / "host" / "scripts", TESTS / "host" / "packs"))
import lent_models  # noqa: E402, F401, so that ComfyUI recognizes small networks of Z-Image and Qwen-Image


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small models' files."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def pictures(folder: Path) -> Path:
    """A folder of pictures with captions."""
    from trajectory_consistency.trainer.tiny import world

    world.write_folder(folder / "pictures", 4, seed=0)
    return folder / "pictures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first-run", action="store_true", help="run the test of a person's first run, too")
