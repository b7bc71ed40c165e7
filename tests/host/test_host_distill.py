"""The node TCDDistill in a running ComfyUI, from the pack that the registry serves: without the trainer."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graph, Node, latents, salt, saved

from trajectory_consistency.trainer.demo.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.host


def distill(graph: Graph, **changes: Any) -> Node:
    """Add TCDDistill on the small SD1.5; the teacher draws two pictures of 64 x 64 pixels."""
    inputs: dict[str, Any] = {
        "model": graph.checkpoint()[0],
        "positive": graph.condition(0)[0],
        "negative": graph.condition(1)[0],
        "preset": "fast try",
        "training_steps": 3,
        "batch": 2,
        "accumulate": 1,
        "learning_rate": 1e-3,
        "rank": 2,
        "seed": 0,
        "target_time": True,
        "guidance_min": 2.0,
        "guidance_max": 8.0,
        "start_from": "new LoRA",
        "width": 64,
        "height": 64,
        "per_prompt": 2,
        "preview_every": 2,
    }
    return graph.add("TCDDistill", **inputs | changes)


def plain(server: ComfyServer) -> torch.Tensor:
    graph = Graph()
    return latents(server, graph, graph.save(graph.sampler_custom()[0]))[0]


def files(server: ComfyServer) -> list[Path]:
    return sorted((server.models / "loras").rglob("distilled*"))


def test_a_graph_distils_saves_and_samples_and_runs_once(server: ComfyServer) -> None:
    before = plain(server)
    graph = Graph()
    node = distill(graph)
    graph.add("TCDSaveLora", lora=node[0], filename_prefix="distilled")
    graph.add("SaveLoRA", lora=node[0], prefix="loras/stock", steps=node[2])
    plot = graph.add("LossGraphNode", loss=node[1], filename_prefix="loss")
    own = graph.add("TCDLoraModelLoader", model=graph.checkpoint()[0], lora=node[0], strength_model=1.0)
    stock = graph.add("LoraModelLoader", model=graph.checkpoint()[0], lora=node[0], strength_model=1.0, bypass=False)
    sigmas = graph.sigmas(own[0], steps=own[1])[0]
    saves = [
        graph.save(graph.sampler_custom(model=model[0], sigmas=sigmas, eta=own[2], cfg=own[3])[0])
        for model in (own, stock)
    ]
    outputs = server.run(graph)
    (file,) = files(server)
    server.run(graph)  # a second time, without a change
    assert files(server) == [file], "nothing was trained or saved again"
    assert outputs[plot.id]["images"]
    with_time, without_time = (saved(server, outputs, node) for node in saves)
    assert not torch.equal(with_time, without_time) and not torch.equal(with_time, before)
    assert torch.equal(plain(server), before)
    again = Graph()
    loaded = again.add("TCDLoraLoader", model=again.checkpoint()[0], lora_name=file.name, strength_model=1.0)
    sampler = again.sampler_custom(model=loaded[0], sigmas=again.sigmas(loaded[0], steps=loaded[1])[0], eta=loaded[2])
    torch.testing.assert_close(latents(server, again, again.save(sampler[0]))[0], with_time, rtol=1e-2, atol=1e-2)


def test_cancel_keeps_what_was_learned(server: ComfyServer) -> None:
    before, earlier = plain(server), len(server.log_text())
    for number in range(2):
        graph = Graph()
        node = distill(graph, training_steps=100000, per_prompt=1, preview_every=0)
        graph.add("SaveLoRA", lora=node[0], prefix=salt())
        prompt_id = server.submit(graph)
        time.sleep(8)
        server.post("/interrupt", {})
        deadline = time.monotonic() + 60
        while prompt_id not in server.get(f"/history/{prompt_id}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        messages = server.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"]
        assert "execution_interrupted" in {name for name, _ in messages}
        assert len(list((server.output / "tcd-distill").iterdir())) == 1
        stopped = [int(step) for step in re.findall(r"stopped after step (\d+)", server.log_text()[earlier:])]
        assert len(stopped) == number + 1 and stopped == sorted(set(stopped))
    assert f"resuming at step {stopped[0]} of 100000" in server.log_text()[earlier:]
    assert torch.equal(plain(server), before)


def test_an_error_names_what_to_change(server: ComfyServer) -> None:
    graph = Graph()
    inputs = {key: value for key, value in graph[distill(graph).id]["inputs"].items() if key != "negative"}
    node = graph.add("TCDDistill", **inputs)
    graph.add("TCDSaveLora", lora=node[0], filename_prefix="never")
    with pytest.raises(ComfyError, match="there is no negative CONDITIONING") as caught:
        server.run(graph)
    assert caught.value.node_type == "TCDDistill"
