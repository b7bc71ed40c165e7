"""Run the tests of this folder: `python tests/engine [arguments of pytest]`.

They import ComfyUI, so they need its packages, which the tests of the trainer must not have. Therefore they run in an
environment of their own, with ComfyUI's packages, pytest and this project. It is made on the first call, and again when
pyproject.toml or ComfyUI's interpreter changes.
"""

import os
import subprocess
import sys
from pathlib import Path

from trajectory_consistency.trainer.find_comfyui import Host, HostNotFoundError, find_host

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv-comfyui"
TOOLS = ("pytest", "pytest-xdist")
PROGRAMS = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")


def main() -> int:
    """Return pytest's exit status, or 0 if there is no ComfyUI."""
    try:
        host = find_host()
    except HostNotFoundError as error:
        if "COMFYUI_PATH" in os.environ or "COMFYUI_PYTHON" in os.environ:
            sys.exit(str(error))
        sys.stdout.write(f"ComfyUI: tests of training on its models skipped, {error}\n")
        return 0
    install(host)
    # Not `python -m pytest`, which would put this project's folder `nodes` before ComfyUI's module of that name.
    environment = {**os.environ, "TRAINER_PYTHON": sys.executable}  # it has diffusers, which ComfyUI has not
    command = [PROGRAMS / "pytest", HERE, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def install(host: Host) -> None:
    """Make the environment, unless there is one that is up to date."""
    done = ENVIRONMENT / ".installed"
    wanted = f"{host.python} {TOOLS}\n{(ROOT / 'pyproject.toml').read_text(encoding='utf-8')}"
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return
    _run(host.python, "-m", "venv", "--clear", ENVIRONMENT)
    python = PROGRAMS / "python"
    _run(python, "-m", "pip", "install", "--quiet", *TOOLS, "-e", f"{ROOT}[comfyui]", "-c", ROOT / "constraints.txt")
    # Not by --system-site-packages: those would be of the interpreter from which ComfyUI's environment was made. And
    # only now, because pip would build this project with an old setuptools of ComfyUI's.
    folders = _run(host.python, "-c", "import site; print(*site.getsitepackages(), sep='\\n')").splitlines()
    own = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders] + [str(host.folder)]
    Path(own, "comfyui.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # ComfyUI has what it needs, and the torch of constraints.txt would be another one.
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", "accelerate", "-c", ROOT / "constraints.txt")
    done.write_text(wanted, encoding="utf-8")


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
