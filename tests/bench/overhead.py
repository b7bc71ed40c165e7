"""Run by the host's interpreter, in the host's folder: what a sampler costs beside the model, in CPU time.

Argument: the pack's folder. The model is a no-op, the latent that of SD 1.5 at 512 x 512. Prints a JSON object of
{sampler: microseconds a step}, the samplers taken in turns so that whatever else the machine does meets all alike.
"""

import importlib.util
import json
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.model_sampling as ms  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
STEPS, ROUNDS, SEED = 20, 60, 1


class NoOp:
    """What KSAMPLER is given: a guider around a model that says at once that the clean latent is 0."""

    def __init__(self) -> None:
        model_sampling = type("ModelSampling", (ms.ModelSamplingDiscrete, ms.EPS), {})()
        self.inner_model = SimpleNamespace(model_sampling=model_sampling, scale_latent_inpaint=None)
        self.model_patcher = SimpleNamespace(get_model_object=lambda _: model_sampling, model=SimpleNamespace())
        self.cfg = 1.0
        self.x0 = torch.zeros(1, 4, 64, 64)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.x0


def main(pack: str) -> None:
    spec = importlib.util.spec_from_file_location("some_pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
    assert spec and spec.loader
    sys.modules["some_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["some_pack"])
    host = importlib.import_module("some_pack.nodes.host")

    model = NoOp()
    timesteps = torch.linspace(999, 19, STEPS).long()
    sigmas = torch.cat([model.inner_model.model_sampling.sigmas[timesteps], torch.zeros(1)])
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(SEED))  # as the host draws it
    samplers = {"tcd": host.tcd_sampler(0.3)}
    samplers |= {name: comfy.samplers.ksampler(name) for name in ("lcm", "euler_ancestral", "euler")}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, sampler in samplers.items():
                start = time.process_time()
                options = {"model_options": {}, "seed": SEED}
                sampler.sample(
                    model, sigmas, options, lambda *_: None, noise, torch.zeros_like(noise), disable_pbar=True
                )
                times[name].append(time.process_time() - start)
    json.dump({name: statistics.median(taken) / STEPS * 1e6 for name, taken in times.items()}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
