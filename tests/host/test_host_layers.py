"""The adapter of tcd/ beside the host's own layers."""

import json
import subprocess
from pathlib import Path

import pytest

from trajectory_consistency.trainer.demo.comfy_server import PACK, Host

pytestmark = pytest.mark.host


def test_a_lora_is_trained_beside_every_kind_of_layer_of_the_host(comfy_host: Host) -> None:
    script = Path(__file__).parent / "scripts" / "layers.py"
    command = [str(comfy_host.python), str(script), str(PACK)]
    done = subprocess.run(command, cwd=comfy_host.folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 6
    for layer, (error, trained) in found.items():
        assert error < 1e-5 and trained, layer
