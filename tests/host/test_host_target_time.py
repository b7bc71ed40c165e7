"""LoRAs with a target-time embedding (TCF S+): the host samples the same latents as the trainer, by every route."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import mini_controlnet, write_controlnet_mini, write_sd15_mini
from diffusers import UNet2DConditionModel
from graphs import Graph, Node, host_noise, latents, relative_error
from loras import merged, random_lora
from reference import condition, sigma_table, tcd_scheduler_sample
from safetensors.torch import load_file, save_file
from test_host_inputs import left_half
from torch import Tensor, nn

from trajectory_consistency.tcd import (
    AdapterWeights,
    DiscreteSchedule,
    TargetInput,
    TargetTime,
    scaled_linear_alpha_bar,
    seeded_noise,
    split_target_time,
    timestep_grid,
)
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.tcd.distill.sampling import Guidance, sample_latents
from trajectory_consistency.tcd.lora_metadata import TARGET_TIME_KEY
from trajectory_consistency.trainer.demo.comfy_server import ComfyError, ComfyServer
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet.model import UNetModel

pytestmark = pytest.mark.host

SEED = 7
GRID = [(steps, eta) for steps in (1, 2, 4) for eta in (0.0, 0.3, 1.0)]
WARNING = "with another sampler it gets the time of the next sigma"


def random_embedding(seed: int, target_input: TargetInput = "s") -> TargetTime:
    """An embedding for the mini UNet that changes its output visibly; its values are exact in float16."""
    torch.manual_seed(seed)
    embedding = TargetTime(320, 1280, target_input=target_input)
    nn.init.normal_(embedding["out"].weight, std=0.1)
    nn.init.normal_(embedding["out"].bias, std=0.1)
    return embedding.requires_grad_(False).half().float()


def write(server: ComfyServer, unet: UNet2DConditionModel, seed: int = 0, target_input: TargetInput = "s") -> Path:
    """Write a LoRA with an embedding into the host's folder."""
    path = server.models / "loras" / f"target-time-{target_input}-{seed}.safetensors"
    if not path.exists():
        embedding = random_embedding(seed, target_input)
        tensors = {f"tcd_target_time.{name}": tensor for name, tensor in embedding.state_dict().items()}
        save_file(random_lora(unet, seed) | tensors, path, metadata={TARGET_TIME_KEY: target_input})
    return path


def loaded(graph: Graph, path: Path, strength: float = 1.0, model: list[Any] | None = None) -> list[Any]:
    model = model or graph.checkpoint()[0]
    return graph.add("TCDLoraLoader", model=model, lora_name=path.name, strength_model=strength)[0]


def network(unet: UNet2DConditionModel) -> UNetModel:
    return UNetModel(unet, DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar()), "eps")


def trainer_network(unet: UNet2DConditionModel, path: Path) -> UNetModel:
    """A UNet with a LoRA file applied by the trainer."""
    net = network(deepcopy(unet))
    net.adapter.add(FILE, load_weights(net, path))
    return net


def drawn(net: UNetModel, steps: int, eta: float, *, batch: int = 1, cfg: float = 1.0) -> Tensor:
    return sample_latents(
        net,
        Conditioning.of(context=condition(0)).expand(batch),
        sigmas=net.schedule.sigmas_for(steps),
        gamma=eta,
        noise=host_noise(SEED, batch),
        seed=SEED,
        guidance=None if cfg == 1 else Guidance(Conditioning.of(context=condition(1)).expand(batch), cfg),
    )


def in_the_host(
    server: ComfyServer, graph: Graph, model: list[Any], grid: Sequence[tuple[int, float]], **options: Any
) -> list[Tensor]:
    nodes = [
        graph.sampler_custom(model=model, eta=eta, sigmas=graph.sigmas(model, steps=steps)[0], seed=SEED, **options)
        for steps, eta in grid
    ]
    return latents(server, graph, *(graph.save(node[0]) for node in nodes))


@pytest.mark.parametrize("target_input", ["s", "t-s"])
def test_the_host_draws_what_the_trainer_draws(
    server: ComfyServer, unet: UNet2DConditionModel, target_input: TargetInput
) -> None:
    path, graph = write(server, unet, target_input=target_input), Graph()
    before = len(server.log_text())
    found = in_the_host(server, graph, loaded(graph, path), GRID)
    assert WARNING not in server.log_text()[before:] and "applied in part" not in server.log_text()[before:]
    net, without = trainer_network(unet, path), network(merged(unet, load_file(path), 1.0))
    for latent, (steps, eta) in zip(found, GRID, strict=True):
        expected = drawn(net, steps, eta)
        assert relative_error(latent, expected) < 1e-4, (steps, eta)
        assert relative_error(drawn(without, steps, eta), expected) > 0.05, "the embedding must matter"


@pytest.mark.parametrize(("batch", "cfg"), [(2, 1.0), (1, 3.0), (3, 3.0)])
def test_batches_and_guidance(server: ComfyServer, unet: UNet2DConditionModel, batch: int, cfg: float) -> None:
    path, graph = write(server, unet), Graph()
    (found,) = in_the_host(server, graph, loaded(graph, path), [(4, 0.3)], batch=batch, cfg=cfg)
    assert relative_error(found, drawn(trainer_network(unet, path), 4, 0.3, batch=batch, cfg=cfg)) < 1e-4


def test_the_plain_ksampler_passes_the_target_time_too(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path, graph = write(server, unet), Graph()
    found = latents(server, graph, graph.save(graph.ksampler(model=loaded(graph, path), seed=SEED)[0]))[0]
    assert relative_error(found, drawn(trainer_network(unet, path), 4, 0.3)) < 1e-4


def test_two_embeddings_add_up(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    class Sum(TargetTime):
        def forward(self, t: Tensor, s: Tensor) -> Tensor:
            return 0.5 * random_embedding(1)(t, s) - 0.25 * random_embedding(2, "t-s")(t, s)

    one, two = write(server, unet, 1), write(server, unet, 2, "t-s")
    graph = Graph()
    model = loaded(graph, two, -0.25, loaded(graph, one, 0.5))
    (found,) = in_the_host(server, graph, model, [(4, 0.3)])
    both = network(merged(merged(unet, load_file(one), 0.5), load_file(two), -0.25))
    both.adapter.add(FILE, AdapterWeights({}, Sum(320, 1280)))
    assert relative_error(found, drawn(both, 4, 0.3)) < 1e-4


def baked(server: ComfyServer, unet: UNet2DConditionModel, path: Path) -> str:
    """Write a checkpoint with the LoRA merged and its embedding of s = 0, the target of a single step, as a bias."""
    lora, embedding = split_target_time(load_file(path))
    changed = merged(unet, lora, 1.0)
    constant = TargetTime.from_state_dict(embedding, "s")(torch.tensor([999]), torch.tensor([0]))[0]
    with torch.no_grad():
        changed.time_embedding.linear_2.bias += constant
    write_sd15_mini(server.models / "checkpoints" / "baked.safetensors", changed)
    return "baked.safetensors"


def with_areas(graph: Graph) -> dict[str, Any]:
    area = graph.add(
        "ConditioningSetArea", conditioning=graph.condition(2)[0], width=64, height=128, x=0, y=0, strength=1.0
    )
    both = graph.add("ConditioningCombine", conditioning_1=graph.condition(0)[0], conditioning_2=area[0])
    return {"positive": both[0], "cfg": 2.0, "batch": 2}


def with_a_mask(graph: Graph) -> dict[str, Any]:
    masked = graph.add(
        "ConditioningSetMask",
        conditioning=graph.condition(0)[0],
        mask=left_half(graph),
        strength=1.0,
        set_cond_area="mask bounds",
    )
    both = graph.add("ConditioningCombine", conditioning_1=graph.condition(2)[0], conditioning_2=masked[0])
    return {"positive": both[0], "cfg": 2.0}


def with_a_controlnet(graph: Graph) -> dict[str, Any]:
    hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0)
    control = graph.add("ControlNetLoader", control_net_name="target-time-control.safetensors")
    applied = graph.add(
        "ControlNetApplyAdvanced",
        positive=graph.condition(0)[0],
        negative=graph.condition(1)[0],
        control_net=control[0],
        image=hint[0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    return {"positive": applied[0], "negative": applied[1], "cfg": 2.0, "batch": 2}


@pytest.mark.parametrize("conditioned", [with_areas, with_a_mask, with_a_controlnet])
def test_with_other_conditioning(server: ComfyServer, unet: UNet2DConditionModel, conditioned: Any) -> None:
    path = write(server, unet)
    folder = server.models / "controlnet"
    folder.mkdir(exist_ok=True)
    write_controlnet_mini(folder / "target-time-control.safetensors", unet, mini_controlnet(unet))
    name, graph = baked(server, unet, path), Graph(size=128)
    options = conditioned(graph)
    (patched,) = in_the_host(server, graph, loaded(graph, path), [(1, 0.3)], **options)
    again = Graph(size=128)
    options = conditioned(again)
    (expected,) = in_the_host(server, again, again.checkpoint(name)[0], [(1, 0.3)], **options)
    assert relative_error(patched, expected) < 1e-4


def two_passes(graph: Graph, model: list[Any], first: str) -> Node:
    """The first half of the steps with the sampler `first`, at eta 1, and the second half with euler."""
    sigmas = graph.add("SplitSigmas", sigmas=graph.sigmas(model)[0], step=2)
    sampler = graph.add("TCDSampler", eta=1.0) if first == "tcd" else graph.add("KSamplerSelect", sampler_name=first)
    half = graph.sampler_custom(model=model, sampler=sampler[0], sigmas=sigmas[0], seed=SEED)
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    return graph.sampler_custom(
        model=model, sampler=euler[0], sigmas=sigmas[1], seed=SEED, add_noise=False, latent=half[0]
    )


def test_another_sampler_gets_the_next_time_and_one_warning(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path, graph = write(server, unet, 3), Graph()
    model = loaded(graph, path)
    before = len(server.log_text())
    euler = graph.add("KSamplerSelect", sampler_name="euler")[0]
    nodes = [
        graph.sampler_custom(model=model, seed=SEED, sampler=euler),
        graph.sampler_custom(model=model, seed=SEED, eta=0.0),
    ]
    by_euler, by_tcd = latents(server, graph, *(graph.save(node[0]) for node in nodes))
    assert relative_error(by_euler, by_tcd) < 1e-5, "at eta 0 the target is the next sigma, and a step is one of euler"
    assert server.log_text()[before:].count(WARNING) == 1


def test_a_second_pass_does_not_get_the_times_of_the_first(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path, graph = write(server, unet), Graph()
    found = latents(server, graph, graph.save(two_passes(graph, loaded(graph, path), "tcd")[0]))[0]
    net = trainer_network(unet, path)
    assert relative_error(found, _second_pass(net, _first_pass(net))) < 1e-4


def _first_pass(net: UNetModel) -> Tensor:
    """The first two of four steps at eta 1, in the host's scale: each jumps to s = 0 and renoises."""
    table, z = sigma_table(), seeded_noise(SEED)
    x = host_noise(SEED) * (table[999] ** 2 + 1).sqrt()
    for t, t_next in ((999, 759), (759, 499)):
        x0 = _x0(net, x, t, 0)
        jumped = x0 + (x - x0) * table[0] / table[t]
        x = jumped + (table[t_next] ** 2 - table[0] ** 2).sqrt() * z(table[t_next], x)
    return x


def _second_pass(net: UNetModel, x: Tensor) -> Tensor:
    table = sigma_table()
    x0 = _x0(net, x, 499, 259)
    x = x0 + (x - x0) * table[259] / table[499]
    return _x0(net, x, 259, 0)


@torch.no_grad()
def _x0(net: UNetModel, x: Tensor, t: int, s: int) -> Tensor:
    x_t = x / (sigma_table()[t] ** 2 + 1).sqrt()
    start, end = (net.schedule.point(torch.tensor([time]), x.ndim) for time in (t, s))
    return net.x0(x_t, start, Conditioning.of(context=condition(0)), end)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision(server: ComfyServer, unet: UNet2DConditionModel, dtype: str) -> None:
    path, graph = write(server, unet), Graph()
    model = graph.add("ModelComputeDtype", model=loaded(graph, path), dtype=dtype)[0]
    (found,) = in_the_host(server, graph, model, [(2, 0.3)])
    assert 0 < relative_error(found, drawn(trainer_network(unet, path), 2, 0.3)) < 0.03


def test_weights_in_float8(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path = write(server, unet)
    folder = server.models / "diffusion_models"
    folder.mkdir(exist_ok=True)
    write_sd15_mini(folder / "target-time-unet.safetensors", unet)
    graph = Graph()
    base = graph.add("UNETLoader", unet_name="target-time-unet.safetensors", weight_dtype="fp8_e4m3fn")[0]
    (found,) = in_the_host(server, graph, loaded(graph, path, model=base), [(2, 0.3)])
    expected = drawn(trainer_network(unet, path), 2, 0.3)
    without = drawn(network(merged(unet, load_file(path), 1.0)), 2, 0.3)
    assert relative_error(found, expected) < 0.5 * relative_error(without, expected)


def test_it_works_again_after_the_host_unloaded_the_model(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path = write(server, unet)
    for _ in range(2):
        graph = Graph()
        (found,) = in_the_host(server, graph, loaded(graph, path), [(2, 0.3)])
        assert relative_error(found, drawn(trainer_network(unet, path), 2, 0.3)) < 1e-4
        server.post("/free", {"unload_models": True, "free_memory": False})


def test_the_stock_loader_applies_the_lora_part(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path, graph = write(server, unet), Graph()
    stock = graph.add("LoraLoaderModelOnly", model=graph.checkpoint()[0], lora_name=path.name, strength_model=1.0)
    (found,) = in_the_host(server, graph, stock[0], [(4, 0.3)])
    expected = tcd_scheduler_sample(
        merged(unet, load_file(path), 1.0), host_noise(SEED), timestep_grid(4), eta=0.3, seed=SEED
    )
    assert relative_error(found, expected) < 1e-4


def test_strength_0_leaves_the_model(server: ComfyServer, unet: UNet2DConditionModel) -> None:
    path, graph = write(server, unet), Graph()
    (found,) = in_the_host(server, graph, loaded(graph, path, 0.0), [(2, 0.3)])
    expected = tcd_scheduler_sample(unet, host_noise(SEED), timestep_grid(2), eta=0.3, seed=SEED)
    assert relative_error(found, expected) < 1e-4


def _without(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "target_input", "complaint"),
    [
        (lambda tensors: _without("tcd_target_time.in.bias", tensors), "s", "the file is damaged"),
        (lambda tensors: tensors, "s/t", "the input 's/t', but this version knows only s and t-s"),
        (
            lambda tensors: tensors | {"tcd_target_time.in.bias": torch.full((1280,), torch.nan)},
            "s",
            "numbers that are not finite",
        ),
        (
            lambda tensors: (
                split_target_time(tensors)[0]
                | {f"tcd_target_time.{name}": each for name, each in TargetTime(32, 128).state_dict().items()}
            ),
            "s",
            r"its embedding of the target time has the width 128, but the model's own, of t, has 1280 \(time_embed.2\)",
        ),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(
    server: ComfyServer, unet: UNet2DConditionModel, change: Any, target_input: str, complaint: str
) -> None:
    tensors = change(load_file(write(server, unet)))
    path = server.models / "loras" / "target-time-wrong.safetensors"
    save_file(tensors, path, metadata={TARGET_TIME_KEY: target_input})
    graph = Graph()
    graph.save(graph.sampler_custom(model=loaded(graph, path))[0])
    with pytest.raises(ComfyError, match=complaint):
        server.run(graph)
