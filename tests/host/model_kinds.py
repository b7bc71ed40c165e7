"""Kinds of model for prompts: a checkpoint, and host nodes that replace its sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from checkpoints import MINI_SD3
from graphs import MINI, Graph

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer

Patch = tuple[str, Mapping[str, Any]]
"""The class of a node from MODEL to MODEL, and its other inputs."""


@dataclass(frozen=True)
class Kind:
    """A checkpoint, patches of its sampling, and the latent and conditioning that it needs."""

    patches: tuple[Patch, ...] = ()
    checkpoint: str = MINI
    latent: str = "EmptyLatentImage"
    condition: Mapping[str, int] = field(default_factory=dict)
    is_flow: bool = False

    def inputs(self, server: ComfyServer, graph: Graph) -> dict[str, Any]:
        """Return the inputs model, positive and negative; skips the test if the host lacks one of the patches."""
        model = graph.checkpoint(self.checkpoint)[0]
        for node, others in self.patches:
            if node not in server.get(f"/object_info/{node}"):
                pytest.skip(f"this ComfyUI is too old for {node}")
            model = graph.add(node, model=model, **others)[0]
        positive, negative = (graph.condition(seed, **self.condition)[0] for seed in (0, 1))
        return {"model": model, "positive": positive, "negative": negative}

    def empty(self, graph: Graph, size: int) -> list[Any]:
        """Return an empty LATENT of size x size pixels."""
        return graph.add(self.latent, width=size, height=size, batch_size=1)[0]


def _sd3(*patches: Patch) -> Kind:
    condition = {"width": 4096, "pooled": 2048}
    return Kind(patches, checkpoint=MINI_SD3, latent="EmptySD3LatentImage", condition=condition, is_flow=True)


def _edm(sampling: str) -> Kind:
    return Kind((("ModelSamplingContinuousEDM", {"sampling": sampling, "sigma_max": 80.0, "sigma_min": 0.002}),))


KINDS = {
    "SD 1.5": Kind(),
    "v at zero terminal SNR": Kind((("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),)),
    "EDM": _edm("edm"),
    "EDM, v": _edm("v_prediction"),
    "Cosmos": _edm("cosmos_rflow"),
    "Stable Cascade": Kind((("ModelSamplingStableCascade", {"shift": 2.0}),)),
    "SD3": _sd3(),
    "SD3 at noise scale 2": _sd3(("ModelNoiseScale", {"noise_scale": 2.0})),
}
"""Those of SD3 need the fixture mini_sd3."""
