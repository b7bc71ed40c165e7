"""Prompts for the host in its API format, and their results."""

import uuid
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer

MINI = "mini-sd15.safetensors"
LATENT_SCALE = 0.18215  # of SD 1.5; the host divides a sampler's output by it


class Node(NamedTuple):
    """A node of a graph; node[i] is a link to its output i."""

    id: str

    def __getitem__(self, output: int) -> list[Any]:  # type: ignore[override]
        return [self.id, output]


class Graph(dict[str, dict[str, Any]]):
    """A prompt under construction, for images of size x size pixels."""

    def __init__(self, *, size: int = 64) -> None:
        super().__init__()
        self._size = size

    def add(self, class_type: str, **inputs: Any) -> Node:
        node = Node(str(len(self) + 1))
        self[node.id] = {"class_type": class_type, "inputs": inputs}
        return node

    def checkpoint(self, name: str = MINI) -> Node:
        return self.add("CheckpointLoaderSimple", ckpt_name=name)

    def condition(self, seed: int = 0, **shape: int) -> Node:
        return self.add("TestConditioning", seed=seed, salt=salt(), **shape)

    def empty(self, batch: int = 1) -> list[Any]:
        """An empty LATENT."""
        return self.add("EmptyLatentImage", width=self._size, height=self._size, batch_size=batch)[0]

    def sigmas(self, model: list[Any], *, steps: Any = 4, denoise: Any = 1.0, timesteps: str = "") -> Node:
        return self.add("TCDSigmas", model=model, steps=steps, denoise=denoise, timesteps=timesteps)

    def sampler_custom(
        self,
        *,
        model: list[Any] | None = None,
        eta: Any = 0.3,
        sigmas: list[Any] | None = None,
        seed: int = 0,
        batch: int = 1,
        latent: list[Any] | None = None,
        **others: Any,
    ) -> Node:
        """Add SamplerCustom with TCDSampler; by default 4 steps from TCDSigmas on an empty 8 x 8 latent."""
        model = model or self.checkpoint()[0]
        inputs = {
            "model": model,
            "add_noise": True,
            "noise_seed": seed,
            "cfg": 1.0,
            "positive": self.condition(0)[0],
            "negative": self.condition(1)[0],
            "sampler": self.add("TCDSampler", eta=eta)[0],
            "sigmas": sigmas or self.sigmas(model)[0],
            "latent_image": latent or self.empty(batch),
        }
        return self.add("SamplerCustom", **inputs | others)

    def ksampler(
        self,
        *,
        model: list[Any] | None = None,
        sampler_name: str = "tcd",
        scheduler: str = "tcd",
        steps: int = 4,
        seed: int = 0,
        latent: list[Any] | None = None,
        **others: Any,
    ) -> Node:
        """Add KSampler with sampler and scheduler tcd, and the same inputs as sampler_custom."""
        inputs = {
            "model": model or self.checkpoint()[0],
            "seed": seed,
            "steps": steps,
            "cfg": 1.0,
            "sampler_name": sampler_name,
            "scheduler": scheduler,
            "positive": self.condition(0)[0],
            "negative": self.condition(1)[0],
            "latent_image": latent or self.empty(),
            "denoise": 1.0,
        }
        return self.add("KSampler", **inputs | others)

    def ksampler_advanced(
        self,
        *,
        model: list[Any] | None = None,
        steps: int = 4,
        seed: int = 0,
        latent: list[Any] | None = None,
        **others: Any,
    ) -> Node:
        """Add KSampler Advanced with the inputs of ksampler; by default all steps, and leftover noise is kept."""
        inputs = {
            "model": model or self.checkpoint()[0],
            "add_noise": "enable",
            "noise_seed": seed,
            "steps": steps,
            "cfg": 1.0,
            "sampler_name": "tcd",
            "scheduler": "tcd",
            "positive": self.condition(0)[0],
            "negative": self.condition(1)[0],
            "latent_image": latent or self.empty(),
            "start_at_step": 0,
            "end_at_step": 10000,
            "return_with_leftover_noise": "enable",
        }
        return self.add("KSamplerAdvanced", **inputs | others)

    def save(self, latent: list[Any]) -> Node:
        return self.add("SaveLatent", samples=latent, filename_prefix=salt())

    def show(self, value: list[Any]) -> Node:
        return self.add("TestShow", value=value, salt=salt())


def salt() -> str:
    """Return a unique string, so that the host does not answer from its cache."""
    return uuid.uuid4().hex


def latents(server: ComfyServer, graph: Graph, *saves: Node) -> list[Tensor]:
    """Run a graph and return the latents [B, 4, h, w] that its SaveLatent nodes saved, in the sampler's scale."""
    outputs = server.run(graph)
    return [saved(server, outputs, node) for node in saves]


def saved(server: ComfyServer, outputs: dict[str, Any], node: Node) -> Tensor:
    """Return the latent [B, 4, h, w] that a SaveLatent node saved, in the sampler's scale."""
    file = server.fetch(outputs[node.id]["latents"][0])
    return safetensors.torch.load(file)["latent_tensor"] * LATENT_SCALE


def sampled(server: ComfyServer, **options: Any) -> Tensor:
    """Run SamplerCustom with these options and return its latent [B, 4, 8, 8], in the sampler's scale."""
    graph = Graph()
    node = graph.sampler_custom(**options)
    return latents(server, graph, graph.save(node[0]))[0]


def shown(server: ComfyServer, graph: Graph, value: list[Any]) -> list[float]:
    """Run a graph and return the numbers of a link."""
    node = graph.show(value)
    values: list[float] = server.run(graph)[node.id]["values"]
    return values


def shown_tensor(outputs: dict[str, Any], node: Node) -> Tensor:
    """Return the tensor that a TestShow node showed."""
    return torch.tensor(outputs[node.id]["values"]).view(outputs[node.id]["shape"])


def host_version(server: ComfyServer) -> tuple[int, ...]:
    """Return the version of ComfyUI as a tuple that can be compared."""
    version: str = server.get("/system_stats")["system"]["comfyui_version"]
    return tuple(map(int, version.split(".")))


def host_noise(seed: int, batch: int = 1, size: int = 8) -> Tensor:
    """Return the host's initial noise, [B, 4, size, size]."""
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| in the Euclidean norm."""
    return float((found - expected).norm() / expected.norm())
