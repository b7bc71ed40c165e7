"""Run a headless ComfyUI (the host) within a `with` block: start it, run prompts over HTTP, and stop it.

Only the standard library is used. The host runs in its own interpreter, so neither process sees the other's packages.

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
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..find_comfyui import PACK, Host, find_host

PACK_NAME = "trajectory-consistency"
PACK_PARTS = ("__init__.py", "pyproject.toml", "locales", "nodes", "tcd", "workflows")  # what the host needs

Prompt = Mapping[str, Any]
"""A node graph: {node id: {"class_type": ..., "inputs": {...}}}; an input is a value or [node id, output index]."""

_POLL_S = 0.05
_LOG_LINES = 30


class ComfyError(RuntimeError):
    """The host did not start, or a prompt failed; `node_type` is the class of the node that failed, if one did."""

    def __init__(self, message: str, node_type: str | None = None) -> None:
        super().__init__(message)
        self.node_type = node_type


class ComfyServer:
    """ComfyUI on the CPU, with its own base folder; the only custom nodes are this pack and `packs` (folders)."""

    def __init__(
        self,
        base: Path,
        *,
        packs: Sequence[Path] = (),
        host: Host | None = None,
        threads: int | None = None,
        start_timeout_s: float = 300,
        stop_timeout_s: float = 10,
    ) -> None:
        """Create the base folder, into which models can be copied before the host starts.

        threads: CPU threads of the host; None for all cores. On a busy computer, one thread is much faster.
        stop_timeout_s: how long the host may take to end when it is stopped, before it is killed. Raises
        HostNotFoundError if `host` is None and none is found.
        """
        self.host = host or find_host()
        self.base = base.resolve()
        self.models = self.base / "models"
        self.output = self.base / "output"
        self.log = self.base / "comfyui.log"
        self.url = ""
        self._threads = threads
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        self._client_id = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        for folder in ("custom_nodes", "input", "output", "user", "models/checkpoints", "models/loras"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        _install_pack(PACK, self.base / "custom_nodes" / PACK_NAME, PACK_PARTS)
        for pack in packs:
            _install_pack(pack.resolve(), self.base / "custom_nodes" / pack.name)

    def __enter__(self) -> Self:
        """Start the host and wait until it answers; raises ComfyError, with the end of its log, if it does not."""
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
        """Stop the host."""
        self.stop()

    def stop(self) -> None:
        """Terminate the host's process, and kill it if it does not end; does nothing if it is not running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def run(self, prompt: Prompt, *, timeout_s: float = 600) -> dict[str, Any]:
        """Run a prompt and return {node id: output} of its output nodes, such as {"9": {"images": [...]}}.

        Raises ComfyError, with the host's message, if the host refuses the prompt, a node fails, or timeout_s passes.
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
        """Queue a prompt and return its id; raises ComfyError if the host refuses any part of it."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self._client_id})
        if answer.get("node_errors"):
            raise _refused(answer)
        return str(answer["prompt_id"])

    def fetch(self, file: Mapping[str, str]) -> bytes:
        """Return the content of an output file; file: {"filename", "subfolder", "type"}, as in an output."""
        return self._request(f"/view?{urllib.parse.urlencode(dict(file))}")

    def log_text(self) -> str:
        """Return everything that the host has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """Send a GET request and return the JSON response."""
        return json.loads(self._request(path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a POST request with a JSON body; return the JSON response, or None if it is empty.

        Raises ComfyError if the host refuses it.
        """
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        # Ignore proxies set in the environment: the host is on this computer.
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
        # Only options that the oldest supported host has. The database is in the base folder too, so that nothing is
        # written into the host's own folder.
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
            except OSError:  # not listening yet
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
    """Return the outputs in an entry of the host's history; raises ComfyError if the prompt failed."""
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
    """Return an error with the host's response to an invalid prompt."""
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


def _install_pack(pack: Path, target: Path, parts: Sequence[str] = ()) -> None:
    """Link `target` to a pack; if links cannot be created, copy the pack, or only its `parts`."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    try:
        target.symlink_to(pack, target_is_directory=True)
    except OSError:  # on Windows, only administrators and developers can create links
        target.mkdir()
        for part in parts or [entry.name for entry in pack.iterdir() if entry.name != "__pycache__"]:
            source = pack / part
            if source.is_dir():
                shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copy2(source, target / part)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(threads: int | None) -> dict[str, str]:
    """Return environment variables for the host, without those that would make it import this process's packages."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    if threads is not None:
        kept |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return kept | {"PYTHONUNBUFFERED": "1"}
