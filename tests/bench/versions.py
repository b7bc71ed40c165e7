"""Benchmark of a training step of this version beside that of another one.

python tests/bench/versions.py --other FOLDER [--base tiny|sd15] [--steps N] [--cpu]

FOLDER is another checkout of the repository: one with trainer/models/seam.py, or an older one in which trainer and tcd
are packages by themselves, such as 9d6a3c4. Both train a network of random weights in float32 on the CPU, on pictures
in memory, each in a process of its own; they take turns, a step at a time, and the result is the ratio within a turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from turns import Loop, in_turns, serve

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from plain_method import PLAIN  # noqa: E402

PICTURES = 64


class Size(NamedTuple):
    """What is trained on a base; side: of the pictures, in pixels."""

    side: int
    batch: int
    rank: int


SIZES = {"tiny": Size(64, 8, 32), "sd15": Size(256, 1, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of the repository")
    parser.add_argument("--base", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=30, help="timed pairs of steps, after one to warm up")
    parser.add_argument("--cpu", action="store_true", help="count CPU time, for a busy machine")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        clock = time.process_time if options.cpu else time.perf_counter
        serve(step=step_of(options.other.resolve(), options.base, clock))
        return
    folders = {"this": HERE.parents[1], "other": options.other}
    loops = {name: Loop(__file__, *sys.argv[1:], "--serve", "--other", folder) for name, folder in folders.items()}
    times = in_turns(loops, options.steps)
    for loop in loops.values():
        loop.close()
    ratios = [this / other for this, other in zip(times["this"], times["other"], strict=True)]
    median = {name: statistics.median(taken) for name, taken in times.items()}
    print(
        f"{options.base}, {options.steps} pairs: this takes {statistics.median(ratios):.3f} of the other's time "
        f"({min(ratios):.3f} to {max(ratios):.3f}); medians {median['this']:.3f} s and {median['other']:.3f} s"
    )


def step_of(folder: Path, base: str, clock: Callable[[], float]) -> Callable[[], float]:
    """Load the version in a folder; return what trains a step and says how many seconds that took."""
    if (folder / "trainer" / "models" / "seam.py").exists():
        spec: Any = spec_from_file_location("trajectory_consistency", folder / "__init__.py")
        sys.modules[spec.name] = package = module_from_spec(spec)
        spec.loader.exec_module(package)
        training = training_here(base)
    else:
        sys.path.insert(0, str(folder))
        training = training_before(base)
    assert Path(sys.modules[type(training).__module__].__file__ or "").resolve().is_relative_to(folder)
    train_step = getattr(training, "train_step", None) or training.advance  # earlier versions call it advance

    def step() -> float:
        began = clock()
        train_step()
        return clock() - began

    return step


def training_here(base: str) -> Any:
    """The loop of a version with the seam."""

    def module(name: str) -> Any:
        return import_module(f"trajectory_consistency.{name}")

    families, settings = module("trainer.models.unet.families"), config_of(module("trainer.config.settings"), base)
    tcd, conditioning = module("tcd"), module("trainer.models.conditioning").Conditioning
    schedule = tcd.DiscreteSchedule.from_alpha_bar(tcd.scaled_linear_alpha_bar())
    model = module("trainer.models.unet.model").UNetModel(unet_of(families, base), schedule, "eps")
    adapter = settings.adapter
    weights = model.new_weights(rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=adapter.targets)
    model.adapter.add(module("tcd.adapter").STUDENT, weights)

    def join(captions: Any, _: Tensor) -> Any:
        return conditioning.cat(captions)

    order, sizes = module("trainer.data.dataset"), module("trainer.data.buckets")
    data = dataset_of(
        order, argparse.Namespace(Group=order.Group, Size=sizes.Size), model.network.config, "sizes", base
    )
    return module("trainer.training.loop").Training(model, data(join), settings)


def training_before(base: str) -> Any:
    """The loop of a version without it."""
    modules = {name: import_module(f"trainer.{name}") for name in ("bases", "config", "network", "adapter", "loop")}
    found: Any = argparse.Namespace(**modules)
    settings, unet = config_of(found.config, base), unet_of(found.bases, base)
    network = found.network.Network(unet, import_module("tcd").scaled_linear_alpha_bar().float(), "eps")
    adapter = settings.adapter
    parameters = found.adapter.add_adapter(
        unet, rank=adapter.rank, alpha=adapter.alpha, seed=0, targets=adapter.targets
    )
    data = dataset_of(import_module("trainer.dataset"), import_module("trainer.order"), unet.config, "time_ids", base)
    return found.loop.Training(network, parameters, data(), settings)


def config_of(configuration: Any, base: str) -> Any:
    side, batch, rank = SIZES[base]
    known = {field.name for field in dataclasses.fields(configuration.MethodConfig)}  # earlier versions know fewer
    values: Mapping[str, Any] = {
        "method": {name: value for name, value in PLAIN.items() if name in known},
        "data": {"folder": ".", "resolution": side},
        "adapter": {"rank": rank, "alpha": float(rank)},
        "training": {"batch": batch, "device": "cpu"},
        "output": {"folder": "."},
    }
    return configuration.from_mapping({"base": {"path": "tiny"}, **values})


def unet_of(families: Any, base: str) -> Any:
    torch.manual_seed(0)
    return families.empty_unet(base).requires_grad_(False).eval()


def dataset_of(dataset: Any, order: Any, unet: Any, sizes: str, base: str) -> Callable[..., Any]:
    """The data set, but for what follows it in its constructor; sizes: what the shards call those of the pictures."""
    side, generator = SIZES[base].side, torch.Generator().manual_seed(0)
    latents = {name: torch.randn((PICTURES, 4, side // 8, side // 8), generator=generator) for name in ("mean", "std")}
    latents[sizes] = torch.tensor([side, side, 0, 0, side, side]).expand(PICTURES, -1)
    captions = {"context": torch.randn((PICTURES + 1, 77, unet.cross_attention_dim), generator=generator)}
    table = dataset.Table(torch.tensor([(0, row, 0, row + 1) for row in range(PICTURES)]), [latents], [captions])
    groups = (order.Group(order.Size(side, side), PICTURES, 1.0),)
    return lambda *join: dataset.Dataset(groups, [table], dataset.caption_of(captions, 0), *join)


if __name__ == "__main__":
    main()
