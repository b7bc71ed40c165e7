"""Measures nodes/host on every kind of model that the host has.

Run by the host's interpreter in the host's folder. Argument: the pack's folder. Prints a JSON object of measurements.
kinds.py lists the models, the networks are analytic, and the sampler runs inside the host's own KSAMPLER.
"""

import importlib
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.samplers  # noqa: E402
import torch  # noqa: E402
from kinds import models_of_the_host  # noqa: E402
from load_pack import load_host  # noqa: E402
from torch import Tensor  # noqa: E402

torch.set_num_threads(1)
GAMMAS = (0.0, 0.3, 1.0)
STEPS = (1, 2, 4)
SEED = 3
MEAN, STD = 0.7, 0.4  # of Gaussian data
POINT = 0.75  # data that is a single point


class Guider:
    """The guider that KSAMPLER is called with, around a model whose network is x0(x, sigma)."""

    def __init__(self, model_sampling: Any, x0: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.inner_model = SimpleNamespace(model_sampling=model_sampling, scale_latent_inpaint=None)
        self.model_patcher = SimpleNamespace(get_model_object=lambda _: model_sampling, model=SimpleNamespace())
        self.cfg = 1.0
        self.x0 = x0
        self.seen: list[Tensor] = []  # x at each call
        self.sigmas: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        assert sigma.shape == (len(x),), "one sigma per image"
        self.seen.append(x)
        self.sigmas.append(sigma[0])
        return self.x0(x, sigma[0])


def level(model_sampling: Any, sigma: Tensor) -> tuple[float, float]:
    """Return the host's own factors (alpha, sigma) of image and noise at this sigma."""
    zero, one = torch.zeros(1), torch.ones(1)
    return float(model_sampling.noise_scaling(sigma, zero, one)), float(model_sampling.noise_scaling(sigma, one, zero))


def point(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the exact estimate of x0 for data that is POINT everywhere."""
    return torch.full_like(x, POINT)


def smooth(x: Tensor, sigma: Tensor) -> Tensor:
    """Return an arbitrary smooth estimate that differs for any two x."""
    return torch.tanh(x / (1 + sigma)) + 0.1 * torch.sin(3 * x / (1 + sigma))


def gaussian(model_sampling: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the exact estimate E[x0 | x] for data ~ N(MEAN, STD^2)."""

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        alpha, spread = level(model_sampling, sigma)
        weight = alpha * STD**2 / (alpha**2 * STD**2 + spread**2)
        return MEAN + weight * (x - alpha * MEAN)

    return x0


def run(sampler: Any, guider: Guider, sigmas: Tensor, latent: float | Tensor = 0.0, **options: Any) -> Tensor:
    options = {"seed": SEED, "callback": None, "dtype": torch.float32, "shape": (4, 4, 32, 32)} | options
    noise = torch.randn(options["shape"], generator=torch.Generator().manual_seed(SEED)).to(options["dtype"])
    extra = {"model_options": {}, "seed": options["seed"]}
    latent = torch.zeros_like(noise) + latent
    return sampler.sample(guider, sigmas, extra, options["callback"], noise, latent, disable_pbar=True)


def sigmas_of(host: Any, model_sampling: Any, steps: int = 4, denoise: float = 1.0, timesteps: str = "") -> Tensor:
    patcher = SimpleNamespace(get_model_object=lambda _: model_sampling)
    return host.tcd_sigmas(patcher, steps=steps, denoise=denoise, timesteps=timesteps)


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


# Measurements of each model


def grids(host: Any, model_sampling: Any) -> dict[str, Any]:
    """Return the sigmas of TCDSigmas and of the scheduler, their strategic targets, and the refusals of bad input."""
    schedule = host.schedule_of(model_sampling)
    inner = sigmas_of(host, model_sampling)[1:4]
    by_hand: list[float] = []
    found = {
        "schedule": type(schedule).__name__,
        "sigma_max": float(model_sampling.sigma_max),
        "sigmas": {steps: sigmas_of(host, model_sampling, steps).tolist() for steps in STEPS},
        "half": sigmas_of(host, model_sampling, 2, denoise=0.5).tolist(),
        "none": sigmas_of(host, model_sampling, denoise=0.0).tolist(),
        "scheduler": host.scheduler_sigmas(model_sampling, 4).tolist(),
        "many": host.scheduler_sigmas(model_sampling, 1000).tolist(),
        "too many": refusal(lambda: host.scheduler_sigmas(model_sampling, 1001)),
        "51": refusal(lambda: sigmas_of(host, model_sampling, 51)),
        "typed": refusal(lambda: by_hand.extend(sigmas_of(host, model_sampling, timesteps="750.5,500").tolist())),
        "by hand": by_hand,
        "bad steps": refusal(lambda: sigmas_of(host, model_sampling, 0)),
        "bad denoise": refusal(lambda: sigmas_of(host, model_sampling, denoise=float("nan"))),
    }
    if type(schedule).__name__ in ("DiscreteSchedule", "BridgeSchedule"):
        found["table"] = model_sampling.sigmas.tolist()
    if type(schedule).__name__ != "BridgeSchedule":
        found["targets"] = {gamma: schedule.target_sigma(inner, gamma).tolist() for gamma in GAMMAS}
    return found


def point_mass(host: Any, model_sampling: Any, gamma: float, sigmas: Tensor) -> dict[str, Any]:
    """Return the error of the result for data that is one point, and the noise std of x at each call over its sigma."""
    guider = Guider(model_sampling, point)
    out = run(host.tcd_sampler(gamma), guider, sigmas)
    seen = []
    for x, sigma in zip(guider.seen, guider.sigmas, strict=True):
        alpha, spread = level(model_sampling, sigma)
        seen.append(float((x - alpha * POINT).std()) / spread)
    return {"error": float((out - POINT).abs().max()), "seen": seen}


def moments(host: Any, model_sampling: Any, gamma: float, sigmas: Tensor) -> dict[str, Any]:
    """Return mean and std of x at each call and of the result for Gaussian data, and the host's levels."""
    guider = Guider(model_sampling, gaussian(model_sampling))
    data = MEAN + STD * torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(7))
    out = run(host.tcd_sampler(gamma), guider, sigmas, latent=data)
    return {
        "levels": [level(model_sampling, sigma) for sigma in sigmas],
        "means": [float(x.mean()) for x in [*guider.seen, out]],
        "stds": [float(x.std()) for x in [*guider.seen, out]],
    }


def difference(host: Any, model_sampling: Any, gamma: float, theirs: Any, sigmas: Tensor) -> float:
    """Return the relative difference between our result and that of a sampler of the host."""
    options = {"latent": 0.5, "shape": (2, 4, 8, 8)}
    ours = run(host.tcd_sampler(gamma), Guider(model_sampling, smooth), sigmas, **options)
    expected = run(theirs, Guider(model_sampling, smooth), sigmas, **options)
    return float((ours - expected).norm() / expected.norm())


def lcm(host: Any) -> Any:
    """Return the host's sampler for multistep consistency; TCD at gamma = 1 equals it if s = 0 means sigma = 0."""
    draw = importlib.import_module("some_pack.tcd").seeded_noise(SEED)
    like = torch.empty(2, 4, 8, 8)
    return comfy.samplers.ksampler("lcm", {"noise_sampler": lambda sigma, sigma_next: draw(sigma_next, like)})


def measure(host: Any, model_sampling: Any) -> dict[str, Any]:
    sigmas = {steps: sigmas_of(host, model_sampling, steps) for steps in STEPS}
    found = grids(host, model_sampling)
    found["euler"] = [
        difference(host, model_sampling, 0.0, comfy.samplers.ksampler("euler"), each) for each in sigmas.values()
    ]
    if found["schedule"] == "BridgeSchedule":
        found["gamma"] = refusal(lambda: point_mass(host, model_sampling, 0.3, sigmas[2]))
        found["one step"] = float((run(host.tcd_sampler(0.3), Guider(model_sampling, point), sigmas[1]) - POINT).std())
        return found
    grid = {(gamma, steps): each for gamma in GAMMAS for steps, each in sigmas.items()}
    found["lcm"] = [difference(host, model_sampling, 1.0, lcm(host), each) for each in sigmas.values()]
    found["point mass"] = [point_mass(host, model_sampling, gamma, each) for (gamma, _), each in grid.items()]
    found["moments"] = [
        {"gamma": gamma} | moments(host, model_sampling, gamma, each) for (gamma, _), each in grid.items()
    ]
    return found


# Measurements of the sampler by itself


class Bare:
    """The model that a sampler function is called with: KSAMPLER's wrapper of a guider, which only forwards."""

    def __init__(self, guider: Guider) -> None:
        self.inner_model = guider

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        return self.inner_model(x, sigma, **options)


def half_precision(host: Any, model_sampling: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the dtype of the result for x in half precision, and the relative error against a run in float32."""
    sigmas, guider = sigmas_of(host, model_sampling), Guider(model_sampling, smooth)
    x = torch.ones(1, 4, 8, 8, dtype=dtype)
    half, single = (run(host.tcd_sampler(0.3), guider, sigmas, dtype=each).float() for each in (dtype, torch.float32))
    return {
        "dtype": str(host.sample_with_tcd(Bare(guider), x, sigmas, disable=True, gamma=0.3).dtype),
        "error": float((half - single).norm() / single.norm()),
    }


def details(host: Any, models: dict[str, Any]) -> dict[str, Any]:
    discrete = models["ModelType EPS"]
    sigmas = sigmas_of(host, discrete)
    sampler = host.tcd_sampler(0.3)
    steps: list[tuple[int, int]] = []
    run(sampler, Guider(discrete, point), sigmas, callback=lambda i, x0, x, total: steps.append((i, total)))
    torch.manual_seed(1)
    unseeded = [run(host.tcd_sampler(1.0), Guider(discrete, point), sigmas[:3], seed=None) for _ in range(2)]
    one = Guider(discrete, point)
    run(sampler, one, sigmas[:1])
    without_options = host.sample_with_tcd(
        Bare(Guider(discrete, point)), torch.ones(1, 4, 8, 8), sigmas, disable=True, gamma=0.3
    )
    return {
        "steps": steps,
        "unseeded_runs_differ": bool((unseeded[0] != unseeded[1]).any()),
        "half": {
            f"{name}, {dtype}": half_precision(host, models[name], dtype)
            for name in ("ModelType EPS", "ModelSamplingDiscrete v_prediction True", "ModelType FLOW")
            for dtype in (torch.float16, torch.bfloat16)
        },
        "calls_for_one_sigma": len(one.seen),
        "without_options": float((without_options - POINT).abs().max()),
    }


if __name__ == "__main__":
    host = load_host(sys.argv[1])
    with torch.inference_mode():
        models = models_of_the_host()
        measured = {name: measure(host, model_sampling) for name, model_sampling in models.items()}
        json.dump({"models": measured, "details": details(host, models)}, sys.stdout)
