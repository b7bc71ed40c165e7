"""TCDLoraLoader in a graph: it applies the complete LoRA and returns its settings, or raises an error."""

import copy
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from checkpoints import MINI_SD3, write_sd15_mini
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from graphs import LATENT_SCALE, MINI, Graph, Node, host_noise, latents, relative_error, shown
from loras import ALPHA, MODULES, RANK, merged, random_lora, targets
from reference import tcd_scheduler_sample
from safetensors.torch import save_file
from torch import Tensor

from trajectory_consistency.tcd import kohya_name, timestep_grid
from trajectory_consistency.trainer.demo.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.host


def _write(
    server: ComfyServer, name: str, lora: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    save_file(dict(lora), server.models / "loras" / name, metadata=dict(metadata or {}) or None)
    return name


def _loader(graph: Graph, name: str, strength: Any = 1.0, checkpoint: str = MINI, **more: Any) -> Node:
    base = graph.checkpoint(checkpoint)
    return graph.add("TCDLoraLoader", model=base[0], lora_name=name, strength_model=strength, **more)


def _sampled(server: ComfyServer, graph: Graph, *models: list[Any], steps: int = 1) -> list[Tensor]:
    """Return the latent of each of the graph's models."""
    nodes = [graph.sampler_custom(model=each, sigmas=graph.sigmas(each, steps=steps)[0], seed=1) for each in models]
    return latents(server, graph, *(graph.save(node[0]) for node in nodes))


def _sampled_with(server: ComfyServer, name: str, strength: float = 1.0, *, steps: int = 1, **more: Any) -> Tensor:
    graph = Graph()
    return _sampled(server, graph, _loader(graph, name, strength, **more)[0], steps=steps)[0]


def _base(server: ComfyServer) -> Tensor:
    graph = Graph()
    return _sampled(server, graph, graph.checkpoint()[0])[0]


def _expected(unet: UNet2DConditionModel, steps: int = 1) -> Tensor:
    return tcd_scheduler_sample(unet, host_noise(1), timestep_grid(steps), eta=0.3, seed=1)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 4), (0.5, 1), (-1.0, 1)])
def test_equals_the_merged_model(server: ComfyServer, unet: UNet2DConditionModel, strength: float, steps: int) -> None:
    lora = random_lora(unet)
    assert len(lora) == 3 * MODULES, "every module of the mini UNet that matches one of the targets"
    name = _write(server, "whole.safetensors", lora)
    before = len(server.log_text())
    found = _sampled_with(server, name, strength, steps=steps)
    assert relative_error(found, _expected(merged(unet, lora, strength), steps)) < 1e-3
    assert relative_error(found, _expected(unet, steps)) > 0.05
    log = server.log_text()[before:]
    assert "lora key not loaded" not in log
    assert "NOT LOADED" not in log
    assert "ERROR lora" not in log


def test_strength_0_leaves_the_model(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    name = _write(server, "whole.safetensors", random_lora(unet))
    assert torch.equal(_sampled_with(server, name, 0.0), _base(server))


def test_at_strength_0_the_file_need_not_fit(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    name = _write(server, "xl.safetensors", _wider(random_lora(unet)))
    assert torch.equal(_sampled_with(server, name, 0.0), _base(server))


def test_the_input_model_is_not_changed(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    before = _base(server)
    graph = Graph()
    with_lora = _loader(graph, _write(server, "whole.safetensors", random_lora(unet)))
    untouched = graph.add("TCDLoraLoader", model=with_lora[0], lora_name="whole.safetensors", strength_model=0.0)
    patched, base = _sampled(server, graph, untouched[0], graph[with_lora.id]["inputs"]["model"])
    assert relative_error(patched, before) > 0.05
    assert torch.equal(base, before), "its weights are bit for bit the same"


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.5), (0.5, -0.25)])
def test_two_loras_add_up(server: ComfyServer, unet: UNet2DConditionModel, first: float, second: float) -> None:
    one, two = random_lora(unet, 1), random_lora(unet, 2)
    graph = Graph()
    lower = _loader(graph, _write(server, "one.safetensors", one), first)
    name = _write(server, "two.safetensors", two)
    both = graph.add("TCDLoraLoader", model=lower[0], lora_name=name, strength_model=second)
    found = _sampled(server, graph, both[0])[0]
    assert relative_error(found, _expected(merged(merged(unet, one, first), two, second))) < 1e-3


def test_a_lora_and_its_opposite_cancel(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    graph = Graph()
    there = _loader(graph, _write(server, "whole.safetensors", random_lora(unet)), 0.5)
    back = graph.add("TCDLoraLoader", model=there[0], lora_name="whole.safetensors", strength_model=-0.5)
    assert relative_error(_sampled(server, graph, back[0])[0], _expected(unet)) < 1e-4


def test_a_replaced_file_is_noticed(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    _sampled_with(server, _write(server, "replaced.safetensors", random_lora(unet, 1)))
    other = random_lora(unet, 2)
    found = _sampled_with(server, _write(server, "replaced.safetensors", other))
    assert relative_error(found, _expected(merged(unet, other, 1.0))) < 1e-3


# Files with more than up, down and alpha, or in other spellings


def test_an_official_file_is_applied_completely_though_the_stock_loader_drops_its_attention(
    server: ComfyServer, unet: UNet2DConditionModel
) -> None:
    lora = {name: half.half() for name, half in random_lora(unet).items() if not name.endswith("alpha")}
    file = {f"unet.{path}.lora.{s}.weight": lora[f"{kohya_name(path)}.lora_{s}.weight"] for path, s in _halves(unet)}
    name = _write(server, "official.safetensors", file)
    expected = _expected(merged(unet, lora, 1.0))
    assert relative_error(_sampled_with(server, name), expected) < 1e-3

    before = len(server.log_text())
    graph = Graph()
    stock = graph.add("LoraLoaderModelOnly", model=graph.checkpoint()[0], lora_name=name, strength_model=1.0)
    assert relative_error(_sampled(server, graph, stock[0])[0], expected) > 0.05
    dropped = server.log_text()[before:].count("lora key not loaded: unet.")
    assert dropped == sum(".to_" in path for path, _ in _halves(unet)) > 0


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_from_the_metadata(server: ComfyServer, unet: UNet2DConditionModel, rslora: bool) -> None:
    scale = 3.0 / (RANK**0.5 if rslora else RANK)
    lora = random_lora(unet)
    expected = _expected(merged(unet, lora, scale * RANK / ALPHA))
    halves = {name: half for name, half in lora.items() if not name.endswith("alpha")}
    settings = {"unet.lora_alpha": 3, "unet.r": RANK, "unet.use_rslora": rslora}
    name = _write(server, "peft.safetensors", halves, {"lora_adapter_metadata": json.dumps(settings)})
    assert relative_error(_sampled_with(server, name), expected) < 1e-3


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora(server: ComfyServer, unet: UNet2DConditionModel, axis: int, strength: float) -> None:
    lora = random_lora(unet)
    generator = torch.Generator().manual_seed(3)
    for path, module in targets(unet).items():
        axes = [other for other in range(module.weight.ndim) if other != axis]
        norm = torch.linalg.vector_norm(module.weight, dim=axes, keepdim=True)
        lora[f"{kohya_name(path)}.dora_scale"] = norm * (1 + 0.2 * torch.rand(norm.shape, generator=generator))
    found = _sampled_with(server, _write(server, "dora.safetensors", lora), strength)
    assert relative_error(found, _expected(merged(unet, lora, strength))) < 1e-3


def test_lycoris_with_a_core(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    lora = random_lora(unet)
    for path, module in targets(unet).items():
        if module.weight.ndim == 4 and module.weight.shape[2] == 3:
            name = kohya_name(path)
            lora[f"{name}.lora_mid.weight"] = torch.randn(RANK, RANK, 3, 3, generator=torch.Generator().manual_seed(4))
            lora[f"{name}.lora_down.weight"] = lora[f"{name}.lora_down.weight"].mean((2, 3), keepdim=True)
    file = {name.replace("lora_unet_", "lycoris_"): tensor for name, tensor in lora.items()}
    found = _sampled_with(server, _write(server, "core.safetensors", file))
    assert relative_error(found, _expected(merged(unet, lora, 1.0))) < 1e-3


def test_differences_of_weights_and_biases(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    lora, generator = random_lora(unet), torch.Generator().manual_seed(6)
    expected = merged(unet, lora, 0.5)
    for path, prefix in (("conv_norm_out", "diffusion_model.out.0"), ("conv_out", "lora_unet_conv_out")):
        module = expected.get_submodule(path)
        for part, parameter in (("diff", module.weight), ("diff_b", module.bias)):
            lora[f"{prefix}.{part}"] = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter += 0.5 * lora[f"{prefix}.{part}"]
    found = _sampled_with(server, _write(server, "differences.safetensors", lora), 0.5)
    assert relative_error(found, _expected(expected)) < 1e-3
    assert relative_error(found, _expected(merged(unet, lora, 0.5))) > 0.05


def test_differences_beside_a_lora_on_a_network_in_float8(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    """Where the LoRA is added beside the weights, and the difference of a bias has no layer to stand beside."""
    lora = random_lora(unet)
    expected = merged(unet, lora, 1.0)
    lora["lora_unet_conv_out.diff_b"] = torch.full((4,), 0.5)
    expected.conv_out.bias += 0.5
    name = _write(server, "float8.safetensors", lora)
    folder = server.models / "diffusion_models"
    folder.mkdir(exist_ok=True)
    write_sd15_mini(folder / "differences-unet.safetensors", unet)
    graph = Graph()
    base = graph.add("UNETLoader", unet_name="differences-unet.safetensors", weight_dtype="fp8_e4m3fn")
    model = graph.add("TCDLoraLoader", model=base[0], lora_name=name, strength_model=1.0)
    before = len(server.log_text())
    found = _sampled(server, graph, model[0])[0]
    assert relative_error(found, _expected(expected)) < 0.5 * relative_error(_expected(merged(unet, lora, 1.0)), found)
    assert "float8.safetensors is rounded in 1 of its layers: out.2.bias." in server.log_text()[before:]


def test_a_flow_transformer(server: ComfyServer, mini_sd3: SD3Transformer2DModel) -> None:
    generator = torch.Generator().manual_seed(5)
    network, file = copy.deepcopy(mini_sd3), {}
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(RANK, module.in_features, generator=generator) * module.in_features**-0.5
            up = torch.randn(module.out_features, RANK, generator=generator) * 0.1
            module.weight += up @ down
            file |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
    graph = Graph()
    model = _loader(graph, _write(server, "flow.safetensors", file), checkpoint=MINI_SD3)[0]
    shape = {"width": 4096, "pooled": 2048}
    node = graph.sampler_custom(
        model=model,
        sigmas=graph.sigmas(model, steps=1)[0],
        seed=1,
        positive=graph.condition(0, **shape)[0],
        negative=graph.condition(1, **shape)[0],
        latent=graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)[0],
    )
    found = latents(server, graph, graph.save(node[0]))[0] / LATENT_SCALE
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    seeded = torch.Generator().manual_seed(0)  # as in TestConditioning
    context, pooled = torch.randn(1, 77, 4096, generator=seeded), torch.randn(1, 2048, generator=seeded)
    results = [noise - each(noise, context, pooled, torch.tensor([1000.0])).sample for each in (network, mini_sd3)]
    expected, base = (each / 1.5305 + 0.0609 for each in results)
    assert relative_error(found, expected) < 1e-3
    assert relative_error(base, expected) > 0.05


def _halves(unet: UNet2DConditionModel) -> list[tuple[str, str]]:
    return [(path, side) for path in targets(unet) for side in ("down", "up")]


# Settings


@pytest.mark.parametrize(
    ("metadata", "settings"),
    [
        (None, [4, 0.3, 1.0]),
        ({"tcd.steps": "8", "tcd.eta": "0.75", "tcd.cfg": "1.5"}, [8, 0.75, 1.5]),
        ({"tcd.eta": "0"}, [4, 0.0, 1.0]),
    ],
)
def test_settings_of_the_file(
    server: ComfyServer, unet: UNet2DConditionModel, metadata: dict[str, str] | None, settings: list[float]
) -> None:
    graph = Graph()
    node = _loader(graph, _write(server, "settings.safetensors", random_lora(unet), metadata))
    shows = [graph.show(node[output]) for output in (1, 2, 3)]
    outputs = server.run(graph)
    assert [outputs[show.id]["values"][0] for show in shows] == settings


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tcd.steps": "four"}, "tcd.steps in the metadata of bad.safetensors is 'four', but must be a whole number"),
        ({"tcd.steps": "4.5"}, "tcd.steps in the metadata of bad.safetensors is '4.5', but must be a whole number"),
        ({"tcd.eta": "low"}, "tcd.eta in the metadata of bad.safetensors is 'low', but must be a number"),
        ({"tcd.steps": "0"}, "tcd.steps in the metadata of bad.safetensors is 0, but must be from 1 to 50"),
        ({"tcd.eta": "nan"}, "tcd.eta in the metadata of bad.safetensors is nan, but must be from 0 to 1"),
        ({"tcd.cfg": "-1"}, "tcd.cfg in the metadata of bad.safetensors is -1.0"),
    ],
)
def test_bad_settings(server: ComfyServer, unet: UNet2DConditionModel, metadata: dict[str, str], message: str) -> None:
    _fails(server, _write(server, "bad.safetensors", random_lora(unet), metadata), message)


# What is refused


def _wider(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA with SDXL's width of cross-attention, 2048 channels instead of 768."""

    def widen(name: str, tensor: Tensor) -> Tensor:
        is_cross = "attn2_to_k.lora_down" in name or "attn2_to_v.lora_down" in name
        return torch.zeros(RANK, 2048) if is_cross else tensor

    return {name: widen(name, tensor) for name, tensor in lora.items()}


def test_a_different_architecture_is_named_from_the_metadata(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    name = _write(server, "xl.safetensors", _wider(random_lora(unet)), metadata)
    _fails(server, name, "the file is for stable-diffusion-xl-v1-base/lora, the model is SD15")


def test_a_partial_fit_is_refused_and_nothing_applied(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    message = _fails(server, _write(server, "xl.safetensors", _wider(random_lora(unet))), "the file is for SDXL")
    assert "the model is SD15. 57 of 65 LoRA modules fit the model; wrong shape: " in message
    assert "is 320 x 2048, but the model has 320 x 768" in message
    assert relative_error(_base(server), _expected(unet)) < 1e-4


def test_a_partial_fit_is_applied_if_allowed(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    lora = random_lora(unet)
    text = {f"lora_te_text_model_{i}.lora_{side}.weight": torch.ones(2, 2) for i in range(5) for side in ("up", "down")}
    name = _write(server, "text.safetensors", {**lora, **text})
    before = len(server.log_text())
    found = _sampled_with(server, name, allow_partial=True)
    assert relative_error(found, _expected(merged(unet, lora, 1.0))) < 1e-3
    log = server.log_text()[before:]
    assert (
        log.count("text.safetensors was applied in part: 65 of 70 LoRA modules fit the model; for a text encoder") == 1
    )
    assert "not loaded" not in log.lower()


@pytest.mark.parametrize("strength", [math.nan, "inf"])
def test_bad_strength(server: ComfyServer, unet: UNet2DConditionModel, strength: Any) -> None:
    name = _write(server, "whole.safetensors", random_lora(unet))
    _fails(server, name, f"strength_model is {float(strength)}, but must be from -100 to 100", strength)


def _fails(server: ComfyServer, name: str, message: str, strength: Any = 1.0) -> str:
    """Check that the node fails with the message, and return the complete message."""
    graph = Graph()
    link = graph.add("TestFloat", text=strength)[0] if isinstance(strength, str) else strength
    with pytest.raises(ComfyError) as caught:
        shown(server, graph, _loader(graph, name, link)[1])
    assert caught.value.node_type == "TCDLoraLoader"
    assert message in str(caught.value)
    return str(caught.value)
