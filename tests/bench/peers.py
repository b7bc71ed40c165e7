"""The samplers of other TCD packs beside ours in a real ComfyUI, against the paper's equations.

python tests/bench/peers.py --out FILE.md [--pack JettHu=FOLDER] [--pack dfl=FOLDER] [--pack licyk=FOLDER]

The folders are clones of JettHu/ComfyUI-TCD, dfl/comfyui-tcd-scheduler and licyk/ComfyUI-TCD-Sampler.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "host"))

from checkpoints import write_sd3_mini, write_sd15_mini  # noqa: E402

from trajectory_consistency.trainer.find_comfyui import PACK, find_host  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pack", action="append", default=[], metavar="NAME=FOLDER", help="another pack, any of three")
    options = parser.parse_args()
    packs = {name: str(Path(folder).resolve()) for name, folder in (text.split("=", 1) for text in options.pack)}
    host = find_host()
    with tempfile.TemporaryDirectory() as folder:
        write_sd15_mini(Path(folder) / "sd15.safetensors")
        write_sd3_mini(Path(folder) / "sd3.safetensors")
        script = str(HERE / "peers_in_host.py")
        command = [str(host.python), script, str(PACK), folder, json.dumps(packs)]
        done = subprocess.run(command, cwd=host.folder, stdout=subprocess.PIPE, text=True, check=True)
    options.out.write_text(table(json.loads(done.stdout.splitlines()[-1])), encoding="utf-8")


def table(rows: list[list[Any]]) -> str:
    names = list(rows[0][-1])
    lines = ["| model | steps | gamma | run | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for model, steps, gamma, run, found in rows:
        cells = (f"{each:.1e}" if isinstance(each, float) else str(each).split(":")[0] for each in found.values())
        lines.append(f"| {model} | {steps} | {gamma:g} | {run} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
