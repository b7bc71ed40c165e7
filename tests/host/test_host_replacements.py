"""Workflows made with another pack's TCD nodes: if that pack is missing, the host replaces them by ours."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from graphs import MINI, Graph, host_version, latents, sampled

from trajectory_consistency.trainer.demo.comfy_server import ComfyError, ComfyServer

DATA = Path(__file__).parent / "data" / "older_nodes"  # a workflow with each node, as saved by the browser


class Older(NamedTuple):
    """A node of another pack: its inputs and outputs in order, as a workflow saves them."""

    inputs: dict[str, str]
    outputs: list[str]


SOCKETS = {"MODEL", "SAMPLER", "SIGMAS"}
OLDER = {
    "TCDModelSamplingDiscrete": Older(
        {"model": "MODEL", "steps": "INT", "scheduler": "COMBO", "denoise": "FLOAT", "eta": "FLOAT"},
        ["MODEL", "SAMPLER", "SIGMAS"],
    ),
    "TCDScheduler": Older({"model": "MODEL", "steps": "INT"}, ["SIGMAS"]),
    "SamplerTCD": Older({"gamma": "FLOAT"}, ["SAMPLER"]),
    "SamplerTCD EulerA": Older({"gamma": "FLOAT"}, ["SAMPLER"]),
}

pytestmark = pytest.mark.host
each_older = pytest.mark.parametrize("old_id", OLDER)


@pytest.fixture(scope="module")
def replacements(server: ComfyServer) -> dict[str, Any]:
    """The host's replacements, by the id of the replaced node."""
    if host_version(server) < (0, 14, 0):
        pytest.skip("this ComfyUI replaces no nodes: 0.14.0 or newer does")
    found = server.get("/node_replacements")
    return {old_id: found[old_id][0] for old_id in OLDER}


@each_older
def test_every_input_and_output_is_mapped(server: ComfyServer, replacements: dict[str, Any], old_id: str) -> None:
    replacement, older = replacements[old_id], OLDER[old_id]
    new_id = replacement["new_node_id"]
    info = server.get(f"/object_info/{new_id}")[new_id]
    inputs = {name: kind for group in info["input"].values() for name, (kind, *_) in group.items()}
    assert replacement["old_widget_ids"] == [name for name, kind in older.inputs.items() if kind not in SOCKETS]
    mapped = {each["old_id"]: each["new_id"] for each in replacement["input_mapping"] if "old_id" in each}
    assert {name: inputs[mapped[name]] for name in mapped} == older.inputs
    given = {each["new_id"] for each in replacement["input_mapping"]}
    assert set(info["input"]["required"]) <= given, "a prompt has no default for a missing input"
    outputs = {each["old_idx"]: info["output"][each["new_idx"]] for each in replacement["output_mapping"]}
    assert outputs == dict(enumerate(older.outputs))


@each_older
def test_the_saved_workflows_match_the_replaced_nodes(old_id: str) -> None:
    workflow = json.loads((DATA / f"{old_id}.json").read_text(encoding="utf-8"))
    (node,) = [node for node in workflow["nodes"] if node["type"] in OLDER]
    older = OLDER[old_id]
    assert node["type"] == old_id
    assert len(node["widgets_values"]) == sum(kind not in SOCKETS for kind in older.inputs.values())
    assert [slot["name"] for slot in node["inputs"]] == [n for n, kind in older.inputs.items() if kind in SOCKETS]
    assert [slot["type"] for slot in node["outputs"]] == older.outputs
    assert all(slot["links"] for slot in node["outputs"])


class Prompt(Graph):
    """A prompt as the browser sends it, with the titles that the host needs to replace a node."""

    def titled(self) -> "Prompt":
        for node in self.values():
            node["_meta"] = {"title": node["class_type"]}
        return self


def _run(server: ComfyServer, graph: Prompt, **inputs: Any) -> torch.Tensor:
    node = graph.sampler_custom(seed=3, **inputs)
    save = graph.save(node[0])
    return latents(server, graph.titled(), save)[0]


@pytest.mark.usefixtures("replacements")
@pytest.mark.parametrize(
    ("scheduler", "steps", "denoise"), [("simple", 4, 1.0), ("simple", 5, 0.3), ("sgm_uniform", 2, 0.8)]
)
def test_the_one_node_pack(server: ComfyServer, scheduler: str, steps: int, denoise: float) -> None:
    graph = Prompt()
    old = graph.add(
        "TCDModelSamplingDiscrete",
        model=graph.checkpoint()[0],
        steps=steps,
        scheduler=scheduler,
        denoise=denoise,
        eta=0.6,
    )
    found = _run(server, graph, model=old[0], sampler=old[1], sigmas=old[2])
    ours = Graph()
    model = ours.checkpoint()[0]
    name = "tcd" if scheduler == "simple" else scheduler
    sigmas = ours.add("BasicScheduler", model=model, scheduler=name, steps=steps, denoise=denoise)
    node = ours.sampler_custom(model=model, eta=0.6, sigmas=sigmas[0], seed=3)
    assert torch.equal(found, latents(server, ours, ours.save(node[0]))[0])


@pytest.mark.usefixtures("replacements")
def test_the_older_scheduler(server: ComfyServer) -> None:
    graph = Prompt()
    old = graph.add("TCDScheduler", model=graph.checkpoint()[0], steps=3)
    found = _run(server, graph, sigmas=old[0])
    ours = Graph()
    node = ours.sampler_custom(sigmas=ours.sigmas(ours.checkpoint()[0], steps=3)[0], seed=3)
    assert torch.equal(found, latents(server, ours, ours.save(node[0]))[0])


@pytest.mark.usefixtures("replacements")
@pytest.mark.parametrize("old_id", ["SamplerTCD", "SamplerTCD EulerA"])
def test_the_older_samplers(server: ComfyServer, old_id: str) -> None:
    graph = Prompt()
    found = _run(server, graph, sampler=graph.add(old_id, gamma=0.6)[0])
    assert torch.equal(found, sampled(server, eta=0.6, seed=3))


def test_another_packs_sampler_with_our_id_is_ours(server: ComfyServer) -> None:
    """A replacement is only for ids that no installed node has."""
    graph = Prompt()
    found = _run(server, graph, sampler=graph.add("TCDSampler", gamma=0.6)[0])
    assert torch.equal(found, sampled(server, eta=0.6, seed=3))
    both = Prompt()
    found = _run(server, both, sampler=both.add("TCDSampler", gamma=0.6, eta=0.2)[0])
    assert torch.equal(found, sampled(server, eta=0.2, seed=3))


@pytest.mark.usefixtures("replacements")
def test_too_many_steps_for_the_grid_are_refused_after_the_replacement_too(server: ComfyServer) -> None:
    graph = Prompt()
    old = graph.add("TCDScheduler", model=graph.checkpoint(MINI)[0], steps=10000)
    with pytest.raises(ComfyError, match="TCDSigmas: Value 10000 bigger than max"):
        _run(server, graph, sigmas=old[0])
