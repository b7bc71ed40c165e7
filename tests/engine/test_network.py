"""HostNetwork on every small stand-in: what it predicts, and what it leaves in the host's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from small_models import add_student, batch_for, each_family, load, open_network, relative, sampled_x0, shortened
from torch import Tensor

from trajectory_consistency.nodes.host.target_time import install_target_time
from trajectory_consistency.nodes.host.training import HostNetwork, differentiable_kernels
from trajectory_consistency.tcd import FlowSchedule, TargetTime
from trajectory_consistency.tcd.adapter import STUDENT

WITH_GUIDANCE_INPUT = {"flux", "flux2", "hunyuan-video"}


@each_family
def test_with_the_adapter_off_it_is_the_model_that_the_host_samples_from(name: str, folder: Path) -> None:
    network = open_network(name, folder)
    batch = batch_for(name, network)
    cond = batch.conds[0]
    sigma = network.schedule.sigmas_for(4)[1]
    point = network.schedule.point_at(sigma.expand(2), batch.x0.ndim)
    x = batch.x_t  # taken as noisy latents at sigma, in the sampling scale
    x_t = x if isinstance(network.schedule, FlowSchedule) else x * point.level.alpha
    plain = sampled_x0(load(name, folder), x, sigma, cond)
    guided = sampled_x0(load(name, folder), x, sigma, cond, batch.unconds[0], cfg=3.0)
    add_student(network)
    with torch.no_grad():
        changed = network.x0(x_t, point, [cond, cond])
        with network.adapter.off():
            found = network.x0(x_t, point, [cond, cond])
            if isinstance(network.schedule, FlowSchedule):
                assert torch.equal(found, plain)
            else:  # the way from the training scale to the host's rounds
                assert relative(found, plain) < 1e-6
            if not network.takes_guidance:
                found = network.guided_x0(x_t, point, [cond, cond], batch.unconds, torch.full((2,), 3.0))
                assert relative(found, guided) < 1e-5
    assert changed.dtype == torch.float32 and relative(changed, plain) > 1e-3


@each_family
def test_adapter_off_and_closed_network_give_the_bits_of_before(name: str, folder: Path) -> None:
    network = open_network(name, folder)
    batch = batch_for(name, network)
    modules = {path: dict(vars(module)) for path, module in network.network.named_modules()}
    with torch.no_grad():
        before = batch.predict(network)
        with differentiable_kernels():
            same_kernels = batch.predict(network)
    with network:
        weights = add_student(network, fresh=True)
        network.enable_gradient_checkpointing()
        with torch.no_grad():
            assert torch.equal(batch.predict(network), same_kernels), "a fresh adapter changes nothing"
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
        for _ in range(2):
            batch.predict(network).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            assert not torch.equal(batch.predict(network), same_kernels)
            with network.adapter.off():
                assert torch.equal(batch.predict(network), before)
    assert all(parameter.grad is None for parameter in network.model.parameters())
    with torch.no_grad():
        assert torch.equal(batch.predict(network), before)
    assert {path: dict(vars(module)) for path, module in network.network.named_modules()} == modules


@each_family
def test_a_batch_equals_its_rows_one_by_one_whatever_their_lengths(name: str, folder: Path) -> None:
    network = open_network(name, folder)
    batch = batch_for(name, network)
    add_student(network, target_input="s")
    rows = torch.tensor([0, 1, 1, 0])
    x_t, t, s = batch.x_t[rows], batch.points.t.rows(rows), batch.points.s.rows(torch.tensor([0, 1, 0, 1]))
    equal = [FAMILIES[name].conditioning(seed) for seed in range(4)]
    unequal = [equal[0], shortened(equal[1]), shortened(equal[2]), equal[3]]
    for conds in (equal, unequal):
        with torch.no_grad():
            together = network.x0(x_t, t, conds, s)
            for i, cond in enumerate(conds):
                row = slice(i, i + 1)
                alone = network.x0(x_t[row], t.rows(row), [cond], s.rows(row))
                assert relative(together[row], alone) < 1e-5


@each_family
def test_the_guidance_scale_is_an_input_or_weighs_two_captions(name: str, folder: Path) -> None:
    network = open_network(name, folder)
    assert network.takes_guidance == (name in WITH_GUIDANCE_INPUT)
    batch = batch_for(name, network)
    t, scales = batch.points.t, torch.tensor([1.0, 5.0])
    calls = []
    network.network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        guided = network.guided_x0(batch.x_t, t, batch.conds, batch.unconds, scales)
        assert calls == [2 if network.takes_guidance else 4]
        if network.takes_guidance:
            conds = [
                [[cond[0][0], {**cond[0][1], "guidance": float(w)}]]
                for cond, w in zip(batch.conds, scales, strict=True)
            ]
            expected = network.x0(batch.x_t, t, conds)
            assert not torch.equal(expected, network.x0(batch.x_t, t, batch.conds))
        else:
            c, u = network.x0(batch.x_t, t, batch.conds), network.x0(batch.x_t, t, batch.unconds * 2)
            expected = u + scales.view(-1, *[1] * (c.ndim - 1)) * (c - u)
    assert relative(guided, expected) < 1e-5


@each_family
def test_the_target_time_reaches_the_network_row_by_row(name: str, folder: Path) -> None:
    network = open_network(name, folder)
    batch = batch_for(name, network)
    t, s = batch.points.t, batch.points.s
    with torch.no_grad():
        without = network.x0(batch.x_t, t, batch.conds)
        weights = add_student(network, fresh=True, target_input="s")
        fresh = network.x0(batch.x_t, t, batch.conds, s)
        assert relative(fresh, without) < 1e-6, "its output starts at zero"
        assert weights.target_time is not None
        assert weights.target_time.channels == (320 if name == "sd15" else 256), "as wide as the network's own sinusoid"
        torch.nn.init.normal_(weights.target_time["out"].weight, std=0.1)
        with pytest.raises(ValueError, match="embedding of the target time: give s"):
            network.x0(batch.x_t, t, batch.conds)
        together = network.x0(batch.x_t, t, batch.conds, s)
        for i in range(2):
            row = slice(i, i + 1)
            alone = network.x0(batch.x_t[row], t.rows(row), batch.conds[row], s.rows(row))
            assert relative(together[row], alone) < 1e-5
            other = network.x0(batch.x_t[row], t.rows(row), batch.conds[row], s.rows(slice(1 - i, 2 - i)))
            assert relative(other, alone) > 1e-5
    if not network.takes_guidance:
        both = network.guided_x0(batch.x_t, t, batch.conds, batch.unconds, torch.ones(2), s)
        assert relative(both.detach(), together) < 1e-5


def test_a_model_that_was_loaded_in_inference_mode_can_be_trained(folder: Path) -> None:
    """As in a graph of the host, which runs in inference mode."""
    with torch.inference_mode():
        patcher = load("sd3", folder)
    assert any(parameter.is_inference() for parameter in patcher.model.parameters())
    state = {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}
    with torch.inference_mode():
        network = HostNetwork(patcher, FAMILIES["sd3"].time_linear)
    tensors = [*network.model.parameters(), *network.model.buffers()]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)
    after = network.model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
    weights = add_student(network)
    batch_for("sd3", network).predict(network).square().mean().backward()
    assert all(parameter.grad is not None for parameter in weights.parameters())


def test_a_model_can_be_trained_after_a_copy_with_a_target_time_was_sampled(folder: Path) -> None:
    """The host leaves the `forward` that it has restored as an attribute of the layer."""
    name = "sd3"
    path, patcher = FAMILIES[name].time_linear, load(name, folder)
    told = patcher.clone()
    install_target_time(told, "lora", path, TargetTime(256, 128), strength=1.0)
    cond, x, sigma = FAMILIES[name].conditioning(0), torch.randn(1, *FAMILIES[name].latent), torch.tensor(0.5)
    sampled_x0(told, x, sigma, cond)
    plain = sampled_x0(patcher, x, sigma, cond)
    assert "forward" in vars(patcher.model.diffusion_model.get_submodule(path))
    with HostNetwork(patcher, path) as network:
        weights = add_student(network, target_input="s")
        batch = batch_for(name, network)
        batch.predict(network).square().mean().backward()
        assert all(parameter.grad is not None for parameter in weights.parameters())
    assert torch.equal(sampled_x0(patcher, x, sigma, cond), plain)


def test_all_weights_are_frozen(folder: Path) -> None:
    patcher = load("sd3", folder)
    patcher.model.requires_grad_(True)
    network = HostNetwork(patcher, FAMILIES["sd3"].time_linear)
    assert not any(parameter.requires_grad for parameter in network.model.parameters())


def test_a_model_whose_weights_may_move_is_refused() -> None:
    class Dynamic:
        def is_dynamic(self) -> bool:
            return True

    with pytest.raises(ValueError, match=r"dynamic VRAM.*disable_dynamic=True"):
        HostNetwork(Dynamic(), "time_embed.2")


def test_each_row_needs_its_conditioning(folder: Path) -> None:
    network = open_network("sd3", folder)
    batch = batch_for("sd3", network)
    with pytest.raises(ValueError, match="there are 1 CONDITIONINGs for 2 rows"):
        network.x0(batch.x_t, batch.points.t, batch.conds[:1])


def test_layers_of_the_text_are_adapted_in_the_state_of_the_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In some families, such as Anima, extra_conds runs layers of the network."""
    network = open_network("sd3", folder)
    batch = batch_for("sd3", network)
    extra_conds, seen = network.model.extra_conds, []

    def embedded(**options: Any) -> Any:
        is_adapted = network.network.context_embedder(options["cross_attn"]).requires_grad
        seen.append((options["prompt_type"], is_adapted))
        return extra_conds(**options)

    monkeypatch.setattr(network.model, "extra_conds", embedded)
    network.adapter.add(STUDENT, network.new_weights(["context_embedder"], rank=2, alpha=2.0, seed=0))
    batch.predict(network)
    assert seen == [("positive", True)] * 2
    seen.clear()
    with network.adapter.off():
        network.guided_x0(batch.x_t, batch.points.t, batch.conds, batch.unconds, torch.ones(2))
    assert seen == [("positive", False)] * 2 + [("negative", False)] * 2


def test_the_network_sees_the_options_of_its_model_and_the_noise_level(folder: Path) -> None:
    """As from the host's sampler: patches that the user's nodes put on the MODEL hold in training too."""
    patcher = load("sd3", folder)
    patcher.model_options["transformer_options"]["from_a_node"] = 3
    network, seen = HostNetwork(patcher, FAMILIES["sd3"].time_linear), []
    network.network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["transformer_options"]), with_kwargs=True
    )
    batch = batch_for("sd3", network)
    batch.predict(network)
    (options,) = seen
    assert options["from_a_node"] == 3
    assert torch.equal(options["sigmas"], batch.points.t.level.sigma.flatten())


def test_new_weights_follow_from_the_seed_alone(folder: Path) -> None:
    network = open_network("sd3", folder)

    def drawn(seed: int) -> list[Tensor]:
        weights = network.new_weights(["t_embedder.mlp.0"], rank=2, alpha=2.0, seed=seed, target_input="t-s")
        return list(weights.tensors().values())

    before = torch.random.get_rng_state()
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    differ = [not torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    assert sum(differ) == 3, "down, and the first layer of the embedding; all else begins at zero"
