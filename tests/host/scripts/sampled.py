"""Stand-ins of families.py with a random S+ LoRA, sampled by the host, and computed by hand for comparison.

By hand: the network is loaded a second time, the LoRA is added to its weights or beside them by a plain hook, the
embedding of the target time by another one, and docs/math.md is written out in float64.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, ".")
import comfy.cli_args

comfy.cli_args.args.cpu = True
import comfy.model_sampling  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import families  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from families import Family  # noqa: E402
from load_pack import load_host  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

SEED, RANK, ALPHA, CHANNELS = 7, 4, 2.0, 64
PREFIX = "diffusion_model."

FOLDER = Path(sys.argv[2])
MODELS = FOLDER / "models"
MODELS.mkdir(exist_ok=True)
torch.set_num_threads(1)
folder_paths.folder_names_and_paths["loras"] = ([str(FOLDER)], {".safetensors"})
folder_paths.get_filename_list = lambda _: sorted(path.name for path in FOLDER.glob("*.safetensors"))
host = load_host(sys.argv[1])
seeded_noise = importlib.import_module("some_pack.tcd.sampling").seeded_noise


def written(name: str) -> Path:
    """Return the file of a family's stand-in; it is written on the first call."""
    return families.written(name, MODELS)


def random_lora(network: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return a LoRA on every Linear and convolution, in the host's own names, that changes the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for path, layer in network.named_modules():
        if hasattr(layer, "in_features") or hasattr(layer, "stride"):
            out, into, *kernel = layer.weight.shape
            down = torch.randn(RANK, into, *kernel, generator=generator) * math.prod([into, *kernel]) ** -0.5
            lora[f"{PREFIX}{path}.lora_down.weight"] = down
            lora[f"{PREFIX}{path}.lora_up.weight"] = (
                torch.randn(out, RANK, *(1 for _ in kernel), generator=generator) * 0.2
            )
            lora[f"{PREFIX}{path}.alpha"] = torch.tensor(ALPHA)
    return lora


def random_embedding(width: int, seed: int = 0) -> dict[str, Tensor]:
    """Return the tensors of an embedding, without the prefix."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"in.weight": (width, CHANNELS), "in.bias": (width,), "out.weight": (width, width), "out.bias": (width,)}
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def random_s_plus(family: Family, network: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a LoRA and an embedding for a network of the family."""
    return random_lora(network), random_embedding(network.get_submodule(family.time_linear).out_features)


def write_lora(name: str, lora: dict[str, Tensor], embedding: dict[str, Tensor] | None = None, **metadata: str) -> str:
    """Write a file to the host's folder of LoRAs, and return its name there."""
    tensors = lora | {f"tcd_target_time.{key}": tensor for key, tensor in (embedding or {}).items()}
    save_file(tensors, FOLDER / name, metadata=metadata)
    return name


def apply(model: Any, name: str, strength: float = 1.0) -> Any:
    """Apply a file as the node does."""
    return host.apply_lora(model, host.read_lora(name), strength)


def logged(act: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what a call returns, and the messages that the pack logs meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("trajectory-consistency")
    log.addHandler(handler)
    try:
        return act(), messages
    finally:
        log.removeHandler(handler)


def noise_for(family: Family, batch: int = 2) -> Tensor:
    return comfy.sample.prepare_noise(torch.zeros(batch, *family.latent), SEED)


def sigmas_for(model: Any, steps: int, denoise: float = 1.0) -> Tensor:
    return host.tcd_sigmas(model, steps=steps, denoise=denoise, timesteps="")


def sample(
    model: Any,
    family: Family,
    sigmas: Tensor,
    *,
    cfg: float = 1.0,
    gamma: float = 0.3,
    sampler: Any = None,
    noise: Tensor | None = None,
    latent: Tensor | None = None,
) -> Tensor:
    """Sample by the host; by default with the TCD sampler, two latents from pure noise."""
    latent = torch.zeros(2, *family.latent) if latent is None else latent
    return comfy.sample.sample_custom(
        model,
        noise_for(family, len(latent)) if noise is None else noise,
        cfg,
        sampler or host.tcd_sampler(gamma),
        sigmas,
        family.conditioning(1),
        family.conditioning(2),
        latent,
        disable_pbar=True,
        seed=SEED,
    )


class ByHand:
    """A stand-in with a LoRA and an embedding, without the pack. The LoRA is merged, or added beside the weights."""

    def __init__(
        self,
        family: Family,
        path: Path,
        lora: dict[str, Tensor] | None = None,
        embedding: dict[str, Tensor] | None = None,
        *,
        beside: bool = False,
        **options: Any,
    ) -> None:
        patcher = family.load(path, **options)
        comfy.model_management.load_models_gpu([patcher])
        self.patcher, self.family, self.model = patcher, family, patcher.model
        network = self.model.diffusion_model
        for layer, down, up in _products(network, lora or {}):
            if beside:
                layer.register_forward_hook(
                    lambda layer, args, y, down=down, up=up: y + ALPHA / RANK * _term(layer, args[0], down, up)
                )
            else:
                product = (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)
                layer.weight.data = layer.weight + ALPHA / RANK * product
        self.times: tuple[float, float] | None = None
        if embedding is not None:
            network.get_submodule(family.time_linear).register_forward_hook(
                lambda _, args, y: y if self.times is None else y + embed(embedding, self.times[1]).to(y)
            )

    def sample(self, sigmas: Tensor, *, cfg: float, gamma: float, latent: Tensor | None = None) -> Tensor:
        """Sample by strategic stochastic sampling."""
        sampling, noise = self.model.model_sampling, noise_for(self.family).double()
        is_flow = isinstance(sampling, comfy.model_sampling.CONST)
        z, sigma = seeded_noise(SEED), sigmas.double()
        if latent is None:
            x = sigma[0] * noise if is_flow else (1 + sigma[0] ** 2).sqrt() * noise
        else:
            x = self.model.process_latent_in(latent).double() * (1 - sigma[0] if is_flow else 1) + sigma[0] * noise
        for i in range(len(sigmas) - 1):
            t, s, sigma_s = self._times(sigma[i], sigma[i + 1], gamma, is_flow)
            x0 = self._x0(x, sigmas[i], (t, s), cfg)
            a, a_s, a_next = (1 - level if is_flow else 1.0 for level in (sigma[i], sigma_s, sigma[i + 1]))
            eps = (x - a * x0) / sigma[i]
            x = a_s * x0 + sigma_s * eps
            fresh = sigma[i + 1] ** 2 - (a_next / a_s * sigma_s) ** 2 if sigma_s < sigma[i + 1] else torch.zeros(())
            x = a_next / a_s * x + fresh.sqrt() * z(sigmas[i + 1], x)
        return self.model.process_latent_out(x.float())

    def _times(self, sigma: Tensor, sigma_next: Tensor, gamma: float, is_flow: bool) -> tuple[float, float, Tensor]:
        """Return the times of t and s that the network gets, and the sigma of s."""
        if is_flow:
            return 1000 * sigma.item(), 1000 * (1 - gamma) * sigma_next.item(), (1 - gamma) * sigma_next
        table = self.model.model_sampling.sigmas.double()
        t, t_next = (int((table - level).abs().argmin()) for level in (sigma, sigma_next))
        s = math.floor((1 - gamma) * t_next)
        return float(t), float(s), sigma_next if gamma == 0 or sigma_next == 0 else table[s]

    def _x0(self, x: Tensor, sigma: Tensor, times: tuple[float, float], cfg: float) -> Tensor:
        self.times = times
        conditional, *unconditional = (
            self.model.apply_model(x.float(), sigma.expand(len(x)).float(), **self._conditions(seed, x)).double()
            for seed in ((1,) if cfg == 1 else (1, 2))
        )
        return unconditional[0] + cfg * (conditional - unconditional[0]) if unconditional else conditional

    def _conditions(self, seed: int, x: Tensor) -> dict[str, Any]:
        conditions = comfy.sampler_helpers.convert_cond(self.family.conditioning(seed))
        encoded = comfy.samplers.encode_model_conds(self.model.extra_conds, conditions, x.float(), x.device, "positive")
        rows = encoded[0]["model_conds"].items()
        return {name: cond.process_cond(batch_size=len(x), area=None).cond for name, cond in rows}


def embed(embedding: dict[str, Tensor], time: float) -> Tensor:
    """Return out(SiLU(in(sinusoid(time)))), [width], float64."""
    state = {name: tensor.double() for name, tensor in embedding.items()}
    half = CHANNELS // 2
    angles = time * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    hidden = state["in.weight"] @ torch.cat([angles.cos(), angles.sin()]) + state["in.bias"]
    return state["out.weight"] @ functional.silu(hidden) + state["out.bias"]


def _term(layer: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return up(down(x)) in the dtype of x."""
    down, up = down.to(x), up.to(x)
    if down.ndim == 2:
        return x @ down.T @ up.T
    convolve = functional.conv2d if down.ndim == 4 else functional.conv3d
    return convolve(convolve(x, down, stride=layer.stride, padding=layer.padding), up)


def _products(network: Any, lora: dict[str, Tensor]) -> list[tuple[Any, Tensor, Tensor]]:
    """Return (layer, down, up) of each module of a LoRA."""
    paths = [name.removesuffix(".alpha").removeprefix(PREFIX) for name in lora if name.endswith(".alpha")]
    return [
        (network.get_submodule(path), *(lora[f"{PREFIX}{path}.lora_{side}.weight"] for side in ("down", "up")))
        for path in paths
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
