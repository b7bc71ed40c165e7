"""The real ComfyUI for the tests marked `host`: where it is looked for, and what is said when there is none."""

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[1]
HOW_TO_GET_IT = (
    "ComfyUI: none found, so the host tests were skipped; "
    "clone it to ~/comfy/ComfyUI and install its requirements into .venv there, or set COMFYUI_PATH"
)


@dataclass(frozen=True)
class Host:
    """A ComfyUI checkout, and the interpreter that has its requirements."""

    root: Path
    python: Path


def _root() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    if named is not None:
        if not Path(named, "main.py").is_file():
            raise pytest.UsageError(f"COMFYUI_PATH is {named!r}, but there is no main.py")
        return Path(named).resolve()
    around = [PACK.parents[1]] if PACK.parent.name == "custom_nodes" else []
    for root in [*around, Path.home() / "comfy" / "ComfyUI"]:
        if (root / "main.py").is_file():
            return root
    return None


def _python(root: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    if named is not None:
        return Path(named)
    for folder in (".venv", "venv"):
        for python in (root / folder / "bin" / "python", root / folder / "Scripts" / "python.exe"):
            if python.is_file():
                return python
    return Path(sys.executable)


@cache
def find_host() -> Host | None:
    """Return the ComfyUI of COMFYUI_PATH, the one this pack is installed in, or the one where comfy-cli puts it."""
    root = _root()
    return None if root is None else Host(root, _python(root))


@pytest.fixture(scope="session")
def comfy_host() -> Host:
    """Return the ComfyUI to test against; tests that use it are marked `host`, and so skipped where there is none."""
    host = find_host()
    assert host is not None, "a test that uses comfy_host must be marked: pytestmark = pytest.mark.host"
    return host


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_host() is None:
        for item in items:
            if item.get_closest_marker("host"):
                item.add_marker(pytest.mark.skip(reason=HOW_TO_GET_IT))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    host = find_host()
    terminalreporter.write_line(HOW_TO_GET_IT if host is None else f"ComfyUI: {host.root}, run by {host.python}")
