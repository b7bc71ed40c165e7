"""Ids that another pack's node has too: named in the log, and its prompts give our inputs."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "nodes" / "host" / "node_ids.py"


class Sampler:
    """A node as the host sees it."""

    @classmethod
    def define_schema(cls) -> Any:
        return SimpleNamespace(node_id="TCDSampler")


class Host(SimpleNamespace):
    """The module to test in a host with these nodes, and the handler that it gives the host's server."""

    ids: Any
    handlers: list[Callable[[Any], Any]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    handlers: list[Callable[[Any], Any]] = []
    server = SimpleNamespace(add_on_prompt_handler=handlers.append)
    modules = {"nodes": {"NODE_CLASS_MAPPINGS": {}}, "server": {"PromptServer": SimpleNamespace(instance=server)}}
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(content)
    spec = importlib.util.spec_from_file_location("node_ids", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Host(ids=module, handlers=handlers)


@pytest.mark.parametrize("known", [True, False])
def test_a_taken_id_is_logged_with_its_pack(host: Host, caplog: pytest.LogCaptureFixture, known: bool) -> None:
    theirs = type("Theirs", (), {"RELATIVE_PYTHON_MODULE": "custom_nodes.other"} if known else {})
    sys.modules["nodes"].NODE_CLASS_MAPPINGS["TCDSampler"] = theirs  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "trajectory-consistency"):
        host.ids.warn_of_taken_ids([Sampler])
    (record,) = caplog.records
    pack = "custom_nodes.other" if known else "another pack"
    assert f"The node id TCDSampler belongs to {pack} too" in record.getMessage()


@pytest.mark.parametrize("nodes", [{}, {"TCDSampler": Sampler}, {"Other": object}])
def test_a_free_id_is_not(host: Host, caplog: pytest.LogCaptureFixture, nodes: dict[str, Any]) -> None:
    sys.modules["nodes"].NODE_CLASS_MAPPINGS.update(nodes)  # type: ignore[attr-defined]
    host.ids.warn_of_taken_ids([Sampler])
    assert not caplog.records


@pytest.mark.parametrize(
    ("class_type", "given", "expected"),
    [
        ("TCDSampler", {"gamma": 0.6}, {"eta": 0.6}),
        ("TCDSampler", {"gamma": ["5", 0]}, {"eta": ["5", 0]}),
        ("TCDSampler", {"gamma": 0.6, "eta": 0.2}, {"gamma": 0.6, "eta": 0.2}),
        ("TCDSampler", {"eta": 0.2}, {"eta": 0.2}),
        ("SamplerOther", {"gamma": 0.6}, {"gamma": 0.6}),
    ],
)
def test_the_others_input_is_ours_where_ours_is_absent(
    host: Host, class_type: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    host.ids.accept_others_inputs()
    (handler,) = host.handlers
    request = {"prompt": {"1": {"class_type": class_type, "inputs": given}, "2": {"class_type": "X"}}}
    assert handler(request)["prompt"]["1"]["inputs"] == expected
    assert handler({"client_id": "a"}) == {"client_id": "a"}
