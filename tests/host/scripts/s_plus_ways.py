"""Samples stand-ins with an S+ LoRA in the ways that may change which (t, s) a row gets, or which layer is patched.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder and a folder for files. Prints what was
measured, by way and family.
"""

from sampled import (
    SEED,
    ByHand,
    apply,
    host,
    logged,
    noise_for,
    random_embedding,
    random_lora,
    random_s_plus,
    relative_error,
    sample,
    sigmas_for,
    write_lora,
    written,
)

# isort: split
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import comfy.context_windows
import comfy.hooks
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP, copy_nested_dicts
from comfy_api.torch_helpers import set_torch_compile_wrapper
from families import FAMILIES
from torch import Tensor

TargetTime = importlib.import_module("some_pack.tcd.target_time").TargetTime


def told(name: str) -> tuple[Any, Any, Any, str]:
    """Return a family, its plain model, the model with an S+ LoRA, and the LoRA's file."""
    family = FAMILIES[name]
    plain = family.load(written(name))
    lora, embedding = random_s_plus(family, plain.model.diffusion_model)
    file = write_lora(f"{name}.safetensors", lora, embedding, **{"tcd.target_time": "s"})
    return family, plain, apply(plain, file), file


def another_sampler(name: str) -> dict[str, Any]:
    """Euler against the TCD sampler without noise; and the times for sigmas that are rounded differently."""
    family, _, model, _ = told(name)
    sigmas = sigmas_for(model, 4)
    sampler = comfy.samplers.sampler_object("euler")
    (euler, _), messages = logged(lambda: [sample(model, family, sigmas, sampler=sampler) for _ in range(2)])
    return {
        "euler": relative_error(euler, sample(model, family, sigmas, gamma=0.0)),
        "warnings": messages,
        "handed": _times(model, family, sigmas, None),
        "above": _times(model, family, sigmas, lambda sigma: sigma * (1 + 3e-6)),
        "below": _times(model, family, sigmas, lambda sigma: sigma * (1 - 3e-6)),
        "half": _times(model, family, sigmas, Tensor.half),
        "bfloat16": _times(model, family, sigmas, Tensor.bfloat16),
    }


def _times(model: Any, family: Any, sigmas: Tensor, rounded: Any) -> list[float]:
    """Return the target times that the embedding gets; rounded: what another sampler does to its sigmas."""

    def steps(network: Any, x: Tensor, sigmas: Tensor, extra_args: Any, **_: Any) -> Tensor:
        for sigma in sigmas[:-1]:
            network(x, rounded(sigma * torch.ones(len(x))), **extra_args)
        return x

    forward, seen = TargetTime.forward, []
    TargetTime.forward = lambda self, t, s: seen.append(float(s)) or forward(self, t, s)
    try:
        sample(model, family, sigmas, gamma=0.0, sampler=rounded and comfy.samplers.KSAMPLER(steps))
    finally:
        TargetTime.forward = forward
    return seen


def context_windows(name: str) -> dict[str, Any]:
    """Windows over the batch: its items do not depend on each other, so the result is that of the whole batch."""
    family, _, model, _ = told(name)
    sigmas, errors = sigmas_for(model, 2), {}
    for batch, length, cfg in ((2, 1, 1.0), (2, 1, 2.0), (3, 2, 1.0), (3, 2, 2.0)):
        windowed = model.clone()
        windowed.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
            context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
            context_length=length,
            context_overlap=0,
            dim=0,
        )
        rows: set[int] = set()
        windowed.add_wrapper_with_key(
            WrappersMP.APPLY_MODEL,
            "rows",
            lambda executor, x, *args, rows=rows, **kw: rows.add(len(x)) or executor(x, *args, **kw),
        )
        found, whole = (
            sample(each, family, sigmas, cfg=cfg, latent=torch.zeros(batch, *family.latent))
            for each in (windowed, model)
        )
        errors[f"{batch} {length} {cfg}"] = relative_error(found, whole), sorted(rows)
    return errors


def split(name: str) -> float:
    """Two halves of a schedule against the whole."""
    family, _, model, _ = told(name)
    sigmas = sigmas_for(model, 4)
    half = sample(model, family, sigmas[:3])
    nothing = torch.zeros_like(noise_for(family))
    return relative_error(sample(model, family, sigmas[2:], latent=half, noise=nothing), sample(model, family, sigmas))


def copies(name: str) -> dict[str, bool]:
    """A copy for another GPU, and two copies at once in two threads, each with times of its own."""
    family, plain, model, _ = told(name)
    sigmas = sigmas_for(model, 2)
    first = sample(model, family, sigmas)
    copy = model.deepclone_multigpu(new_load_device=torch.device("cpu"))
    same = torch.equal(sample(copy, family, sigmas), first)
    comfy.model_management.load_models_gpu([model, copy])
    hand = ByHand(family, written(name))
    conditions, x = hand._conditions(1, noise_for(family)), noise_for(family)

    def calls(patcher: Any, s: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            options = {"wrappers": copy_nested_dicts(patcher.wrappers), "tcd_target_time": (torch.tensor(900.0), s)}
            return [
                patcher.model.apply_model(x, 0.9 * torch.ones(2), **conditions, transformer_options=options)
                for _ in range(8)
            ]

    work = [(model, torch.tensor(700.0)), (copy, torch.tensor(100.0))]
    alone = [calls(*each)[0] for each in work]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda each: calls(*each), work))
    return {
        "multi-GPU clone equal": same,
        "its network is another": copy.model is not model.model,
        "times differ": not torch.equal(*alone),
        "threads equal": all(torch.equal(y, one) for ys, one in zip(together, alone, strict=True) for y in ys),
    }


def other_packs(name: str) -> dict[str, Any]:
    """What else may be on the same layer or around the same call."""
    family, plain, model, file = told(name)
    sigmas = sigmas_for(model, 2)
    alone, before = sample(model, family, sigmas), sample(plain, family, sigmas)
    layer = plain.model.diffusion_model.get_submodule(family.time_linear)
    second = random_lora(plain.model.diffusion_model, seed=5)
    patched, bypass = (
        sample(way(model, None, dict(second), 1.0, 0)[0], family, sigmas)
        for way in (comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models)
    )
    wrapped = model.clone()
    wrapped.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "another pack", lambda executor, *args, **kw: executor(*args, **kw)
    )
    wrapped.set_model_unet_function_wrapper(lambda call, args: call(args["input"], args["timestep"], **args["c"]))
    replaced = plain.clone()
    replaced.add_object_patch(
        f"diffusion_model.{family.time_linear}.forward", lambda x: type(layer).forward(layer, x) + 1
    )
    hook = layer.register_forward_hook(lambda *args: args[-1] + 1)
    plus_one = sample(model, family, sigmas)
    hook.remove()
    hooked = family.conditioning(1)
    hooked[0][1]["hooks"] = _hooks()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    with_hooks = comfy.sample.sample_custom(
        model,
        noise_for(family),
        1.0,
        host.tcd_sampler(0.3),
        sigmas,
        hooked,
        family.conditioning(2),
        torch.zeros(2, *family.latent),
        disable_pbar=True,
        seed=SEED,
    )
    return {
        "bypass": relative_error(bypass, patched),
        "bypass matters": relative_error(bypass, alone),
        "wrappers": torch.equal(sample(wrapped, family, sigmas), alone),
        "a replaced forward": relative_error(sample(apply(replaced, file), family, sigmas), plus_one),
        "which matters": relative_error(plus_one, alone),
        "hooks of the conditioning": relative_error(with_hooks, alone),
        "compiled": relative_error(
            sample(compiled, family, sigmas_for(model, 4)), sample(model, family, sigmas_for(model, 4))
        ),
        "plain equal": torch.equal(sample(plain, family, sigmas), before),
    }


def _hooks() -> Any:
    group = comfy.hooks.HookGroup()
    wrapper = {WrappersMP.APPLY_MODEL: {"hook": [lambda executor, *args, **kw: executor(*args, **kw)]}}
    group.add(comfy.hooks.TransformerOptionsHook({"wrappers": wrapper}))
    return group


def places(name: str) -> dict[str, Any]:
    """Files that name the layer for the embedding, and files that do not fit."""
    family, plain, _, file = told(name)
    network, sigmas = plain.model.diffusion_model, sigmas_for(plain, 2)
    other = replace(family, time_linear="y_embedder.mlp.2")
    lora, width = random_lora(network), network.get_submodule(other.time_linear).out_features
    embedding = random_embedding(width)
    hand = ByHand(other, written(name), lora, embedding).sample(sigmas, gamma=0.3, cfg=1.0)
    named = {"tcd.target_time.module": other.time_linear}
    found = sample(apply(plain, write_lora("named.safetensors", lora, embedding, **named)), family, sigmas)
    wrong = {
        "width": (random_embedding(width + 2), {}),
        "no such layer": (embedding, {"tcd.target_time.module": "time_embed.2"}),
        "no Linear": (embedding, {"tcd.target_time.module": "t_embedder"}),
        "the network": (embedding, {"tcd.target_time.module": ""}),
    }
    refusals = {
        reason: refusal(plain, write_lora("wrong.safetensors", lora, each, **metadata))
        for reason, (each, metadata) in wrong.items()
    }
    bridge = plain.clone()
    bridge.add_object_patch("model_sampling", type("Bridge", (comfy.model_sampling.IMG_TO_IMG_FLOW, Flow), {})())
    refusals["knows no noise"] = refusal(bridge, file)
    module = importlib.import_module("some_pack.nodes.host.target_time")
    find, module.find_time_linear = module.find_time_linear, lambda _: None
    refusals["unknown network"] = refusal(plain, file)
    module.find_time_linear = find
    called = called_directly(apply(plain, file), network.get_submodule(family.time_linear))
    return {"named": relative_error(found, hand), "refusals": refusals, "called directly": called}


class Flow(torch.nn.Module):
    """The noise levels of a model that turns one picture into another."""

    sigmas = torch.linspace(0.001, 1, 1000)
    num_timesteps = 1000


def called_directly(model: Any, layer: Any) -> str:
    """A layer that is called outside apply_model cannot know (t, s)."""
    comfy.model_management.load_models_gpu([model])
    try:
        layer(torch.zeros(1, layer.in_features))
    except RuntimeError as error:
        return str(error)
    return "nothing was refused"


def refusal(model: Any, file: str) -> str:
    try:
        apply(model, file)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def continuous(name: str) -> dict[str, list[float]]:
    """The times of a model whose sampling has neither timesteps nor a flow, in the TCD sampler and in another."""
    family, plain, _, file = told(name)
    model = plain.clone()
    edm = type("EDM", (comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EPS), {})
    model.add_object_patch("model_sampling", edm(model.model.model_config))
    model = apply(model, file)
    sigmas = sigmas_for(model, 4)
    return {
        "sigmas": sigmas.tolist(),
        "handed": _times(model, family, sigmas, None),
        "another": _times(model, family, sigmas, lambda sigma: sigma),
    }


def time_per_frame() -> float:
    """Wan with a time for each frame, as its 5B model has, against one time for all."""
    family, _, model, _ = told("wan")
    sigmas = sigmas_for(model, 2)
    frames = model.clone()

    def per_frame(executor: Any, x: Tensor, t: Tensor, *args: Any, **kw: Any) -> Tensor:
        return executor(x, t[:, None].expand(-1, x.shape[2]), *args, **kw)

    frames.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "per frame", per_frame)
    return relative_error(sample(frames, family, sigmas), sample(model, family, sigmas))


with torch.inference_mode():
    json.dump(
        {
            "another sampler": {name: another_sampler(name) for name in ("sd15", "sd3")},
            "context windows": {name: context_windows(name) for name in ("sd15", "sd3")},
            "split": {name: split(name) for name in ("sd15", "flux")},
            "copies": copies("sd3"),
            "other packs": other_packs("sd3"),
            "a time per frame": time_per_frame(),
            "places": places("sd3"),
            "continuous": continuous("sd15"),
        },
        sys.stdout,
    )
