"""The replacements of other packs' nodes, on a host without the replacement API and on one with it."""

import asyncio
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _register(monkeypatch: pytest.MonkeyPatch, **latest: Any) -> None:
    """Import the module with this comfy_api.latest, and register the replacements."""
    for name in ("comfy_api", "comfy_api.latest"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules["comfy_api.latest"]).update(latest)
    spec = importlib.util.spec_from_file_location("replacements", ROOT / "nodes" / "replacements.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asyncio.run(module.register_replacements())


def test_an_older_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_api() -> None:
        pytest.fail("the API was used")

    _register(monkeypatch, io=SimpleNamespace(), ComfyAPI=no_api)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The replacements that a host with the API gets."""
    found: list[Any] = []

    async def register(replacement: Any) -> None:
        found.append(replacement)

    api = SimpleNamespace(node_replacement=SimpleNamespace(register=register))
    _register(monkeypatch, io=SimpleNamespace(NodeReplace=SimpleNamespace), ComfyAPI=lambda: api)
    return found


def test_each_node_of_another_pack_is_replaced_once(registered: list[Any]) -> None:
    assert sorted(each.old_node_id for each in registered) == [
        "SamplerTCD",
        "SamplerTCD EulerA",
        "TCDModelSamplingDiscrete",
        "TCDScheduler",
    ]


def test_the_page_about_migrating_names_the_same_nodes(registered: list[Any]) -> None:
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8").split("## Older TCD nodes")[1]
    rows = re.findall(r"^\|[^|]*\| `(.+?)` \| (TCD\w+)", page, re.MULTILINE)
    assert set(rows) == {(each.old_node_id, each.new_node_id) for each in registered}
