"""Run a script of scripts/ by the host's interpreter, in the host's folder."""

import json
import subprocess
from pathlib import Path
from typing import Any

from trajectory_consistency.trainer.find_comfyui import PACK, Host

SCRIPTS = Path(__file__).parent / "scripts"


def run_script(host: Host, script: str, *arguments: str, timeout_s: float = 300) -> dict[str, Any]:
    """Return the JSON object that a script prints; its arguments are the pack's folder and `arguments`."""
    command = [str(host.python), str(SCRIPTS / script), str(PACK), *arguments]
    done = subprocess.run(command, cwd=host.folder, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
