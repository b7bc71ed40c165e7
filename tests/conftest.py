"""The real ComfyUI for tests marked `host`, Chromium for those marked `browser`, and what is said without them."""

import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from trajectory_consistency.trainer.find_comfyui import Host, HostNotFoundError, find_host

# These tests import ComfyUI, and run where its packages are: `python tests/engine`.
collect_ignore = [] if find_spec("comfy") else ["engine"]


@cache
def _look() -> tuple[Host | None, str]:
    """Return the host, and a line that says which it is or how to get one."""
    try:
        host = find_host()
    except HostNotFoundError as error:
        if "COMFYUI_PATH" in os.environ or "COMFYUI_PYTHON" in os.environ:
            raise pytest.UsageError(str(error)) from None
        return None, f"ComfyUI: host tests skipped, {error}"
    return host, f"ComfyUI: host tests run in {host.folder}, by {host.python}"


@cache
def _look_for_browser() -> tuple[Path | None, str]:
    """Return Chromium or a browser made of it, and a line that says which it is or how to get one."""
    named = os.environ.get("CHROMIUM_PATH")
    if named and not Path(named).is_file():
        raise pytest.UsageError(f"CHROMIUM_PATH is {named}, but there is no such file: set it to Chromium's program")
    programs = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
    found = named or next(filter(None, map(shutil.which, programs)), None)
    if found is None:
        return None, "Browser: browser tests skipped, no Chromium: apt install chromium, or set CHROMIUM_PATH to one"
    return Path(found), f"Browser: browser tests run in {found}"


@pytest.fixture(scope="session")
def chromium() -> Path:
    """Return the Chromium to look with; tests that use it are marked `browser`, and so skipped where there is none."""
    program, line = _look_for_browser()
    assert program is not None, f"a test that uses chromium must be marked browser ({line})"
    return program


@pytest.fixture(scope="session")
def comfy_host() -> Host:
    """Return the ComfyUI to test against; tests that use it are marked `host`, and so skipped where there is none."""
    host, line = _look()
    assert host is not None, f"a test that uses comfy_host must be marked host ({line})"
    return host


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", metavar="FOLDER", help="write the pictures of ComfyUI into its workflows and docs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--pictures"):
        unasked = [item for item in items if item.get_closest_marker("pictures")]
        config.hook.pytest_deselected(items=unasked)
        items[:] = [item for item in items if item not in unasked]
    for mark, (found, line) in {"host": _look(), "browser": _look_for_browser()}.items():
        for item in items if found is None else []:
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(_look()[1])
    terminalreporter.write_line(_look_for_browser()[1])
