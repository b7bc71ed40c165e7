"""Benchmark of precision: the LoRA's gradient in a bfloat16 and a float16 base, beside that in a float32 base.

python tests/bench/precision.py --out FILE.md [--steps N...]

Trains the demo's tiny model, which is a trained one, by the recommended method in float32. At the given steps, the
gradient of the next batch is computed in each dtype and for each c of the distance, from the same weights.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gradients import errors_while_training

from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.data.encode import load_or_encode
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.run import load_student
from trajectory_consistency.trainer.tiny import world
from trajectory_consistency.trainer.training.loop import Training

CPU, FLOAT = torch.device("cpu"), torch.float32
HUBER_C, DTYPES = (0.03, 0.001), (torch.bfloat16, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 20, 300], help="after how many steps")
    options = parser.parse_args()
    lines = ["| base | `huber_c` | " + " | ".join(f"after {n} steps" for n in options.steps) + " |"]
    lines.append("|---" * (2 + len(options.steps)) + "|")
    with TemporaryDirectory() as folder:
        world.write_folder(Path(folder, "pictures"), 64, seed=0)
        for huber_c in HUBER_C:
            found = compared(configured(Path(folder), huber_c), options.steps)
            for dtype, errors in found.items():
                cells = [f"{each['relative error']:.3f}, {each['cosine']:.4f}" for each in errors]
                lines.append(f"| {str(dtype).removeprefix('torch.')} | {huber_c:g} | {' | '.join(cells)} |")
    options.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


def configured(folder: Path, huber_c: float) -> Config:
    return from_mapping(
        {
            "base": {"path": "tiny"},
            "data": {"folder": str(folder / "pictures"), "resolution": world.SIZE_PX, "cache": str(folder / "cache")},
            "method": {"huber_c": huber_c, "guidance_min": 1.5, "guidance_max": 1.5},
            "adapter": {"rank": 32, "alpha": 32.0},
            "training": {"steps": 1000, "batch": 8, "lr": 1e-3, "device": "cpu"},
            "output": {"folder": str(folder)},
        }
    )


def compared(config: Config, at: list[int]) -> dict[torch.dtype, list[dict[str, float]]]:
    """Error and cosine of the gradient in each dtype, after each number of steps."""
    checkpoint = open_checkpoint(config.base)
    dataset = load_or_encode(config, CPU, FLOAT)
    training = Training(load_student(config, checkpoint, CPU, FLOAT), dataset, config)
    others = {dtype: load_student(config, checkpoint, CPU, dtype) for dtype in DTYPES}
    found: dict[torch.dtype, list[dict[str, float]]] = {dtype: [] for dtype in DTYPES}
    for steps, errors in errors_while_training(training, others, at):
        for dtype, error in errors.items():
            found[dtype].append(error)
        print(config.method.huber_c, steps, errors, flush=True)
    return found


if __name__ == "__main__":
    main()
