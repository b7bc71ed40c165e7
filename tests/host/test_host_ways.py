"""TCD chosen by name in the host's lists (KSampler, KSamplerSelect, BasicScheduler), and the eta that it then uses."""

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from graphs import Graph, host_noise, latents, relative_error
from loras import random_lora
from model_kinds import KINDS
from reference import tcd_scheduler_sample
from safetensors.torch import save_file

from trajectory_consistency.tcd import timestep_grid
from trajectory_consistency.trainer.demo.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.host

SIZE = 32


def options(server: ComfyServer, node_id: str, name: str) -> list[str]:
    """Return the options of a combo input of a node, in the format of older or newer hosts."""
    kind, *settings = server.get(f"/object_info/{node_id}")[node_id]["input"]["required"][name]
    found: list[str] = settings[0]["options"] if kind == "COMBO" else kind
    return found


def settings(graph: Graph, model: list[Any], eta: Any) -> list[Any]:
    return graph.add("TCDModelSettings", model=model, eta=eta)[0]


@pytest.mark.parametrize(
    ("node_id", "name"),
    [
        *((node, name) for node in ("KSampler", "KSamplerAdvanced") for name in ("sampler_name", "scheduler")),
        ("KSamplerSelect", "sampler_name"),
        ("BasicScheduler", "scheduler"),
    ],
)
def test_the_lists_offer_tcd_once_and_last(server: ComfyServer, node_id: str, name: str) -> None:
    names = options(server, node_id, name)
    assert names.count("tcd") == 1
    assert names[-1] == "tcd", "existing entries keep their positions"


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_ksampler_equals_sampler_custom_bit_for_bit(server: ComfyServer, steps: int) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    sigmas = graph.sigmas(model, steps=steps)[0]
    etas = (0.3,) if steps == 20 else (0.3, 0.0, 1.0)
    saves = []
    for eta in etas:
        by_name = graph.ksampler(model=model if eta == 0.3 else settings(graph, model, eta), steps=steps, seed=5)
        by_node = graph.sampler_custom(model=model, sigmas=sigmas, eta=eta, seed=5)
        saves += [graph.save(by_name[0]), graph.save(by_node[0])]
    found = latents(server, graph, *saves)
    for named, custom in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(named, custom)
        assert steps == 1 or named is found[0] or relative_error(named, found[0]) > 0.01


@pytest.mark.usefixtures("mini_sd3")
@pytest.mark.parametrize("kind", KINDS)
def test_by_name_and_by_node_are_equal_on_every_kind_of_model(server: ComfyServer, kind: str) -> None:
    graph = Graph(size=SIZE)
    inputs = KINDS[kind].inputs(server, graph)
    inputs["latent"] = KINDS[kind].empty(graph, SIZE)
    model = inputs.pop("model")
    sigmas = graph.sigmas(model, steps=3)[0]
    found = {}
    for eta in (0.3, 0.0, 1.0):
        named = model if eta == 0.3 else settings(graph, model, eta)
        found[eta] = [
            graph.ksampler(model=named, steps=3, seed=5, **inputs),
            graph.ksampler_advanced(model=named, steps=3, seed=5, **inputs),
            graph.sampler_custom(model=model, sigmas=sigmas, eta=eta, seed=5, **inputs),
        ]
    # A reference independent of the pack's sampler: at eta = 0 it equals the host's euler on the same sigmas, up to
    # rounding. Euler computes x0 as a difference of numbers as large as sigma_max, 4518.76 at zero terminal SNR.
    euler = graph.ksampler(model=model, sampler_name="euler", steps=3, seed=5, **inputs)
    nodes = [euler, *(node for nodes in found.values() for node in nodes)]
    expected, *others = latents(server, graph, *(graph.save(node[0]) for node in nodes))
    for by_name, by_advanced, by_node in zip(others[::3], others[1::3], others[2::3], strict=True):
        assert by_node.isfinite().all()
        assert torch.equal(by_name, by_node) and torch.equal(by_advanced, by_node)
    some, none, full = others[::3]
    assert relative_error(none, expected) < (1e-3 if kind == "v at zero terminal SNR" else 1e-5)
    assert all(relative_error(each, none) > 1e-3 for each in (some, full)), "eta has an effect"
    assert relative_error(full, some) > 1e-3


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_ksampler_equals_an_independent_tcd(server: ComfyServer, unet: UNet2DConditionModel, seed: int) -> None:
    graph = Graph()
    node = graph.ksampler(model=settings(graph, graph.checkpoint()[0], 1.0), seed=seed)
    found = latents(server, graph, graph.save(node[0]))[0]
    expected = tcd_scheduler_sample(unet, host_noise(seed), timestep_grid(4), eta=1.0, seed=seed)
    assert relative_error(found, expected) < 1e-4


def test_tcd_works_with_every_scheduler(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    names = options(server, "KSampler", "scheduler")
    assert len(names) > 8
    saves = []
    for name in names:
        sigmas = graph.add("BasicScheduler", model=model, scheduler=name, steps=2, denoise=1.0)[0]
        saves.append(graph.save(graph.ksampler(model=model, scheduler=name, steps=2, seed=3)[0]))
        saves.append(graph.save(graph.sampler_custom(model=model, sigmas=sigmas, seed=3)[0]))
    found = latents(server, graph, *saves)
    for name, by_name, by_node in zip(names, found[::2], found[1::2], strict=True):
        assert by_name.isfinite().all(), name
        assert torch.equal(by_name, by_node), name


@pytest.mark.parametrize("steps", [1, 3])
def test_without_stochasticity_tcd_is_the_hosts_euler(server: ComfyServer, steps: int) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    euler = graph.ksampler(model=model, sampler_name="euler", steps=steps, seed=3)
    tcd = graph.ksampler(model=settings(graph, model, 0.0), steps=steps, seed=3)
    expected, found = latents(server, graph, graph.save(euler[0]), graph.save(tcd[0]))
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("denoise", [0.3, 0.5])
def test_denoise_keeps_part_of_the_latent(server: ComfyServer, denoise: float) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    picture = graph.ksampler(model=model, seed=1)
    again = graph.ksampler(model=model, seed=2, denoise=denoise, latent=picture[0])
    sigmas = graph.add("BasicScheduler", model=model, scheduler="tcd", steps=4, denoise=denoise)[0]
    custom = graph.sampler_custom(model=model, sigmas=sigmas, seed=2, latent=picture[0])
    before, after, expected = latents(server, graph, *(graph.save(node[0]) for node in (picture, again, custom)))
    assert torch.equal(after, expected)
    assert 0.01 < relative_error(after, before) < 1.0


def test_denoise_0_keeps_all_of_it(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    picture = graph.ksampler(model=model, seed=1)
    again = graph.ksampler(model=model, seed=2, denoise=0.0, latent=picture[0])
    before, after = latents(server, graph, graph.save(picture[0]), graph.save(again[0]))
    assert torch.equal(before, after)


def test_the_eta_of_the_sampler_node_wins(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    sigmas = graph.sigmas(model, steps=2)[0]
    plain = graph.sampler_custom(model=model, sigmas=sigmas, eta=0.3)
    overridden = graph.sampler_custom(model=settings(graph, model, 1.0), sigmas=sigmas, eta=0.3)
    selected = graph.sampler_custom(
        model=settings(graph, model, 1.0),
        sigmas=sigmas,
        sampler=graph.add("KSamplerSelect", sampler_name="tcd")[0],
    )
    found = latents(server, graph, *(graph.save(node[0]) for node in (plain, overridden, selected)))
    assert torch.equal(found[0], found[1])
    assert relative_error(found[2], found[0]) > 0.01, "a sampler chosen by name uses the model's eta"


def test_the_settings_survive_later_nodes(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    save_file(random_lora(unet), server.models / "loras" / "settings.safetensors")
    afterwards: list[tuple[str, dict[str, Any]]] = [
        ("LoraLoaderModelOnly", {"lora_name": "settings.safetensors", "strength_model": 0.5}),
        ("TCDLoraLoader", {"lora_name": "settings.safetensors", "strength_model": 0.5}),
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}),
        ("TCDModelSettings", {"eta": 1.0}),
    ]
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    saves = []
    for node, inputs in afterwards:
        after = graph.add(node, model=settings(graph, model, 0.0), **inputs)[0]
        before = settings(graph, graph.add(node, model=model, **inputs)[0], 0.0)
        saves += [graph.save(graph.ksampler(model=each, steps=2, seed=4)[0]) for each in (after, before)]
    found = latents(server, graph, *saves)
    for (node, _), after, before in zip(afterwards, found[::2], found[1::2], strict=True):
        assert torch.equal(after, before) == (node != "TCDModelSettings"), node


def test_the_settings_do_not_change_their_input_model(server: ComfyServer) -> None:
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]
    latents(server, graph, graph.save(graph.ksampler(model=settings(graph, model, 1.0), steps=2)[0]))
    graph = Graph(size=SIZE)
    model = graph.checkpoint()[0]  # the same object, from the host's cache
    by_name = graph.ksampler(model=model, steps=2)
    by_node = graph.sampler_custom(model=model, sigmas=graph.sigmas(model, steps=2)[0], eta=0.3)
    found, expected = latents(server, graph, graph.save(by_name[0]), graph.save(by_node[0]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("eta", "message"),
    [
        ("nan", "eta is nan, but must be from 0 to 1"),
        ("-0.1", "eta is -0.1, but must be from 0 to 1"),
        (math.inf, "bigger than max of 1.0"),
    ],
)
def test_bad_eta(server: ComfyServer, eta: Any, message: str) -> None:
    graph = Graph()
    value = graph.add("TestFloat", text=eta)[0] if isinstance(eta, str) else eta
    graph.save(graph.ksampler(model=settings(graph, graph.checkpoint()[0], value))[0])
    with pytest.raises(ComfyError, match="TCDModelSettings") as caught:
        server.run(graph)
    assert message in str(caught.value)
