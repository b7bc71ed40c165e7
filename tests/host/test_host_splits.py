"""Runs in several parts: SplitSigmas and similar nodes, start and end steps, leftover noise, disabled noise."""

from typing import Any

import pytest
import torch
from graphs import Graph, Node, latents, relative_error
from model_kinds import KINDS

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer

pytestmark = pytest.mark.host

TOLERANCE = 1e-4
STEPS = 3
SIZE = 32
ETAS = (0.0, 0.3, 1.0)


def advanced(graph: Graph, model: list[Any], *, latent: list[Any] | None = None, **others: Any) -> Node:
    """Add a KSampler Advanced with seed 6; by default it adds noise only if no latent is given."""
    options = {"steps": STEPS, "seed": 6, "add_noise": "disable" if latent else "enable"} | others
    return graph.ksampler_advanced(model=model, latent=latent, **options)


def assert_all_like(server: ComfyServer, graph: Graph, whole: Node, others: list[Node]) -> None:
    expected, *found = latents(server, graph, *(graph.save(node[0]) for node in (whole, *others)))
    for i, latent in enumerate(found):
        assert relative_error(latent, expected) < TOLERANCE, i


@pytest.mark.usefixtures("mini_sd3")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", ETAS)
def test_sigmas_can_be_split_at_every_step(server: ComfyServer, kind: str, eta: float) -> None:
    graph = Graph(size=SIZE)
    inputs = KINDS[kind].inputs(server, graph)
    empty = KINDS[kind].empty(graph, SIZE)
    sigmas = graph.sigmas(inputs["model"], steps=STEPS)[0]

    def part(sigmas: list[Any], latent: list[Any] | None = None) -> Node:
        latent, is_begun = latent or empty, latent is not None
        return graph.sampler_custom(eta=eta, sigmas=sigmas, seed=6, latent=latent, add_noise=not is_begun, **inputs)

    # A flow model is not split before its first step: the host divides the latent that leaves a sampler by 1 - sigma.
    # At sigma = 1 that gives infinity, and then NaN when the second part multiplies it by 0.
    first = 1 if KINDS[kind].is_flow else 0
    splits = {step: graph.add("SplitSigmas", sigmas=sigmas, step=step) for step in range(first, STEPS + 1)}
    others = [graph.add("SplitSigmasDenoise", sigmas=sigmas, denoise=denoise) for denoise in (0.4, 0.7)]
    in_two = [part(split[1], part(split[0])[0]) for split in (*splits.values(), *others)]
    middle = graph.add("SplitSigmas", sigmas=splits[1][1], step=1)
    in_three = part(middle[1], part(middle[0], part(splits[1][0])[0])[0])
    assert_all_like(server, graph, part(sigmas), [*in_two, in_three])


@pytest.mark.usefixtures("mini_sd3")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", ETAS)
def test_steps_may_be_left_to_a_second_ksampler(server: ComfyServer, kind: str, eta: float) -> None:
    graph = Graph(size=SIZE)
    inputs = KINDS[kind].inputs(server, graph)
    empty = KINDS[kind].empty(graph, SIZE)
    inputs["model"] = graph.add("TCDModelSettings", model=inputs["model"], eta=eta)[0]
    begun = {"add_noise": "enable", "latent": empty}
    whole = [advanced(graph, **inputs, **begun), graph.ksampler(**inputs, latent=empty, steps=STEPS, seed=6)]
    in_two = [
        advanced(graph, **inputs, start_at_step=step, latent=advanced(graph, **inputs, **begun, end_at_step=step)[0])
        for step in range(1, STEPS)
    ]
    assert_all_like(server, graph, whole[0], [*whole[1:], *in_two])


def test_above_eta_0_a_different_seed_changes_the_second_half(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    checkpoint = graph.checkpoint()[0]
    saves = []
    for eta in (0.0, 0.3):
        model = graph.add("TCDModelSettings", model=checkpoint, eta=eta)[0]
        begun = advanced(graph, model, end_at_step=1)[0]
        saves += [graph.save(advanced(graph, model, start_at_step=1, latent=begun, seed=s)[0]) for s in (6, 7)]
    same, too, one, other = latents(server, graph, *saves)
    assert torch.equal(same, too)
    assert relative_error(other, one) > 0.01


def test_without_leftover_noise_the_result_is_the_estimate_of_x0(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    begun = graph.add("SplitSigmas", sigmas=graph.sigmas(model, steps=STEPS)[0], step=2)[0]
    estimate = graph.sampler_custom(model=model, sigmas=begun, seed=6)[1]
    early = advanced(graph, model, end_at_step=2, return_with_leftover_noise="disable")
    whole, again = (
        advanced(graph, model),
        graph.ksampler(model=model, steps=STEPS, seed=6),
    )
    saves = [graph.save(latent) for latent in (estimate, early[0], whole[0], again[0])]
    expected, found, *others = latents(server, graph, *saves)
    assert relative_error(found, expected) < 1e-6
    # To end early, the host writes 0 into the sigmas it was given. Other runs must not share that tensor.
    assert torch.equal(*others)
    assert relative_error(others[0], found) > 0.01


def test_a_late_start_with_noise_is_image_to_image(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    picture = graph.ksampler(model=model, seed=1)
    late = advanced(graph, model, steps=4, start_at_step=2, latent=picture[0], add_noise="enable")
    half = graph.ksampler(model=model, steps=2, denoise=0.5, seed=6, latent=picture[0])
    found, expected = latents(server, graph, graph.save(late[0]), graph.save(half[0]))
    assert torch.equal(found, expected)


def test_a_start_past_the_end_keeps_the_latent(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    picture = graph.ksampler(model=model, seed=1)
    after = advanced(graph, model, start_at_step=STEPS, latent=picture[0])
    found, expected = latents(server, graph, graph.save(after[0]), graph.save(picture[0]))
    assert torch.equal(found, expected)


def test_disable_noise_has_the_seed_0(server: ComfyServer) -> None:
    # This is how the host defines DisableNoise: a second half in SamplerCustomAdvanced always belongs to seed 0.
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    guider = graph.add("BasicGuider", model=model, conditioning=graph.condition()[0])[0]
    sampler = graph.add("TCDSampler", eta=0.3)[0]
    sigmas = graph.sigmas(model)[0]
    halves = graph.add("SplitSigmas", sigmas=sigmas, step=1)

    def part(sigmas: list[Any], noise: Node, latent: list[Any]) -> Node:
        return graph.add(
            "SamplerCustomAdvanced", noise=noise[0], guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
        )

    two = graph.empty(2)
    noise, no_noise = graph.add("RandomNoise", noise_seed=0), graph.add("DisableNoise")
    in_two = part(halves[1], no_noise, part(halves[0], noise, two)[0])
    assert_all_like(server, graph, part(sigmas, noise, two), [in_two])
