"""During a run: progress messages, interrupting, and the progress bar."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from graphs import Graph, sampled

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer

pytestmark = pytest.mark.host

LISTEN = Path(__file__).parent / "scripts" / "listen.py"


def _events(server: ComfyServer, graph: Graph, *, interrupt_at: int = 0) -> list[tuple[str, dict[str, Any]]]:
    command = [str(server.host.python), str(LISTEN), server.url, str(interrupt_at)]
    done = subprocess.run(command, input=json.dumps(graph), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(event) for event in json.loads(done.stdout)]


def test_progress_counts_the_steps(server: ComfyServer) -> None:
    graph = Graph()
    sampler = graph.sampler_custom()
    graph.save(sampler[0])
    events = _events(server, graph)
    progress = [data for kind, data in events if kind == "progress" and data["node"] == sampler.id]
    steps = [data["value"] for data in progress]
    assert {data["max"] for data in progress} == {4}
    assert (steps[0], steps[-1]) == (1, 4)
    assert steps == sorted(set(steps)), "the host skips messages that follow too fast, but repeats none"
    assert events[-1][0] == "execution_success"


def test_interrupt_stops_a_run_and_not_the_host(server: ComfyServer) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    latent = graph.add("EmptyLatentImage", width=256, height=256, batch_size=2)[0]
    sampler = graph.sampler_custom(model=model, sigmas=graph.sigmas(model, steps=50)[0], latent=latent)
    graph.save(sampler[0])
    events = _events(server, graph, interrupt_at=2)
    steps = [data["value"] for kind, data in events if kind == "progress" and data["node"] == sampler.id]
    assert events[-1][0] == "execution_interrupted"
    assert events[-1][1]["node_id"] == sampler.id
    assert 2 <= max(steps) < 25
    assert sampled(server).isfinite().all()


def test_the_console_shows_a_bar(server: ComfyServer) -> None:
    before = len(server.log_text())
    sampled(server)
    assert "4/4 [" in server.log_text()[before:]
