"""Benchmark of the nodes in a real ComfyUI: agreement with diffusers, time beside euler, cost beside the model.

python tests/bench/nodes.py --out FILE.md [--rounds N]

Uses a full-size SD 1.5 of random weights, made once (2.1 GB in the user's cache). Times are medians of runs taken in
turns, so that whatever else the machine does meets both sides alike; look at the ratios.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "host"))

from full_size import full_size_sd15  # noqa: E402
from graphs import Graph, host_noise, latents, relative_error, salt  # noqa: E402
from reference import tcd_scheduler_sample  # noqa: E402

from trajectory_consistency.tcd import timestep_grid  # noqa: E402
from trajectory_consistency.trainer.config.base import BaseConfig  # noqa: E402
from trajectory_consistency.trainer.demo.comfy_server import ComfyServer  # noqa: E402
from trajectory_consistency.trainer.find_comfyui import PACK, find_host  # noqa: E402
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint  # noqa: E402

GAMMAS, STEPS = (0.0, 0.3, 1.0), (1, 2, 4, 8)
CHECKPOINT = "sd15-random.safetensors"
PIXELS = 256  # of a timed picture: with fewer the model is too cheap to be compared with anything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8, help="pairs of timed runs")
    options = parser.parse_args()
    host = find_host()
    with tempfile.TemporaryDirectory() as folder:
        pack = HERE.parent / "host" / "packs" / "tcd_test_pack"
        server = ComfyServer(Path(folder), packs=[pack], host=host)
        (server.models / "checkpoints" / CHECKPOINT).symlink_to(full_size_sd15())
        with server:
            times = paired_times(server, options.rounds)
            errors = agreement(server)
    overhead = json.loads(host_script(host, "overhead.py"))
    options.out.write_text(report(errors, times, overhead, options.rounds), encoding="utf-8")


def agreement(server: ComfyServer) -> dict[tuple[float, int], float]:
    """Relative distance of the host's latent from that of diffusers' UNet and TCDScheduler, by gamma and steps."""
    checkpoint = UNetCheckpoint(BaseConfig(path=str(full_size_sd15())))
    unet = checkpoint.load(torch.float32, torch.device("cpu")).network
    found = {}
    for gamma in GAMMAS:
        for steps in STEPS:
            graph = Graph()
            model = graph.checkpoint(CHECKPOINT)[0]
            node = graph.sampler_custom(model=model, eta=gamma, sigmas=graph.sigmas(model, steps=steps)[0], seed=1)
            (ours,) = latents(server, graph, graph.save(node[0]))
            expected = tcd_scheduler_sample(unet, host_noise(1), timestep_grid(steps), eta=gamma, seed=1)
            found[gamma, steps] = relative_error(ours, expected)
            print(f"agreement: gamma {gamma:g}, {steps} steps: {found[gamma, steps]:.1e}", flush=True)
    return found


def paired_times(server: ComfyServer, rounds: int) -> dict[str, list[float]]:
    """Seconds of a 4-step prompt with KSampler, by sampler, in turns; the model and the texts are loaded before."""
    kinds = {"tcd": ("tcd", "tcd"), "euler": ("euler", "simple")}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name in sorted(kinds, reverse=bool(turn % 2)):
            taken = seconds(server, ksampler_graph(*kinds[name], seed=turn))
            if turn:  # the first is warming up
                found[name].append(taken)
                print(f"{name}: {taken:.2f} s", flush=True)
    return found


def ksampler_graph(sampler: str, scheduler: str, *, seed: int) -> Graph:
    graph = Graph()
    conditions = [graph.add("TestConditioning", seed=side, salt="")[0] for side in (0, 1)]  # the same: cached
    node = graph.add(
        "KSampler",
        model=graph.checkpoint(CHECKPOINT)[0],
        seed=seed,
        steps=4,
        cfg=1.0,
        sampler_name=sampler,
        scheduler=scheduler,
        positive=conditions[0],
        negative=conditions[1],
        latent_image=graph.add("EmptyLatentImage", width=PIXELS, height=PIXELS, batch_size=1)[0],
        denoise=1.0,
    )
    graph.add("SaveLatent", samples=node[0], filename_prefix=salt())
    return graph


def seconds(server: ComfyServer, graph: Graph) -> float:
    """Return how long the host worked on a prompt, by its own clock."""
    prompt_id = server.submit(graph)
    while not (entry := server.get(f"/history/{prompt_id}").get(prompt_id)):
        time.sleep(0.05)
    stamps = {kind: data["timestamp"] for kind, data in entry["status"]["messages"]}
    return float(stamps["execution_success"] - stamps["execution_start"]) / 1000


def host_script(host: Any, name: str) -> str:
    command = [str(host.python), str(HERE / name), str(PACK)]
    return subprocess.run(command, cwd=host.folder, capture_output=True, text=True, check=True).stdout


def report(
    errors: dict[tuple[float, int], float], times: dict[str, list[float]], overhead: dict[str, float], rounds: int
) -> str:
    ratio = statistics.median(a / b for a, b in zip(times["tcd"], times["euler"], strict=True))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    lines = [
        "# The nodes, measured in a real ComfyUI",
        "",
        f"`make bench` on {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, no GPU, "
        f"torch {torch.__version__}. SD 1.5, full size, random weights.",
        "",
        "## Agreement with diffusers",
        "",
        "Relative distance between the latent from ComfyUI (SamplerCustom, TCDSampler, TCDSigmas) and that from",
        "diffusers' own UNet and TCDScheduler, with the same initial and injected noise, ended at x0 as ComfyUI does.",
        "",
        "| gamma | " + " | ".join(f"{n} steps" if n > 1 else "1 step" for n in STEPS) + " |",
        "|---" * (len(STEPS) + 1) + "|",
        *(f"| {gamma:g} | " + " | ".join(f"{errors[gamma, n]:.1e}" for n in STEPS) + " |" for gamma in GAMMAS),
        "",
        "## Time of a picture",
        "",
        f"KSampler, 4 steps, {PIXELS} x {PIXELS}, cfg 1, {rounds} pairs in turns. Median of the ratios: "
        f"**{ratio:.3f}** (`tcd` {medians['tcd']:.2f} s, `euler` {medians['euler']:.2f} s).",
        "",
        "## Cost of a step beside the model",
        "",
        "A model that does nothing, a latent of 4 x 64 x 64, one thread; median microseconds a step.",
        "",
        "| " + " | ".join(overhead) + " |",
        "|---" * len(overhead) + "|",
        "| " + " | ".join(f"{taken:.0f}" for taken in overhead.values()) + " |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
