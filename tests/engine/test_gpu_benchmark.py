"""The parts of the benchmark for a GPU that need ComfyUI's packages, in their dry run on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parents[1] / "bench" / "gpu"


def test_the_parts_of_the_host_give_their_figures(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, GPU, "--dry", "--out", out, "host", "nodes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    for family in ("flux", "wan"):
        plain, quantised = (found[f"host: {family}, {dtype}"] for dtype in ("float32", "float8_e4m3fn"))
        assert plain["images/s"] > 0 and quantised["images/s"] > 0
        assert quantised["file GB"] < 0.5 * plain["file GB"]
        assert quantised["estimated GB"] < plain["estimated GB"]
    assert found["nodes: smallest sd15 64 px, 4 steps, euler"]["/ euler"] == 1
    assert found["nodes: smallest sd15 64 px, 4 steps, tcd"]["seconds"] > 0
