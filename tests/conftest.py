"""The real ComfyUI for the tests marked `host`, and what is said when there is none."""

import os
from functools import cache

import pytest

from trainer.demo.comfy_server import Host, HostNotFoundError, find_host


@cache
def _look() -> tuple[Host | None, str]:
    """Return the host, and the line that tells which it is or how to get one."""
    try:
        host = find_host()
    except HostNotFoundError as error:
        if "COMFYUI_PATH" in os.environ or "COMFYUI_PYTHON" in os.environ:
            raise pytest.UsageError(str(error)) from None
        return None, f"ComfyUI: host tests skipped, {error}"
    return host, f"ComfyUI: host tests run in {host.folder}, by {host.python}"


@pytest.fixture(scope="session")
def comfy_host() -> Host:
    """Return the ComfyUI to test against; tests that use it are marked `host`, and so skipped where there is none."""
    host, line = _look()
    assert host is not None, f"a test that uses comfy_host must be marked host ({line})"
    return host


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    host, line = _look()
    for item in items if host is None else []:
        if item.get_closest_marker("host"):
            item.add_marker(pytest.mark.skip(reason=line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(_look()[1])
