"""A real ComfyUI, headless, for as long as a `with` block lasts: found, started, given prompts over HTTP, and ended.

Flows in: prompts in the API format.  Flows out: each output node's output, and the files behind it.
The standard library is all it needs, and the host runs in its own interpreter, so neither sees the other's packages.

    with ComfyServer(Path("comfy"), packs=[...]) as server:   # models go to server.models / "checkpoints" and so on
        outputs = server.run(prompt)
        png = server.fetch(outputs["9"]["images"][0])
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "trajectory-consistency"
PACK_PARTS = ("__init__.py", "pyproject.toml", "locales", "nodes", "tcd", "workflows")  # what the host needs of it

Prompt = Mapping[str, Any]
"""{node id: {"class_type": ..., "inputs": {...}}}, where an input is a value or [node id, output index]."""

_POLL_S = 0.05
_STOP_TIMEOUT_S = 10
_LOG_LINES = 30


class HostNotFoundError(RuntimeError):
    """No ComfyUI on this machine; the message says in one line how to get it."""


class ComfyError(RuntimeError):
    """What the host says of a prompt that failed; `node_type` is the node that did, where one is to blame."""

    def __init__(self, message: str, node_type: str | None = None) -> None:
        super().__init__(message)
        self.node_type = node_type


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder, and the interpreter that has what it requires."""

    folder: Path
    python: Path


def find_host() -> Host:
    """Find ComfyUI: COMFYUI_PATH, else the one in whose custom_nodes this pack stands, else ~/comfy/ComfyUI.

    Its interpreter: COMFYUI_PYTHON, else the one of its .venv or venv, else the running one.
    Raises HostNotFoundError; also when COMFYUI_PATH or COMFYUI_PYTHON names nothing, rather than look elsewhere.
    """
    named = os.environ.get("COMFYUI_PATH")
    folders = [Path(named)] if named else [PACK.parents[1], Path.home() / "comfy" / "ComfyUI"]
    for folder in folders:
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return Host(folder.resolve(), _interpreter(folder))
    looked = " and ".join(str(folder) for folder in folders)
    raise HostNotFoundError(
        f"no ComfyUI in {looked}: set COMFYUI_PATH to its folder, or get it with "
        "git clone https://github.com/comfyanonymous/ComfyUI ~/comfy/ComfyUI "
        "and install its requirements.txt into a .venv there"
    )


def _interpreter(folder: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    if named and not Path(named).is_file():
        raise HostNotFoundError(
            f"COMFYUI_PYTHON is {named}, but there is no such file: set it to ComfyUI's interpreter"
        )
    inner = Path("Scripts", "python.exe") if os.name == "nt" else Path("bin", "python")
    candidates = [Path(named)] if named else [folder / venv / inner for venv in (".venv", "venv")]
    found = [candidate for candidate in candidates if candidate.is_file()]
    return found[0].absolute() if found else Path(sys.executable)  # not resolved: a venv's python may be a link


class ComfyServer:
    """ComfyUI on the CPU, with a base folder of its own, this pack and `packs` (folders), and no others."""

    def __init__(
        self,
        base: Path,
        *,
        packs: Sequence[Path] = (),
        host: Host | None = None,
        threads: int | None = None,
        start_timeout_s: float = 300,
    ) -> None:
        """Prepare the base folder, where models can be put before the host starts; raises HostNotFoundError.

        `threads` is how many the host computes with, all cores if None: one is far faster where others use them too.
        """
        self.host = host or find_host()
        self.base = base.resolve()
        self.models = self.base / "models"
        self.output = self.base / "output"
        self.log = self.base / "comfyui.log"
        self.url = ""
        self._threads = threads
        self._start_timeout_s = start_timeout_s
        self._client_id = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        for folder in ("custom_nodes", "input", "output", "user", "models/checkpoints", "models/loras"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        _lend(PACK, self.base / "custom_nodes" / PACK_NAME, PACK_PARTS)
        for pack in packs:
            _lend(pack.resolve(), self.base / "custom_nodes" / pack.name)

    def __enter__(self) -> Self:
        """Start the host and wait until it answers; raises ComfyError with the end of its log if it does not."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*map(str, self._command()), "--port", str(port)],
                cwd=self.host.folder,
                env=_environment(self._threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the host."""
        self.stop()

    def stop(self) -> None:
        """End the host's process, kindly and then not; nothing to do if it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def run(self, prompt: Prompt, *, timeout_s: float = 600) -> dict[str, Any]:
        """Run a prompt to its end and return {node id: output} of its output nodes, such as {"9": {"images": [...]}}.

        Raises ComfyError with the host's words, and the node's, when it refuses the prompt or a node of it fails.
        """
        prompt_id = self.submit(prompt)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return _outputs(history[prompt_id])
            time.sleep(_POLL_S)
        self.post("/interrupt", {})
        raise ComfyError(f"the prompt was still running after {timeout_s:g} s, and was interrupted")

    def submit(self, prompt: Prompt) -> str:
        """Queue a prompt and return its id; raises ComfyError if the host refuses it, or a branch of it."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self._client_id})
        if answer.get("node_errors"):
            raise _refused(answer)
        return str(answer["prompt_id"])

    def fetch(self, file: Mapping[str, str]) -> bytes:
        """Return the bytes of a file that an output names: {"filename", "subfolder", "type"}."""
        return self._request(f"/view?{urllib.parse.urlencode(dict(file))}")

    def log_text(self) -> str:
        """Return all that the host printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """Return the JSON answer to a GET."""
        return json.loads(self._request(path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON answer to a POST of JSON, None if it is empty; raises ComfyError when it is refused."""
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        # Without the proxy that the environment may name: the host is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise _refused(_json_or_text(error.read())) from error
        except OSError:
            self._check_alive()
            raise

    def _command(self) -> list[str | Path]:
        # Only options that the oldest host knows which can load the pack. The database goes with the rest, not into
        # the host's own folder.
        options: list[str | Path] = ["--cpu", "--base-directory", self.base, "--listen", "127.0.0.1"]
        options += ["--disable-auto-launch", "--disable-api-nodes", "--preview-method", "none"]
        options += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
        return [self.host.python, self.host.folder / "main.py", *options]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            try:
                self.get("/system_stats")
                return
            except OSError:  # it does not listen yet
                time.sleep(_POLL_S)
        raise ComfyError(
            f"ComfyUI did not answer within {self._start_timeout_s:g} s; its log ends:\n{self._log_tail()}"
        )

    def _check_alive(self) -> None:
        code = self._process.poll() if self._process else None
        if self._process is None or code is not None:
            raise ComfyError(f"ComfyUI has ended (exit code {code}); its log ends:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-_LOG_LINES:])


def _outputs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs of an entry of the host's history, or raise what it says went wrong."""
    status = entry["status"]
    if status["status_str"] == "success":
        return dict(entry["outputs"])
    for kind, data in status["messages"]:
        if kind == "execution_error":
            message = data["exception_message"].strip()
            raise ComfyError(f"{data['node_type']}: {message}", node_type=data["node_type"])
        if kind == "execution_interrupted":
            raise ComfyError("the prompt was interrupted", node_type=data.get("node_type"))
    raise ComfyError(f"the prompt failed, and the host does not say why: {status}")


def _refused(answer: Any) -> ComfyError:
    """Put into words what the host answers to a prompt that is not valid."""
    if not isinstance(answer, Mapping):
        return ComfyError(f"the host refused: {answer}")
    lines = []
    node_type = None
    for node in (answer.get("node_errors") or {}).values():
        node_type = node_type or node["class_type"]
        lines += [f"{node['class_type']}: {error['message']}: {error['details']}" for error in node["errors"]]
    error = answer.get("error") or {}
    if not lines:
        lines = [": ".join(filter(None, (error.get("message"), error.get("details")))) or str(answer)]
    return ComfyError("\n".join(lines), node_type=node_type)


def _json_or_text(body: bytes) -> Any:
    text = body.decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lend(pack: Path, place: Path, parts: Sequence[str] = ()) -> None:
    """Put a link to a pack where the host looks for packs; where links cannot be made, a copy (of `parts` only)."""
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    try:
        place.symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows gives links to administrators and developers alone
        place.mkdir()
        for part in parts or [entry.name for entry in pack.iterdir() if entry.name != "__pycache__"]:
            source = pack / part
            if source.is_dir():
                shutil.copytree(source, place / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copy2(source, place / part)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(threads: int | None) -> dict[str, str]:
    """Return the environment for the host: without what would put our packages before its own."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    if threads is not None:
        kept |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return kept | {"PYTHONUNBUFFERED": "1"}
