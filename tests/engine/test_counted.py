"""The counts of a step's work on a small model of ComfyUI."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "counted" / "host.py"


def test_the_steps_of_a_small_model() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(done.stdout.splitlines()[-1])
    assert step["step"] == "Flux, 8 bits, 64 px" and step["GB"] > step["weights GB"] > 0
    assert step["gradient"] > step["student"] > 0, "the gradient repeats the student"
    # The network takes the guidance scale, so the teacher is one call; the adapter adds work to the other two.
    assert step["teacher"] < step["target"] == step["student"] < 1.2 * step["teacher"]
