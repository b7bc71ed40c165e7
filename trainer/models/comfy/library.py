"""ComfyUI as a library: found, set up without its command line, and imported by the running interpreter."""

from __future__ import annotations

import logging
import re
import sys
from functools import cache
from pathlib import Path

import torch

from ...errors import UserError
from ...find_comfyui import PACK, Host, HostNotFoundError, find_host
from ...user_path import user_path

OLDEST_TESTED = "0.33.0"
_VERSION_FILE = "comfyui_version.py"


@cache
def load_comfyui() -> Host:
    """Import ComfyUI's model code, on the GPU if torch has one, and read its extra_model_paths.yaml.

    Must be called before any other import of ComfyUI's modules. Raises UserError if there is no ComfyUI, it is too old,
    or the running interpreter does not have its packages.
    """
    try:
        host = find_host()
    except HostNotFoundError as error:
        raise UserError(str(error)) from None
    check_version(host.folder)
    sys.path.insert(0, str(host.folder))  # first, because ComfyUI's modules have common names, such as `utils`
    log_level = logging.getLogger().level
    try:
        import comfy.cli_args

        # ComfyUI chooses its device when it is imported, and fails if it expects a GPU and there is none.
        comfy.cli_args.args.cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        # torch's attention, which has gradients and is the same on every device; also with xformers installed.
        comfy.cli_args.args.use_pytorch_cross_attention = True
        import comfy.sd
    except ImportError as error:
        sys.path.remove(str(host.folder))
        # find_host gives the running interpreter where it finds none of ComfyUI's own, as for the portable version.
        is_unknown = host.python == Path(sys.executable)
        python, which = ("PYTHON", ", the PYTHON that starts it") if is_unknown else (host.python, "")
        raise UserError(
            f"{sys.executable} cannot import the ComfyUI in {host.folder} ({error}): run the trainer by ComfyUI's own "
            f'interpreter{which}. Once: {python} -m pip install -e "{PACK}[comfyui]"; then: '
            f"{python} -m trajectory_consistency.trainer ..."
        ) from error
    finally:
        logging.getLogger().setLevel(log_level)
    _read_extra_paths(host.folder)
    return host


def check_version(folder: Path) -> None:
    """Raise UserError if the ComfyUI in a folder is older than the oldest one that was tested."""
    file = folder / _VERSION_FILE
    found = (
        re.search(r"[0-9][0-9.]*", file.read_text(encoding="utf-8").partition("__version__")[2])
        if file.is_file()
        else None
    )
    if found is None or _numbers(found.group()) < _numbers(OLDEST_TESTED):
        version = f"ComfyUI {found.group()}" if found else f"a ComfyUI without a version in {_VERSION_FILE}"
        raise UserError(f"{folder} has {version}, but training needs {OLDEST_TESTED} or newer: update ComfyUI")


def find_model(folder: str, name: str, key: str) -> Path:
    """Return the path of a model file: a path, or a name in one of ComfyUI's folders such as `text_encoders`.

    key: the setting, for messages. Raises UserError if there is no such file.
    """
    import folder_paths

    path = user_path(name)
    if path.is_file():
        return path
    found = folder_paths.get_full_path(folder, name)
    if found is not None:
        return Path(found)
    places = ", ".join(folder_paths.get_folder_paths(folder))
    raise UserError(f"{key} is {name}: there is no such file, neither here nor in ComfyUI's folders ({places})")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", version)))


def _read_extra_paths(folder: Path) -> None:
    """Add the model folders of ComfyUI's own extra_model_paths.yaml, as its main.py does."""
    extra = folder / "extra_model_paths.yaml"
    if extra.is_file():
        from utils.extra_config import load_extra_path_config

        load_extra_path_config(str(extra))
