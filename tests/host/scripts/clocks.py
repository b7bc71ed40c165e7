"""Run by the host's interpreter, in the host's folder: nodes/host.py against every kind of model that the host has.

Argument: the pack's folder. Prints a JSON object of measurements. The models are of classes of the host's own, their
networks analytic, and the sampler runs inside the host's own KSAMPLER.
"""

import importlib.util
import json
import sys
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.model_sampling as ms  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_model_advanced import LCM, ModelSamplingDiscreteDistilled  # noqa: E402

torch.set_num_threads(1)
GAMMAS = (0.0, 0.3, 1.0)


def model(clock: type, prediction: type, prepare: Any = None, **settings: Any) -> Any:
    """Return a model_sampling as the host puts one together, from a clock and a prediction."""
    kind = type("ModelSampling", (clock, prediction), {})
    built = kind(**settings)
    if prepare:
        prepare(built)
    return built


MODELS = {
    "discrete eps": model(ms.ModelSamplingDiscrete, ms.EPS),
    "discrete v, zero snr": model(ms.ModelSamplingDiscrete, ms.V_PREDICTION, zsnr=True),
    "discrete lcm": model(ModelSamplingDiscreteDistilled, LCM),
    "cascade": model(ms.StableCascadeSampling, ms.EPS),
    "edm": model(ms.ModelSamplingContinuousEDM, ms.EDM),
    "continuous v": model(ms.ModelSamplingContinuousV, ms.V_PREDICTION),
    "cosmos": model(ms.ModelSamplingCosmosRFlow, ms.COSMOS_RFLOW),
    "flow": model(ms.ModelSamplingDiscreteFlow, ms.CONST, lambda m: m.set_parameters(shift=3.0)),
    "flux": model(ms.ModelSamplingFlux, ms.CONST),
}
if hasattr(ms.ModelSamplingDiscreteFlow, "set_noise_scale"):
    MODELS["flow, noise scale 2"] = model(ms.ModelSamplingDiscreteFlow, ms.CONST, lambda m: m.set_noise_scale(2.0))


class Guider:
    """What KSAMPLER is given: a guider around a model that is sure the clean latent is `x0` everywhere."""

    def __init__(self, model_sampling: Any, x0: float) -> None:
        self.inner_model = SimpleNamespace(model_sampling=model_sampling, scale_latent_inpaint=None)
        self.model_patcher = SimpleNamespace(get_model_object=lambda _: model_sampling, model=SimpleNamespace())
        self.cfg = 1.0
        self.x0 = x0
        self.seen: list[float] = []  # how far x was from x0 at each call, per sigma of noise

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        assert sigma.shape == (len(x),), "one sigma an image"
        model_sampling = self.inner_model.model_sampling
        is_flow = isinstance(model_sampling, ms.CONST)
        alpha = 1 - sigma[0] if is_flow else 1.0
        scale = getattr(model_sampling, "noise_scale", 1.0)
        self.seen.append(float((x - alpha * self.x0).std() / (sigma[0] * scale)))
        return torch.full_like(x, self.x0)


def sigmas_of(model_sampling: Any) -> torch.Tensor:
    if isinstance(model_sampling, ms.CONST):
        return torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    low, high = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
    inner = torch.linspace(high, low, 6)[1:4]
    return torch.cat([torch.tensor([high]), inner, torch.zeros(1)])


def run(host: Any, model_sampling: Any, gamma: float, sigmas: torch.Tensor, **options: Any) -> dict[str, Any]:
    guider = Guider(model_sampling, x0=0.75)
    options = {"seed": 3, "callback": None, "dtype": torch.float32} | options
    noise = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=options["dtype"])
    out = host.tcd_sampler(gamma).sample(
        guider,
        sigmas,
        {"model_options": {}, "seed": options["seed"]},
        options["callback"],
        noise,
        torch.zeros_like(noise),
        disable_pbar=True,
    )
    return {"out": out, "seen": guider.seen}


def walls(host: Any) -> dict[str, Any]:
    """Each model, at each gamma: how wrong the result is, and how noisy x was at each call."""
    found = {}
    for name, model_sampling in MODELS.items():
        runs = {str(gamma): run(host, model_sampling, gamma, sigmas_of(model_sampling)) for gamma in GAMMAS}
        found[name] = {
            "schedule": type(host.schedule_of(model_sampling)).__name__,
            "error": {gamma: float((r["out"] - 0.75).abs().max()) for gamma, r in runs.items()},
            "seen": {gamma: r["seen"] for gamma, r in runs.items()},
        }
    return found


def targets(host: Any) -> dict[str, list[float]]:
    """Strategic targets of the model that knows 50 timesteps, and of the same model with all 1000."""
    full, sparse = MODELS["discrete eps"], MODELS["discrete lcm"]
    t_next = (759, 499, 259)
    return {
        name: [float(host.schedule_of(clock).target(full.sigmas[t], gamma)) for gamma in GAMMAS for t in t_next]
        for name, clock in (("full", full), ("sparse", sparse))
    }


class Bare:
    """What a sampler function is given: KSAMPLER's wrapping of a guider, which passes its arguments on."""

    def __init__(self, guider: Guider) -> None:
        self.inner_model = guider

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.inner_model(x, sigma, **options)


def bare_call(host: Any) -> torch.Tensor:
    """Call the sampler function as anyone may: with neither extra_args nor a callback."""
    discrete = MODELS["discrete eps"]
    return host.sample_with_tcd(
        Bare(Guider(discrete, x0=0.75)), torch.ones(1, 4, 8, 8), sigmas_of(discrete), disable=True, gamma=0.3
    )


def details(host: Any) -> dict[str, Any]:
    discrete = MODELS["discrete eps"]
    sigmas = sigmas_of(discrete)
    steps: list[tuple[int, int]] = []
    run(host, discrete, 0.3, sigmas, callback=lambda i, x0, x, total: steps.append((i, total)))
    torch.manual_seed(1)
    unseeded = [run(host, discrete, 1.0, sigmas[:3], seed=None)["out"] for _ in range(2)]
    half = run(host, discrete, 0.3, sigmas, dtype=torch.float16)["out"]
    one = run(host, discrete, 0.3, sigmas[:1])
    return {
        "steps": steps,
        "unseeded_runs_differ": bool((unseeded[0] != unseeded[1]).any()),
        "half": [str(half.dtype), bool(half.isfinite().all())],
        "calls_for_one_sigma": len(one["seen"]),
        "called_barely": float((bare_call(host) - 0.75).abs().max()),
    }


def load_host(pack: str) -> Any:
    """Import nodes/host.py as part of a package of another name than the folder's, as the host does."""
    spec = importlib.util.spec_from_file_location("some_pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
    assert spec and spec.loader
    sys.modules["some_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["some_pack"])
    return importlib.import_module("some_pack.nodes.host")


if __name__ == "__main__":
    host = load_host(sys.argv[1])
    with torch.inference_mode():
        json.dump({"walls": walls(host), "targets": targets(host), "details": details(host)}, sys.stdout)
