"""ComfyServer with a fake host: finding ComfyUI, starting it, running prompts and ending it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trajectory_consistency.trainer import find_comfyui
from trajectory_consistency.trainer.demo import comfy_server
from trajectory_consistency.trainer.demo.comfy_server import PACK_NAME, ComfyError, ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK, Host, HostNotFoundError, find_host

STAND_IN = """
import http.server, json, os, signal, sys
print("the stand-in has begun", os.environ.get("PYTHONPATH"), os.environ.get("OMP_NUM_THREADS"))
signal.signal(signal.SIGTERM, {on_terminate})
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {answers}[self.path.rsplit("/", 1)[0] if self.path.startswith("/history") else self.path]
        self.reply(200, body)
    def do_POST(self):
        self.reply(*{posted})
    def reply(self, code, body):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)


def _folder(path: Path, main: str = "") -> Path:
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").write_text(main, encoding="utf-8")
    return path


def _stand_in(
    tmp_path: Path,
    *,
    history: Any = None,
    posted: Any = (200, {"prompt_id": "p"}),
    on_terminate: str = "signal.SIG_DFL",
    **options: Any,
) -> ComfyServer:
    answers = {"/system_stats": {}, "/history": {"p": history} if history else {}}
    main = STAND_IN.format(answers=answers, posted=posted, on_terminate=on_terminate)
    return _server(tmp_path, main, **options)


def _server(tmp_path: Path, main: str, **options: Any) -> ComfyServer:
    host = Host(_folder(tmp_path / "host", main), Path(sys.executable))
    return ComfyServer(tmp_path / "base", host=host, **options)


@pytest.mark.usefixtures("no_environment")
class TestFinding:
    def test_by_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COMFYUI_PATH", str(_folder(tmp_path / "mine")))
        monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
        assert find_host() == Host((tmp_path / "mine").resolve(), Path(sys.executable).absolute())

    def test_around_the_pack_before_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        around = _folder(tmp_path / "around")
        monkeypatch.setattr(find_comfyui, "PACK", around / "custom_nodes" / PACK_NAME)
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        _folder(tmp_path / "comfy" / "ComfyUI")
        assert find_host().folder == around.resolve()

    def test_at_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(find_comfyui, "PACK", tmp_path / "a" / "b")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        found = _folder(tmp_path / "comfy" / "ComfyUI")
        assert find_host().folder == found.resolve()

    def test_its_own_interpreter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = _folder(tmp_path / "mine")
        monkeypatch.setenv("COMFYUI_PATH", str(folder))
        assert find_host().python == Path(sys.executable)
        inner = Path("Scripts/python.exe") if os.name == "nt" else Path("bin/python")
        for venv in ("venv", ".venv"):  # the second folder is preferred
            (folder / venv / inner).parent.mkdir(parents=True)
            (folder / venv / inner).touch()
            assert find_host().python == folder / venv / inner

    def test_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(find_comfyui, "PACK", tmp_path / "a" / "b")
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        with pytest.raises(
            HostNotFoundError, match="set COMFYUI_PATH to its folder, or get it with git clone"
        ) as caught:
            find_host()
        assert "\n" not in str(caught.value)

    def test_what_is_named_is_not_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        _folder(tmp_path / "comfy" / "ComfyUI")
        monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "typo"))
        with pytest.raises(HostNotFoundError, match="no ComfyUI in .*typo"):
            find_host()
        monkeypatch.delenv("COMFYUI_PATH")
        monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "typo"))
        with pytest.raises(HostNotFoundError, match="COMFYUI_PYTHON is .*typo, but there is no such file"):
            find_host()


def test_a_host_that_dies_shows_its_log(tmp_path: Path) -> None:
    server = _server(tmp_path, "print('the last words'); raise SystemExit(3)")
    with pytest.raises(ComfyError, match=r"has ended \(exit code 3\)[^$]*the last words"), server:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that the server started."""
    started = []
    start = subprocess.Popen

    def remember(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(comfy_server.subprocess, "Popen", remember)
    return started


def test_a_host_that_never_answers_is_ended(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    server = _server(tmp_path, "import time; time.sleep(60)", start_timeout_s=1)
    with pytest.raises(ComfyError, match="did not answer within 1 s"), server:
        pass
    assert started[0].poll() is not None


def test_no_process_is_left_even_of_a_stubborn_host(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    stubborn = _stand_in(tmp_path, on_terminate="signal.SIG_IGN", stop_timeout_s=0.5)
    with pytest.raises(KeyboardInterrupt), stubborn:
        assert started[0].poll() is None
        raise KeyboardInterrupt
    assert started[0].poll() is not None


def test_our_packages_stay_out_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PACK))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    server = _stand_in(tmp_path)
    with server:
        assert "the stand-in has begun None None" in server.log_text()
    server._threads = 1
    with server:
        assert "the stand-in has begun None 1" in server.log_text()


def test_packs_are_lent(tmp_path: Path) -> None:
    other = tmp_path / "other_pack"
    other.mkdir()
    for _ in range(2):  # a base folder can be reused
        server = ComfyServer(tmp_path / "base", packs=[other], host=Host(tmp_path, Path(sys.executable)))
    lent = server.base / "custom_nodes"
    assert sorted(pack.name for pack in lent.iterdir()) == ["other_pack", PACK_NAME]
    assert (lent / PACK_NAME).resolve() == PACK


def test_packs_are_copied_if_links_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    other = tmp_path / "other_pack"
    (other / "__pycache__").mkdir(parents=True)
    (other / "__init__.py").write_text("1")
    for _ in range(2):
        server = ComfyServer(tmp_path / "base", packs=[other], host=Host(tmp_path, Path(sys.executable)))
    lent = server.base / "custom_nodes"
    assert [path.name for path in (lent / "other_pack").iterdir()] == ["__init__.py"]
    assert (lent / PACK_NAME / "__init__.py").read_bytes() == (PACK / "__init__.py").read_bytes()
    assert (lent / PACK_NAME / "nodes" / "host" / "model_schedule.py").is_file()
    assert (lent / PACK_NAME / "tcd" / "sampling.py").is_file()
    assert not (lent / PACK_NAME / "trainer").exists()


def _entry(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"status": {"status_str": "error", "messages": [["execution_start", {}], [kind, data]]}, "outputs": {}}


def test_outputs_are_returned(tmp_path: Path) -> None:
    entry = {"status": {"status_str": "success"}, "outputs": {"9": {"images": []}}}
    with _stand_in(tmp_path, history=entry) as server:
        assert server.run({}) == {"9": {"images": []}}


@pytest.mark.parametrize(
    ("entry", "message", "node_type"),
    [
        (_entry("execution_error", {"exception_message": "no luck\n", "node_type": "N"}), "N: no luck", "N"),
        (_entry("execution_interrupted", {"node_type": "N"}), "the prompt was interrupted", "N"),
        ({"status": {"status_str": "error", "messages": []}}, "the host does not say why", None),
    ],
)
def test_a_failed_node_raises(tmp_path: Path, entry: Any, message: str, node_type: str | None) -> None:
    with _stand_in(tmp_path, history=entry) as server, pytest.raises(ComfyError) as caught:
        server.run({})
    assert message in str(caught.value)
    assert caught.value.node_type == node_type


NODE_ERRORS = {"3": {"class_type": "N", "errors": [{"message": "Value too big", "details": "eta 7"}]}}


@pytest.mark.parametrize(
    ("posted", "message", "node_type"),
    [
        ((400, {"error": {"message": "invalid"}, "node_errors": NODE_ERRORS}), "N: Value too big: eta 7", "N"),
        ((200, {"prompt_id": "p", "node_errors": NODE_ERRORS}), "N: Value too big: eta 7", "N"),  # one of two branches
        ((400, {"error": {"message": "No such node", "details": "#1"}, "node_errors": []}), "No such node: #1", None),
        ((500, "oh"), "the host refused: oh", None),
    ],
)
def test_a_refused_prompt_raises(tmp_path: Path, posted: Any, message: str, node_type: str | None) -> None:
    with _stand_in(tmp_path, posted=posted) as server, pytest.raises(ComfyError) as caught:
        server.run({})
    assert str(caught.value) == message
    assert caught.value.node_type == node_type


def test_a_prompt_that_takes_too_long(tmp_path: Path) -> None:
    with _stand_in(tmp_path) as server, pytest.raises(ComfyError, match="still running after 0.2 s"):
        server.run({}, timeout_s=0.2)


def test_a_host_that_dies_while_it_works(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    with _stand_in(tmp_path) as server:
        started[0].kill()
        started[0].wait()
        with pytest.raises(ComfyError, match=r"has ended[^$]*the stand-in has begun"):
            server.run({})
