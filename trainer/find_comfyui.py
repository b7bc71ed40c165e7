"""Find ComfyUI (the host) on this computer, and its Python interpreter."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
"""The folder of this project, which ComfyUI loads as a node pack."""


class HostNotFoundError(RuntimeError):
    """There is no ComfyUI on this computer; the message says in one line how to get it."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder, and the Python interpreter that has its requirements installed."""

    folder: Path
    python: Path


def find_host() -> Host:
    """Find ComfyUI: COMFYUI_PATH, else the ComfyUI whose custom_nodes folder contains this pack, else ~/comfy/ComfyUI.

    Interpreter: COMFYUI_PYTHON, else the one in ComfyUI's .venv or venv, else the running one. Raises HostNotFoundError
    if there is none, and if COMFYUI_PATH or COMFYUI_PYTHON is set to something that does not exist.
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
    existing = [candidate for candidate in candidates if candidate.is_file()]
    # Not resolved: the python of a venv may be a symbolic link.
    return existing[0].absolute() if existing else Path(sys.executable)
