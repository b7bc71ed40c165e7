"""The pack's entry point: a package whose nodes are imported only when the host asks for them."""

import asyncio
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def load(nodes: str) -> ModuleType:
        (tmp_path / "pack" / "nodes").mkdir(parents=True)
        (tmp_path / "pack" / "__init__.py").write_text((ROOT / "__init__.py").read_text())
        (tmp_path / "pack" / "nodes" / "__init__.py").write_text(nodes)
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("pack", "pack.nodes"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module("pack")

    return load


def test_the_nodes_are_imported_when_the_host_asks_for_them(load_pack: Callable[[str], ModuleType]) -> None:
    pack = load_pack("class TCDExtension: pass")
    assert "pack.nodes" not in sys.modules
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")  # with it, the host would ignore the entry point
    assert type(asyncio.run(pack.comfy_entrypoint())).__name__ == "TCDExtension"


def test_an_import_error_is_logged_with_a_traceback_and_raised(
    load_pack: Callable[[str], ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    pack = load_pack("def inner():\n    raise RuntimeError('no such host')\ninner()")
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="no such host"):
        asyncio.run(pack.comfy_entrypoint())
    assert "in inner" in caplog.text
    assert "no such host" in caplog.text
