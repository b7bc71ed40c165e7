"""Run by the host's interpreter, in the host's folder: samplers of several packs against the paper's equations.

Arguments: our pack's folder, the folder of the checkpoints, and a JSON object {peer: folder}. Every sampler gets the
same start and, for the noise it adds, the same z, so that nothing but its mathematics and its schedule is compared.
Prints JSON [[model, steps, gamma, "whole" or "split", {node: relative error, or what was raised}], ...].
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete  # noqa: E402
from torch import Tensor  # noqa: E402

torch.set_num_threads(1)
STEPS, GAMMAS, SIDE = (1, 4), (0.0, 0.3, 1.0), 16


class Plan(NamedTuple):
    """What a user wires into SamplerCustom: a model, a sampler and sigmas."""

    model: Any
    sampler: Any
    sigmas: Tensor


Node = Callable[[Any, int, float], Plan]


def load_pack(name: str, folder: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py", submodule_search_locations=[folder])
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def ours(folder: str) -> Node:
    load_pack("ours", folder)
    host = importlib.import_module("ours.nodes.host")
    return lambda model, steps, gamma: Plan(
        model, host.tcd_sampler(gamma), host.tcd_sigmas(model, steps=steps, denoise=1.0, timesteps="")
    )


def jetthu(folder: str) -> dict[str, Node]:
    node = load_pack("jetthu", folder).NODE_CLASS_MAPPINGS["TCDModelSamplingDiscrete"]()
    return {"JettHu": lambda model, steps, gamma: Plan(*node.patch(model, steps=steps, eta=gamma))}


def dfl(folder: str) -> dict[str, Node]:
    nodes = load_pack("dfl", folder).NODE_CLASS_MAPPINGS

    def node(name: str) -> Node:
        return lambda model, steps, gamma: Plan(
            model, nodes[name]().get_sampler(gamma)[0], nodes["TCDScheduler"]().get_sigmas(model, steps)[0]
        )

    return {"dfl SamplerTCD": node("SamplerTCD"), "dfl EulerA": node("SamplerTCD EulerA")}


def licyk(folder: str) -> dict[str, Node]:
    nodes = load_pack("licyk", folder).NODE_CLASS_MAPPINGS

    def node(name: str) -> Node:
        # Its samplers are names in the host's list, where gamma cannot be given: it is always 0.3.
        return lambda model, steps, gamma: Plan(
            model, comfy.samplers.ksampler(name), nodes["TCDScheduler"]().get_sigmas(model, steps)[0]
        )

    return {"licyk tcd": node("tcd"), "licyk tcd_euler_a": node("tcd_euler_a")}


def reference(z: Tensor, *, end_at_zero: bool) -> Node:
    """The equations of the paper in float64, written out: on the distillation grid, or on shifted flow time.

    end_at_zero: the last step ends at timestep 0, which has a little noise left, as in diffusers; else at x0.
    """

    def plan(model: Any, steps: int, gamma: float) -> Plan:
        sampling = model.get_model_object("model_sampling")
        flow = isinstance(sampling, comfy.model_sampling.CONST)
        if flow:
            times = [1 - i / steps for i in range(steps)]
            shift = sampling.shift
            times = [
                shift * u / (1 + (shift - 1) * u) for u in times
            ]  # of the flow, the clock the model was trained on
            table = {u: u for u in [*times, *((1 - gamma) * u for u in times)]}
        else:
            grid = list(range(999, 0, -20))
            times = [grid[i * 50 // steps] for i in range(steps)]
            table = dict(enumerate(sampling.sigmas.double().tolist()))
        levels = [_alpha_sigma(table[time], flow) for time in times]
        targets = [_alpha_sigma(table[(1 - gamma) * t if flow else int((1 - gamma) * t)], flow) for t in times]

        def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
            x = x.double()
            first = [float(sigma) for sigma in sigmas[:-1]]
            start = min(range(steps), key=lambda i: abs(table[times[i]] - first[0]))
            scale = 1.0 if flow else levels[start][0]
            x_t = x * scale
            for i in range(start, start + len(first)):
                (alpha, sigma), host_x = levels[i], x_t / (1.0 if flow else levels[i][0])
                ones = torch.ones(len(x))
                x0 = model(host_x.float(), table[times[i]] * ones, **(extra_args or {})).double()
                eps = (x_t - alpha * x0) / sigma
                if i == steps - 1:
                    alpha, sigma = _alpha_sigma(table[0], flow) if end_at_zero else (1.0, 0.0)
                    return (alpha * x0 + sigma * eps).float()
                (alpha_s, sigma_s), (alpha_n, sigma_n) = targets[i + 1], levels[i + 1]
                x_s = alpha_s * x0 + sigma_s * eps
                a = alpha_n / alpha_s
                x_t = a * x_s + max(sigma_n**2 - (a * sigma_s) ** 2, 0.0) ** 0.5 * z.double()
            return (x_t / (1.0 if flow else levels[start + len(first)][0])).float()

        sigmas = torch.tensor([table[time] for time in times] + [0.0])
        return Plan(model, comfy.samplers.KSAMPLER(sample), sigmas)

    return plan


def _alpha_sigma(sigma: float, flow: bool) -> tuple[float, float]:
    """A level in the scale of the paper: of a flow, or variance preserving."""
    if flow:
        return 1 - sigma, sigma
    norm = (1 + sigma**2) ** 0.5
    return 1 / norm, sigma / norm


def models(folder: str) -> dict[str, tuple[Any, int, Any]]:
    """Models by name, with the channels of their latents and their conditioning."""
    generator = torch.Generator().manual_seed(3)

    def load(name: str) -> Any:
        return comfy.sd.load_checkpoint_guess_config(f"{folder}/{name}", output_vae=False, output_clip=False)[0]

    text = [[torch.randn(1, 77, 768, generator=generator), {}]]
    long = [[torch.randn(1, 77, 4096, generator=generator), {"pooled_output": torch.randn(1, 2048)}]]
    sd15 = load("sd15.safetensors")
    advanced = ModelSamplingDiscrete()
    return {
        "SD1.5 eps": (sd15, 4, text),
        "SD1.5 v": (advanced.patch(sd15, "v_prediction", False)[0], 4, text),
        "SD1.5 v, zero SNR": (advanced.patch(sd15, "v_prediction", True)[0], 4, text),
        "SD3": (load("sd3.safetensors"), 16, long),
    }


def sample(plan: Plan, noise: Tensor, cond: Any, *, split: bool) -> Tensor:
    """Run a plan in the host, whole or in two halves, the second of which starts from what the first left."""
    latent = torch.zeros_like(noise)
    middle = len(plan.sigmas) // 2
    for part in (plan.sigmas[: middle + 1], plan.sigmas[middle:]) if split else (plan.sigmas,):
        latent = comfy.sample.sample_custom(
            plan.model, noise, 1.0, plan.sampler, part, cond, cond, latent, seed=1, disable_pbar=True
        )
        noise = torch.zeros_like(noise)
    return latent


def row(nodes: dict[str, Node], model: Any, channels: int, cond: Any, case: tuple[int, float, bool]) -> dict[str, Any]:
    """Compare all nodes in one case: steps, gamma, and whether the run is split."""
    steps, gamma, split = case
    noise, z = (torch.randn(1, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    expected = [
        sample(reference(z, end_at_zero=end)(model, steps, gamma), noise, cond, split=split).double()
        for end in ((False,) if flow else (False, True))
    ]
    found: dict[str, Any] = {}
    with (
        mock.patch("torch.randn", lambda *_, **__: z.clone()),
        mock.patch("torch.randn_like", lambda *_, **__: z.clone()),
        mock.patch("ours.nodes.host.sampling.seeded_noise", lambda *_, **__: lambda sigma_next, like: z.to(like)),
    ):
        for name, node in nodes.items():
            try:
                latent = sample(node(model, steps, gamma), noise, cond, split=split).double()
            except Exception as error:  # noqa: BLE001  (what a user of that pack would be shown)
                found[name] = f"{type(error).__name__}: {error}"
            else:
                found[name] = min(float((latent - each).norm() / each.norm()) for each in expected)
    return found


def main(pack: str, folder: str, peers: dict[str, str]) -> None:
    nodes = {"ours": ours(pack)}
    for peer, place in peers.items():
        nodes |= {"JettHu": jetthu, "dfl": dfl, "licyk": licyk}[peer](place)
    with torch.inference_mode():
        rows = [
            [
                name,
                steps,
                gamma,
                "split" if split else "whole",
                row(nodes, model, channels, cond, (steps, gamma, split)),
            ]
            for name, (model, channels, cond) in models(folder).items()
            for steps in STEPS
            for gamma in GAMMAS
            for split in ((False, True) if steps > 1 else (False,))
        ]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
