"""TCDSamplingSetup returns the same model, sampler and sigmas as the three separate nodes."""

from typing import Any

import pytest
import torch
from graphs import Graph, Node, latents, shown

from trajectory_consistency.trainer.demo.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.host


def _setup(graph: Graph, **inputs: Any) -> Node:
    defaults = {"steps": 2, "scheduler": "simple", "denoise": 1.0, "eta": 0.7}
    return graph.add("TCDSamplingSetup", model=graph.checkpoint()[0], **defaults | inputs)


def test_it_samples_like_the_three_nodes(server: ComfyServer) -> None:
    graph = Graph()
    setup = _setup(graph)
    together = graph.sampler_custom(model=setup[0], sampler=setup[1], sigmas=setup[2])
    model = graph.checkpoint()[0]
    apart = graph.sampler_custom(model=model, eta=0.7, sigmas=graph.sigmas(model, steps=2)[0])
    found, expected = latents(server, graph, graph.save(together[0]), graph.save(apart[0]))
    assert torch.equal(found, expected)


def test_its_model_carries_eta_to_plain_ksampler(server: ComfyServer) -> None:
    graph = Graph()
    ours = graph.ksampler(model=_setup(graph)[0], steps=2)
    settings = graph.add("TCDModelSettings", model=graph.checkpoint()[0], eta=0.7)
    theirs = graph.ksampler(model=settings[0], steps=2)
    found, expected = latents(server, graph, graph.save(ours[0]), graph.save(theirs[0]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("scheduler", "theirs"), [("sgm_uniform", "sgm_uniform"), ("simple", "tcd")])
@pytest.mark.parametrize(("steps", "denoise"), [(1, 1.0), (4, 1.0), (2, 0.8), (3, 0.5), (20, 0.3), (4, 0.01)])
def test_its_sigmas_equal_those_of_the_hosts_scheduler_list(
    server: ComfyServer, scheduler: str, theirs: str, steps: int, denoise: float
) -> None:
    graph = Graph()
    ours = graph.show(_setup(graph, scheduler=scheduler, steps=steps, denoise=denoise)[2])
    theirs = graph.show(
        graph.add("BasicScheduler", model=graph.checkpoint()[0], scheduler=theirs, steps=steps, denoise=denoise)[0]
    )
    outputs = server.run(graph)
    assert outputs[ours.id]["values"] == outputs[theirs.id]["values"]
    assert len(outputs[ours.id]["values"]) == steps + 1


@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform"])
def test_denoise_0_gives_no_step(server: ComfyServer, scheduler: str) -> None:
    graph = Graph()
    assert shown(server, graph, _setup(graph, scheduler=scheduler, denoise=0.0)[2]) == []


GRID = "steps (divided by denoise, where that is below 1) is 1333, but the model has 1000 timesteps"
ALL = "steps / denoise is 500 / 0.01, but must be at most 10000"
STEPS, DENOISE = "steps is 0, but must be from 1 to 1000", "denoise is nan, but must be from 0 to 1"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"scheduler": "karras"}, "karras"),
        ({"denoise": 0.03, "steps": 40}, GRID),
        ({"denoise": 0.01, "steps": 500}, ALL),
        ({"denoise": 0.01, "steps": 500, "scheduler": "sgm_uniform"}, ALL),
        ({"eta": ("TestFloat", "1.5")}, "eta is 1.5, but must be from 0 to 1"),
        ({"steps": ("TestInt", "0")}, STEPS),
        ({"steps": ("TestInt", "0"), "scheduler": "sgm_uniform"}, STEPS),
        ({"denoise": ("TestFloat", "nan")}, DENOISE),
        ({"denoise": ("TestFloat", "nan"), "scheduler": "sgm_uniform"}, DENOISE),
    ],
)
def test_bad_input(server: ComfyServer, inputs: dict[str, Any], message: str) -> None:
    graph = Graph()
    linked = {name: graph.add(v[0], text=v[1])[0] if isinstance(v, tuple) else v for name, v in inputs.items()}
    graph.show(_setup(graph, **linked)[2])
    with pytest.raises(ComfyError) as caught:
        server.run(graph)
    assert message in str(caught.value)
    assert caught.value.node_type == "TCDSamplingSetup"
