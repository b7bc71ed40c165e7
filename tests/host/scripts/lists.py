"""Registers TCD in the host's lists next to other packs' entries, and checks batch_indices and video latents.

Run by the host's interpreter in the host's folder. Argument: the pack's folder. Prints a JSON object of observations.
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
    """Collects the messages that the pack logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def pop_all(self) -> list[str]:
        """Return the messages since the last call."""
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


def reset_host() -> None:
    """Restore the host to its state before registration, where KSampler and the nodes share their lists."""
    if hasattr(kds, "sample_tcd"):
        del kds.sample_tcd
    cs.SCHEDULER_HANDLERS.pop("tcd", None)
    cs.SAMPLER_NAMES[:] = [name for name in cs.SAMPLER_NAMES if name != "tcd"]
    cs.SCHEDULER_NAMES[:] = [name for name in cs.SCHEDULER_NAMES if name != "tcd"]
    cs.KSampler.SAMPLERS, cs.KSampler.SCHEDULERS = cs.SAMPLER_NAMES, cs.SCHEDULER_NAMES


def observe_registration(host: Any, log: Warnings) -> dict[str, Any]:
    """Register twice in an unmodified host, and after another pack has changed the lists."""
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
    found["messages"] = log.pop_all()

    reset_host()
    cs.KSampler.SAMPLERS = [*cs.SAMPLER_NAMES, "other"]
    cs.SCHEDULER_NAMES = [*cs.SCHEDULER_NAMES, "other"]
    host.register()
    found["where lists were replaced"] = lists() | {"messages": log.pop_all()}

    def other(*args: Any) -> None:
        raise AssertionError

    reset_host()
    kds.sample_tcd = other
    cs.SAMPLER_NAMES.append("tcd")
    host.register()
    host.register()
    found["beside another pack's sampler"] = lists() | {"messages": log.pop_all(), "kept": kds.sample_tcd is other}

    reset_host()
    host.register()
    model = SimpleNamespace(clone=lambda: SimpleNamespace(model_options={}))
    host.set_eta(model, 0.5)
    ours = log.pop_all()
    kds.sample_tcd = other
    host.set_eta(model, 0.5)
    found["where another came later"] = {"messages before": ours, "messages": log.pop_all()}

    reset_host()
    cs.SCHEDULER_HANDLERS["tcd"] = theirs = cs.SchedulerHandler(other)
    cs.SCHEDULER_NAMES.append("tcd")
    host.register()
    kept = cs.SCHEDULER_HANDLERS["tcd"] is theirs
    found["beside another pack's scheduler"] = lists() | {"messages": log.pop_all(), "kept": kept}
    return found


def observe_batch_indices(batch_indices: Any) -> dict[str, Any]:
    """Return, for each latent shape and dtype, the batch indices found in noise that the host itself drew."""
    found = {}
    low = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
    draws_float32 = torch.equal(comfy.sample.prepare_noise(low, 0), comfy.sample.prepare_noise(low.float(), 0).half())
    shapes = {"8 x 8": (4, 8, 8), "odd": (4, 5, 5), "tiny": (1, 1, 3), "video": (16, 3, 5, 7), "wide": (128, 7, 9)}
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for seed in (0, 7, 2**64 - 1):

                def indices_of(batch: int, indices: list[int] | None) -> Any:
                    latent = torch.zeros(batch, *shape, dtype=dtype)  # noqa: B023
                    noise = comfy.sample.prepare_noise(latent, seed, indices)  # noqa: B023
                    # As samplers receive it: newer hosts draw in float32, round to the latent's dtype and convert back.
                    return batch_indices(noise.float() if draws_float32 else noise, seed)  # noqa: B023

                found[f"{name}, {dtype}, seed {seed}"] = [
                    indices_of(3, None),
                    indices_of(1, [2]),
                    indices_of(3, [5, 1, 5]),
                    indices_of(1, [0]),
                ]
    noise = torch.randn(2, 4, 64, 64)
    found["from elsewhere"] = batch_indices(noise, 0)
    found["large"] = batch_indices(comfy.sample.prepare_noise(torch.zeros(1, 16, 128, 128), 0, [20]), 0)
    mixed = torch.cat([comfy.sample.prepare_noise(torch.zeros(1, 4, 64, 64), 0, [3]), noise[:1]])
    found["partly from elsewhere"] = batch_indices(mixed, 0)
    found["none"] = [batch_indices(torch.zeros(2, 4, 64, 64), 0), batch_indices(None, 0)]
    before = torch.get_rng_state()
    batch_indices(noise, 0)
    found["leaves the global generator alone"] = torch.equal(torch.get_rng_state(), before)
    return found


class Guider:
    """The guider that KSAMPLER is called with, around a smooth network that treats each image independently."""

    def __init__(self) -> None:
        kind = type("ModelSampling", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {})
        model_sampling = kind()
        self.inner_model = SimpleNamespace(model_sampling=model_sampling)
        self.model_patcher = SimpleNamespace(get_model_object=lambda _: model_sampling, model=SimpleNamespace())
        self.cfg = 1.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.sin(x / (1 + sigma**2).sqrt().view(-1, *[1] * (x.ndim - 1)))


def video(host: Any) -> dict[str, Any]:
    """Sample five-dimensional latents as a batch, one video at a time, and as a batch in two parts."""
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
        "difference": float((whole[0] - whole[1]).abs().max()),
    }


if __name__ == "__main__":
    host = load_host(sys.argv[1])
    log = Warnings()
    logging.getLogger("trajectory-consistency").addHandler(log)
    batch_indices = importlib.import_module("some_pack.nodes.host.batch_index").batch_indices
    seen = {
        "lists": observe_registration(host, log),
        "batch indices": observe_batch_indices(batch_indices),
        "video": video(host),
    }
    json.dump(seen, sys.stdout)
