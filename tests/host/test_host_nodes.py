"""The nodes' contract with saved workflows, their sigmas, and their errors on bad input."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graph, shown
from reference import sigma_table

from trajectory_consistency.trainer.demo.comfy_server import ComfyError, ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK

# Renaming, reordering or narrowing anything here breaks saved workflows; only additions are safe.
CONTRACT = {
    "TCDSampler": {
        "inputs": {"eta": ("FLOAT", {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.01})},
        "optional": {},
        "outputs": [("SAMPLER", "SAMPLER")],
        "category": "sampling/custom_sampling/samplers",
    },
    "TCDSigmas": {
        "inputs": {
            "model": ("MODEL", {}),
            "steps": ("INT", {"default": 4, "min": 1, "max": 1000}),
            "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
        },
        "optional": {"timesteps": ("STRING", {"default": ""})},
        "outputs": [("SIGMAS", "SIGMAS")],
        "category": "sampling/custom_sampling/schedulers",
    },
    "TCDModelSettings": {
        "inputs": {
            "model": ("MODEL", {}),
            "eta": ("FLOAT", {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.01}),
        },
        "optional": {},
        "outputs": [("MODEL", "MODEL")],
        "category": "advanced/model",
    },
    "TCDLoraLoader": {
        "inputs": {
            "model": ("MODEL", {}),
            "lora_name": ("COMBO", {}),
            "strength_model": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
        },
        "optional": {"allow_partial": ("BOOLEAN", {"default": False})},
        "outputs": [("MODEL", "MODEL"), ("INT", "steps"), ("FLOAT", "eta"), ("FLOAT", "cfg")],
        "category": "loaders",
    },
    "TCDSamplingSetup": {
        "inputs": {
            "model": ("MODEL", {}),
            "steps": ("INT", {"default": 4, "min": 1, "max": 1000}),
            "scheduler": ("COMBO", {}),
            "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            "eta": ("FLOAT", {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.01}),
        },
        "optional": {},
        "outputs": [("MODEL", "MODEL"), ("SAMPLER", "SAMPLER"), ("SIGMAS", "SIGMAS")],
        "category": "sampling/custom_sampling",
    },
    "TCDDistill": {
        "inputs": {
            "model": ("MODEL", {}),
            "positive": ("CONDITIONING", {}),
            "preset": ("COMBO", {"default": "good"}),
            "training_steps": ("INT", {"default": 0, "min": 0, "max": 100000}),
            "batch": ("INT", {"default": 0, "min": 0, "max": 1024}),
            "accumulate": ("INT", {"default": 0, "min": 0, "max": 1024}),
            "learning_rate": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 1e-6}),
            "rank": ("INT", {"default": 0, "min": 0, "max": 1024}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**53 - 1}),
            "target_time": ("BOOLEAN", {"default": True}),
            "guidance_min": ("FLOAT", {"default": 2.0, "min": 0.0, "max": 100.0, "step": 0.1}),
            "guidance_max": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1}),
        },
        "optional": {
            "negative": ("CONDITIONING", {}),
            "latents": ("LATENT", {}),
            "start_from": ("COMBO", {"default": "new LoRA"}),
            "width": ("INT", {"default": 1024, "min": 16, "max": 16384, "step": 8}),
            "height": ("INT", {"default": 1024, "min": 16, "max": 16384, "step": 8}),
            "per_prompt": ("INT", {"default": 1, "min": 1, "max": 10000}),
            "preview_every": ("INT", {"default": 50, "min": 0, "max": 100000}),
        },
        "outputs": [("LORA_MODEL", "lora"), ("LOSS_MAP", "loss_map"), ("INT", "steps_done")],
        "category": "model/training",
    },
    "TCDSaveLora": {
        "inputs": {"lora": ("LORA_MODEL", {}), "filename_prefix": ("STRING", {"default": "tcd-lora"})},
        "optional": {},
        "outputs": [("STRING", "lora_name")],
        "category": "model/training",
    },
    "TCDLoraModelLoader": {
        "inputs": {
            "model": ("MODEL", {}),
            "lora": ("LORA_MODEL", {}),
            "strength_model": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
        },
        "optional": {},
        "outputs": [("MODEL", "MODEL"), ("INT", "steps"), ("FLOAT", "eta"), ("FLOAT", "cfg")],
        "category": "model/loaders",
    },
}
NUMERIC = ("default", "min", "max", "step")

# Keywords known to the oldest supported host (0.3.48); with an unknown keyword it would load none of the nodes.
OLDEST_SCHEMA = {"node_id", "display_name", "category", "inputs", "outputs", "description"}
OLDEST_SCHEMA |= {"is_input_list", "is_output_node"}
OLDEST_INPUT = {"default", "min", "max", "step", "tooltip", "optional", "options", "control_after_generate"}
OLDEST_OUTPUT = {"display_name", "tooltip"}


@pytest.mark.host
@pytest.mark.parametrize("node_id", CONTRACT)
def test_contract_is_frozen(server: ComfyServer, node_id: str) -> None:
    info = server.get(f"/object_info/{node_id}")[node_id]
    assert _contract_of(info) == CONTRACT[node_id]
    assert list(info["input"]["required"]) == list(CONTRACT[node_id]["inputs"]), "widgets are saved by position"


def _contract_of(info: dict[str, Any]) -> dict[str, Any]:
    def of_inputs(group: str) -> dict[str, Any]:
        inputs = info["input"].get(group, {})
        return {name: (kind, {k: v for k, v in o.items() if k in NUMERIC}) for name, (kind, o) in inputs.items()}

    return {
        "inputs": of_inputs("required"),
        "optional": of_inputs("optional"),
        "outputs": list(zip(info["output"], info["output_name"], strict=True)),
        "category": info["category"],
    }


def test_schemas_use_only_keywords_that_the_oldest_host_knows() -> None:
    used: dict[str, set[str]] = {"Schema": set(), "Input": set(), "Output": set()}
    for path in Path(PACK, "nodes").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in used:
                used[call.func.attr] |= {str(keyword.arg) for keyword in call.keywords}
    assert used["Schema"] and used["Schema"] <= OLDEST_SCHEMA
    assert used["Input"] and used["Input"] <= OLDEST_INPUT
    assert used["Output"] and used["Output"] <= OLDEST_OUTPUT


@pytest.mark.host
def test_the_pack_loads_without_an_error(server: ComfyServer) -> None:
    assert "IMPORT FAILED" not in server.log_text()
    assert "Error while calling comfy_entrypoint" not in server.log_text()


@pytest.mark.host
@pytest.mark.parametrize(
    ("options", "timesteps"),
    [
        ({}, [999, 759, 499, 259]),
        ({"steps": 1}, [999]),
        ({"steps": 2, "timesteps": "  "}, [999, 499]),
        ({"steps": 2, "denoise": 0.5}, [499, 259]),
        ({"steps": 3, "timesteps": " 800 , 400,0"}, [800, 400, 0]),
    ],
)
def test_sigmas_are_those_of_the_timesteps(server: ComfyServer, options: Any, timesteps: list[int]) -> None:
    graph = Graph()
    found = shown(server, graph, graph.sigmas(graph.checkpoint()[0], **options)[0])
    assert found == [*sigma_table()[timesteps].tolist(), 0.0]  # bit for bit, because the noise is seeded by the sigmas


@pytest.mark.host
def test_sigmas_are_the_hosts_own(server: ComfyServer) -> None:
    # With lcm sampling the host's model has only the 50 distilled timesteps, and its simple scheduler chooses TCD's.
    graph = Graph()
    lcm = graph.add("ModelSamplingDiscrete", model=graph.checkpoint()[0], sampling="lcm", zsnr=False)[0]
    theirs = graph.add("BasicScheduler", model=lcm, scheduler="simple", steps=4, denoise=1.0)[0]
    expected = shown(server, graph, theirs)
    assert shown(server, graph, graph.sigmas(graph.checkpoint()[0])[0]) == expected
    torch.testing.assert_close(shown(server, graph, graph.sigmas(lcm)[0]), expected)


@pytest.mark.host
def test_all_50_steps(server: ComfyServer) -> None:
    graph = Graph()
    found = shown(server, graph, graph.sigmas(graph.checkpoint()[0], steps=50)[0])
    assert found == [*sigma_table()[list(range(999, 0, -20))].tolist(), 0.0]


def _typed_or_linked(graph: Graph, kind: str, value: Any) -> Any:
    """Return the value as a typed input, or, if it is a string, as a link from a node that converts the string."""
    return graph.add(kind, text=value)[0] if isinstance(value, str) else value


@pytest.mark.host
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "Value 0 smaller than min of 1"),
        (-1, "Value -1 smaller than min of 1"),
        (1001, "Value 1001 bigger than max of 1000"),
        ("0", "steps is 0, but must be a whole number of at least 1"),
        ("-3", "steps is -3, but must be a whole number of at least 1"),
        (51, "steps is 51, but denoise 1 keeps 50 of the 50 distilled timesteps: use steps of at most 50"),
    ],
)
def test_bad_steps(server: ComfyServer, steps: Any, message: str) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    sigmas = graph.sigmas(model, steps=_typed_or_linked(graph, "TestInt", steps))
    _fails(server, graph, sigmas[0], "TCDSigmas", message)


@pytest.mark.host
@pytest.mark.parametrize(
    ("denoise", "message"),
    [
        (math.nan, "denoise is nan, but must be from 0.0 to 1.0"),
        ("nan", "denoise is nan"),
        ("1.5", "denoise is 1.5"),
        (0.05, "steps is 4, but denoise 0.05 keeps 2 of the 50 distilled timesteps: use steps of at most 2"),
    ],
)
def test_bad_denoise(server: ComfyServer, denoise: Any, message: str) -> None:
    graph = Graph()
    sigmas = graph.sigmas(graph.checkpoint()[0], denoise=_typed_or_linked(graph, "TestFloat", denoise))
    _fails(server, graph, sigmas[0], "TCDSigmas", message)


@pytest.mark.host
@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ("four", "timesteps is 'four': type whole numbers from 999 down to 0"),
        ("999,,1", "type whole numbers from 999 down to 0"),
        ("1000", "timesteps has 1000, out of range"),
        ("-1", "timesteps has -1, out of range"),
        ("259,999", "timesteps has 999 after 259, but must descend"),
    ],
)
def test_bad_timesteps(server: ComfyServer, timesteps: str, message: str) -> None:
    graph = Graph()
    _fails(server, graph, graph.sigmas(graph.checkpoint()[0], timesteps=timesteps)[0], "TCDSigmas", message)


@pytest.mark.host
@pytest.mark.parametrize(
    ("eta", "message"),
    [
        (math.nan, "eta is nan, but must be from 0 to 1"),
        ("nan", "eta is nan, but must be from 0 to 1"),
        ("inf", "eta is inf, but must be from 0 to 1"),
        ("-0.1", "eta is -0.1, but must be from 0 to 1"),
        (math.inf, "bigger than max of 1.0"),
    ],
)
def test_bad_eta(server: ComfyServer, eta: Any, message: str) -> None:
    graph = Graph()
    model = graph.checkpoint()[0]
    node = graph.sampler_custom(model=model, eta=_typed_or_linked(graph, "TestFloat", eta))
    graph.save(node[0])
    with pytest.raises(ComfyError, match="TCDSampler") as caught:
        server.run(graph)
    assert message in str(caught.value)


def _fails(server: ComfyServer, graph: Graph, value: list[Any], node_type: str, message: str) -> None:
    with pytest.raises(ComfyError) as caught:
        shown(server, graph, value)
    assert caught.value.node_type == node_type
    assert message in str(caught.value)
