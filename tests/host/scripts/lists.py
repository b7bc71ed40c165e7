"""Run by the host's interpreter, in the host's folder: TCD in the host's lists beside other packs, and noise_items.

Argument: the pack's folder. Prints a JSON object of what was seen.
"""

import importlib
import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.model_sampling  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers as cs  # noqa: E402
import torch  # noqa: E402
from comfy.k_diffusion import sampling as kds  # noqa: E402
from load_pack import load_host  # noqa: E402

torch.set_num_threads(1)


class Warnings(logging.Handler):
    """What the pack logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def taken(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def lists() -> dict[str, list[str]]:
    return {
        "samplers": [name for name in cs.SAMPLER_NAMES if "tcd" in name],
        "ksampler's samplers": [name for name in cs.KSampler.SAMPLERS if "tcd" in name],
        "schedulers": [name for name in cs.SCHEDULER_NAMES if "tcd" in name],
        "ksampler's schedulers": [name for name in cs.KSampler.SCHEDULERS if "tcd" in name],
        "handlers": [name for name in cs.SCHEDULER_HANDLERS if "tcd" in name],
    }


def forget() -> None:
    """Have the host as it was, its two pairs of lists each one list."""
    if hasattr(kds, "sample_tcd"):
        del kds.sample_tcd
    cs.SCHEDULER_HANDLERS.pop("tcd", None)
    cs.SAMPLER_NAMES[:] = [name for name in cs.SAMPLER_NAMES if name != "tcd"]
    cs.SCHEDULER_NAMES[:] = [name for name in cs.SCHEDULER_NAMES if name != "tcd"]
    cs.KSampler.SAMPLERS, cs.KSampler.SCHEDULERS = cs.SAMPLER_NAMES, cs.SCHEDULER_NAMES


def registered(host: Any, log: Warnings) -> dict[str, Any]:
    """Register in a host as it comes, twice, and after another pack did this or that."""
    found: dict[str, Any] = {}
    identities = [id(each) for each in (cs.SAMPLER_NAMES, cs.SCHEDULER_NAMES, cs.SCHEDULER_HANDLERS)]
    host.register()
    found["once"] = lists()
    host.register()
    found["twice"] = lists()
    after = [id(each) for each in (cs.KSampler.SAMPLERS, cs.KSampler.SCHEDULERS, cs.SCHEDULER_HANDLERS)]
    found["in place"] = identities == after
    importlib.reload(kds)
    found["after a reload"] = cs.sampler_object("tcd").sampler_function is kds.sample_tcd
    found["words"] = log.taken()

    forget()
    cs.KSampler.SAMPLERS = [*cs.SAMPLER_NAMES, "other"]
    cs.SCHEDULER_NAMES = [*cs.SCHEDULER_NAMES, "other"]
    host.register()
    found["where lists were bound anew"] = lists() | {"words": log.taken()}

    def other(*args: Any) -> None:
        raise AssertionError

    forget()
    kds.sample_tcd = other
    cs.SAMPLER_NAMES.append("tcd")
    host.register()
    host.register()
    found["beside another's sampler"] = lists() | {"words": log.taken(), "kept": kds.sample_tcd is other}

    forget()
    host.register()
    model = SimpleNamespace(clone=lambda: SimpleNamespace(model_options={}))
    host.set_eta(model, 0.5)
    ours = log.taken()
    kds.sample_tcd = other
    host.set_eta(model, 0.5)
    found["where another came later"] = {"words before": ours, "words": log.taken()}

    forget()
    cs.SCHEDULER_HANDLERS["tcd"] = theirs = cs.SchedulerHandler(other)
    cs.SCHEDULER_NAMES.append("tcd")
    host.register()
    kept = cs.SCHEDULER_HANDLERS["tcd"] is theirs
    found["beside another's scheduler"] = lists() | {"words": log.taken(), "kept": kept}
    return found


def items(noise_items: Any) -> dict[str, Any]:
    """For each shape and dtype of latents, the items found in noise that the host itself drew."""
    found = {}
    low = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
    draws_float32 = torch.equal(comfy.sample.prepare_noise(low, 0), comfy.sample.prepare_noise(low.float(), 0).half())
    shapes = {"8 x 8": (4, 8, 8), "odd": (4, 5, 5), "tiny": (1, 1, 3), "video": (16, 3, 5, 7), "wide": (128, 7, 9)}
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for seed in (0, 7, 2**64 - 1):

                def of(batch: int, indices: list[int] | None) -> Any:
                    latent = torch.zeros(batch, *shape, dtype=dtype)  # noqa: B023
                    noise = comfy.sample.prepare_noise(latent, seed, indices)  # noqa: B023
                    # As samplers get it: newer hosts draw in float32, round to the latent's dtype, and go back.
                    return noise_items(noise.float() if draws_float32 else noise, seed)  # noqa: B023

                found[f"{name}, {dtype}, seed {seed}"] = [of(3, None), of(1, [2]), of(3, [5, 1, 5]), of(1, [0])]
    noise = torch.randn(2, 4, 64, 64)
    found["of another making"] = noise_items(noise, 0)
    found["large"] = noise_items(comfy.sample.prepare_noise(torch.zeros(1, 16, 128, 128), 0, [20]), 0)
    mixed = torch.cat([comfy.sample.prepare_noise(torch.zeros(1, 4, 64, 64), 0, [3]), noise[:1]])
    found["of another making in part"] = noise_items(mixed, 0)
    found["none"] = [noise_items(torch.zeros(2, 4, 64, 64), 0), noise_items(None, 0)]
    before = torch.get_rng_state()
    noise_items(noise, 0)
    found["leaves the global generator alone"] = torch.equal(torch.get_rng_state(), before)
    return found


class Guider:
    """What KSAMPLER is given: a guider around a smooth network, which treats each image by itself."""

    def __init__(self) -> None:
        kind = type("ModelSampling", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {})
        model_sampling = kind()
        self.inner_model = SimpleNamespace(model_sampling=model_sampling)
        self.model_patcher = SimpleNamespace(get_model_object=lambda _: model_sampling, model=SimpleNamespace())
        self.cfg = 1.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.sin(x / (1 + sigma**2).sqrt().view(-1, *[1] * (x.ndim - 1)))


def video(host: Any) -> dict[str, Any]:
    """Five-dimensional latents: a batch, each video of it by itself, and the batch in two parts."""
    guider = Guider()
    table = guider.inner_model.model_sampling.sigmas
    sigmas = torch.cat([table[[999, 759, 499, 259]], torch.zeros(1)])

    def run(latent: torch.Tensor, sigmas: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return host.tcd_sampler(1.0).sample(
            guider, sigmas, {"model_options": {}, "seed": 3}, None, noise, latent, disable_pbar=True
        )

    empty = torch.zeros(3, 16, 3, 4, 5)
    noise = comfy.sample.prepare_noise(empty, 3)
    whole = run(empty, sigmas, noise)
    alone = [run(empty[:1], sigmas, comfy.sample.prepare_noise(empty[:1], 3, [k]))[0] for k in range(3)]
    split = run(run(empty, sigmas[:3], noise), sigmas[2:], torch.zeros_like(empty))
    return {
        "shape": list(whole.shape),
        "alone": float((whole - torch.stack(alone)).abs().max()),
        "split": float((whole - split).abs().max()),
        "apart": float((whole[0] - whole[1]).abs().max()),
    }


if __name__ == "__main__":
    host = load_host(sys.argv[1])
    log = Warnings()
    logging.getLogger("trajectory-consistency").addHandler(log)
    noise_items = importlib.import_module("some_pack.nodes.host.noise").noise_items
    seen = {"lists": registered(host, log), "items": items(noise_items), "video": video(host)}
    json.dump(seen, sys.stdout)
