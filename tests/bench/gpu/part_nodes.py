"""The sampler of the nodes beside ComfyUI's lcm and euler: a picture in 4 steps, with previews, in turns."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch
from families import FAMILIES
from measure import Bench

from trajectory_consistency.trainer.models.comfy.library import load_comfyui

STEPS, TURNS = 4, 6


class Size(NamedTuple):
    """A UNet of full size: pixels of a picture, width of the text, and settings of its network."""

    pixels: int
    context: int
    network: dict[str, Any]


SIZES = {
    "sd15": Size(
        512,
        768,
        {
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        },
    ),
    "sdxl": Size(
        1024,
        2048,
        {
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "num_heads": -1,
            "num_head_channels": 64,
            "context_dim": 2048,
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
    ),
}


def run(bench: Bench) -> None:
    """Time a picture of SD1.5 and of SDXL."""
    load_comfyui()
    import comfy.ops
    import comfy.sd

    sizes = {"smallest sd15": Size(64, 768, {})} if bench.dry else SIZES
    for family, size in sizes.items():
        label = f"{family} {size.pixels} px"
        with bench.case(label) as has_time:
            if has_time:
                network = FAMILIES["sd15"].build(
                    dtype=bench.dtype, device=bench.device, operations=comfy.ops.manual_cast, **size.network
                )
                state = {name: torch.randn_like(value) * 0.02 for name, value in network.state_dict().items()}
                del network
                patcher = comfy.sd.load_diffusion_model_state_dict(state, disable_dynamic=True)
                _time(bench, label, patcher, size)


def _time(bench: Bench, label: str, patcher: Any, size: Size) -> None:
    import comfy.sample
    import comfy.samplers

    from trajectory_consistency.nodes.host.sampling import tcd_sampler
    from trajectory_consistency.nodes.host.schedulers import setup_sigmas

    samplers = {
        "tcd": tcd_sampler(0.3),
        "lcm": comfy.samplers.sampler_object("lcm"),
        "euler": comfy.samplers.sampler_object("euler"),
    }
    sigmas = setup_sigmas(patcher, "simple", steps=STEPS, denoise=1.0)
    latent = torch.zeros(1, 4, size.pixels // 8, size.pixels // 8)
    noise = comfy.sample.prepare_noise(latent, 0)
    entries = {"pooled_output": torch.randn(1, 1280)} if size.context == 2048 else {}
    positive = [[torch.randn(1, 77, size.context), entries]]

    def picture(name: str) -> None:
        def preview(step: int, x0: Any, x: Any, steps: int) -> None:
            x0[:1].cpu()  # as the host's previewer takes it

        comfy.sample.sample_custom(
            patcher, noise, 1.0, samplers[name], sigmas, positive, positive, latent, callback=preview, seed=0
        )

    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(2 if bench.dry else TURNS + 1):
        for name in list(samplers)[:: -1 if turn % 2 else 1]:
            timed = bench.time(lambda name=name: picture(name), 1, warm_up=0)  # type: ignore[misc]
            if turn:  # the first is warming up
                seconds[name].append(timed.seconds)
    for name, each in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(each, seconds["euler"], strict=True))
        bench.keep(
            f"{label}, {STEPS} steps, {name}",
            {"seconds": round(statistics.median(each), 4), "/ euler": round(ratio, 3)},
        )
