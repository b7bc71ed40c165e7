"""Gradients, with and without recomputation, and what an exception leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import comfy.model_management
import comfy_kitchen
import pytest
import torch
from small_models import Batch, add_student, batch_for, each_family, open_network
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

from trajectory_consistency.nodes.host.training import HostNetwork, recomputing, saved_tensors
from trajectory_consistency.nodes.host.training.recompute import blocks
from trajectory_consistency.tcd import Adapter, AdapterWeights
from trajectory_consistency.tcd.adapter import STUDENT, new_weights


def loss_of(network: HostNetwork, batch: Batch) -> Tensor:
    """A random projection of the prediction, summed in float64, so that differences of it keep their digits."""
    projection = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (batch.predict(network).double() * projection).sum()


def gradients(network: HostNetwork, batch: Batch, weights: AdapterWeights) -> Tensor:
    for parameter in weights.parameters():
        parameter.grad = None
    loss_of(network, batch).backward()
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in weights.parameters()]
    )


@torch.no_grad()
def moved(weights: AdapterWeights, direction: Tensor, step: float) -> None:
    place = 0
    for parameter in weights.parameters():
        part = direction[place : place + parameter.numel()]
        parameter += step * part.view_as(parameter)
        place += parameter.numel()


def central_difference(loss: Callable[[], Tensor], weights: AdapterWeights, direction: Tensor, h: float) -> float:
    """The derivative of the loss along a direction, with an error of order h^4."""
    values = {}
    for step in (-2, -1, 1, 2):
        moved(weights, direction, step * h)
        with torch.no_grad():
            values[step] = loss().item()
        moved(weights, direction, -step * h)
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)


@each_family
def test_gradients_with_and_without_recomputation_equal_central_differences(name: str, folder: Path) -> None:
    network = open_network(name, folder)
    batch = batch_for(name, network)
    weights = add_student(network)
    with allow_mutation_on_saved_tensors():  # an independent way: everything is kept
        kept = gradients(network, batch, weights)
    with network:
        network.enable_gradient_checkpointing()
        recomputed = gradients(network, batch, weights)
        assert (recomputed - kept).norm() < 1e-5 * kept.norm()
        saved = [block.forward.saved for block in blocks(network.network)]
        with watched_runs() as again:
            assert torch.equal(gradients(network, batch, weights), recomputed)
        assert not again and all(each.written is not None for each in saved), (
            "from the second run on, nothing is watched"
        )
        direction = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        expected = (kept @ direction).item()
        found = central_difference(lambda: loss_of(network, batch), weights, direction, h=1e-3)
    assert found == pytest.approx(expected, rel=2e-3)


@each_family
def test_an_exception_leaves_nothing_in_the_host(name: str, folder: Path) -> None:
    """In the forward pass by the host's Cancel; in the backward pass, where a block runs again, by Ctrl-C."""
    network = open_network(name, folder)
    batch = batch_for(name, network)
    before = host_state(network)
    with torch.no_grad():
        expected = batch.predict(network)

    def interrupt(*_: object) -> None:
        if torch.is_grad_enabled():  # only in the second run of a block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), network:
        add_student(network)
        network.enable_gradient_checkpointing()
        block = blocks(network.network)[-1]
        cancel = block.register_forward_pre_hook(lambda *_: comfy.model_management.interrupt_current_processing())
        with cancel, pytest.raises(comfy.model_management.InterruptProcessingException):
            batch.predict(network)
        inner = next(module for module in block.modules() if "forward" in vars(module) and module is not block)
        with inner.register_forward_hook(interrupt):
            batch.predict(network).sum().backward()
    assert host_state(network) == before
    with torch.no_grad():
        assert torch.equal(batch.predict(network), expected)
    assert torch._C._len_torch_dispatch_stack() == 0


def host_state(network: HostNetwork) -> list[object]:
    modules = [vars(module).copy() for module in network.model.modules()]
    return [modules, dict(vars(comfy_kitchen)), comfy.model_management.in_training]


def test_the_backward_pass_uses_the_state_of_the_forward_pass(folder: Path) -> None:
    network = open_network("sd3", folder)
    batch = batch_for("sd3", network)
    weights = add_student(network)
    network.enable_gradient_checkpointing()
    expected = gradients(network, batch, weights)
    loss = loss_of(network, batch)
    weights.zero_grad()
    with network.adapter.off():
        loss.backward()
    found = torch.cat([parameter.grad.flatten().double() for parameter in weights.parameters()])
    assert torch.equal(found, expected)


class Modulation(NamedTuple):
    scale: Tensor


@dataclass
class Shift:
    shift: Tensor
    factor: float


class InPlace(nn.Module):
    """A block that writes over its inputs, and has tensors in containers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, options: dict[str, Any], *, shift: Shift, extra: list[Any]) -> dict[str, Any]:
        modulation: Modulation = options["modulation"]
        extra[0].mul_(0.5)
        x += options["index"] * modulation.scale * self.linear(x.sin())
        x.mul_(extra[0]).add_(shift.shift * shift.factor)
        return {"x": x, "constant": extra[0].detach(), "number": 3}


class Small(nn.Module):
    """A network of two such blocks, in containers, and a single layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Sequential(InPlace()), nn.ModuleList([InPlace()]), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x, options = self.first(x), {}
        for index, (block,) in enumerate(self.layers[:2]):
            options |= {"modulation": Modulation(x.cos()), "index": index + 1.0}
            output = block(x, options, shift=Shift(x.tanh(), 0.5), extra=[x.sigmoid(), None])
            assert output["number"] == 3
            x = output["x"] * output["constant"]
        return self.layers[2](x)

    def without_writing(self, x: Tensor) -> Tensor:
        """The same, from operations that write over nothing."""
        x = self.first(x)
        for index, (block,) in enumerate(self.layers[:2]):
            gate = x.sigmoid() * 0.5
            y = x + (index + 1.0) * x.cos() * block.linear(x.sin())
            x = (y * gate + x.tanh() * 0.5) * gate.detach()
        return self.layers[2](x)


def adapted(network: nn.Module, within: str = "") -> tuple[Adapter, AdapterWeights]:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter).requires_grad_(False)
    adapter = Adapter(network, "first")
    linears = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    paths = [path for path in linears if path.startswith(within)]
    weights = adapter.add(STUDENT, new_weights(network, paths, rank=2, alpha=2.0, seed=0))
    for parameter in weights.parameters():
        nn.init.normal_(parameter)
    return adapter, weights


@pytest.mark.parametrize("within", ["", "layers.0"], ids=["everywhere", "only in the first block"])
def test_tensors_in_all_containers_keep_their_gradients(within: str) -> None:
    network = Small()
    adapter, weights = adapted(network, within)
    x = torch.randn(3, 4)
    expected = torch.autograd.grad(network.without_writing(x).square().sum(), list(weights.parameters()))
    with recomputing(adapter):
        network(x).square().sum().backward()
    for parameter, gradient in zip(weights.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5)


def test_it_keeps_only_the_inputs_of_blocks_and_restores_their_forward() -> None:
    network = Small()
    adapter, _ = adapted(network)
    inner = [network.layers[0][0], network.layers[1][0]]
    assert blocks(network) == inner
    kept: dict[bool, int] = {}
    for again in (False, True):
        saved: list[Tensor] = []
        with ExitStack() as stack:
            if again:
                stack.enter_context(recomputing(adapter))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda y, to=saved: to.append(y), lambda y: y))
            network(torch.randn(3, 4))
        kept[again] = len(saved)
    assert kept[True] < kept[False]
    assert not any("forward" in vars(block) for block in inner)


class WritesViews(nn.Module):
    """A block that saves a tensor, or a part of it, and writes over a part, or the whole."""

    def __init__(self, is_part_saved: bool) -> None:
        super().__init__()
        self.linear, self.is_part_saved = nn.Linear(4, 4), is_part_saved

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.is_part_saved:
            z = y[1:].sin()
            y *= 3
            return torch.cat([y[:1], z])
        z = y.sin()
        y[1:] *= 3
        return y * z

    def without_writing(self, x: Tensor) -> Tensor:
        """The same, from operations that write over nothing."""
        y = self.linear(x)
        if self.is_part_saved:
            return torch.cat([3 * y[:1], y[1:].sin()])
        return torch.cat([y[:1], 3 * y[1:]]) * y.sin()


class OfViews(nn.Module):
    """A network of one such block."""

    def __init__(self, is_part_saved: bool) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(4, 4), nn.ModuleList([WritesViews(is_part_saved)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.first(x))


@pytest.mark.parametrize("is_part_saved", [True, False], ids=["a part is saved", "a part is written over"])
def test_writing_through_another_view_of_a_saved_tensor_keeps_the_gradient(is_part_saved: bool) -> None:
    network = OfViews(is_part_saved)
    adapter, weights = adapted(network)
    x = torch.randn(3, 4)
    output = network.layers[0].without_writing(network.first(x))
    expected = torch.autograd.grad(output.square().sum(), list(weights.parameters()))
    with recomputing(adapter):
        network(x).square().sum().backward()
    for parameter, gradient in zip(weights.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5)


@contextmanager
def watched_runs() -> Iterator[list[object]]:
    """Give a list with an entry for each run within the block that looks at every operation."""
    found: list[object] = []
    original = saved_tensors._CopyBeforeWrite.__enter__

    def enter(self: Any) -> Any:
        found.append(self)
        return original(self)

    with mock.patch.object(saved_tensors._CopyBeforeWrite, "__enter__", enter):
        yield found


class WritesOver(nn.Module):
    """Writes over a saved tensor, or not, through another view of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        squares = y.square() + y[:, :2].square().sum()  # both save y
        if self.writes:
            y[:, 1:3] *= 3
        return squares + y


def test_a_run_that_writes_over_other_tensors_than_the_first_one_starts_again() -> None:
    network = OfViews(is_part_saved=True)
    network.layers = nn.ModuleList([WritesOver()])
    adapter, weights = adapted(network)
    x, (block,) = torch.randn(3, 4), network.layers

    def gradients_of(writes: bool) -> list[Tensor]:
        block.writes = writes
        weights.zero_grad()
        network(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in weights.parameters()]

    def expected_of(writes: bool) -> list[Tensor]:
        y = block.linear(network.first(x))
        factor = torch.tensor([1.0, 3.0, 3.0, 1.0]) if writes else torch.ones(4)
        output = y.square() + y[:, :2].square().sum() + factor * y
        return list(torch.autograd.grad(output.square().sum(), list(weights.parameters())))

    expected = {writes: expected_of(writes) for writes in (False, True)}
    with recomputing(adapter):
        # The runs that look at every operation: the first one, and the first that writes over something new.
        for writes, is_watched in ((False, True), (False, False), (True, True), (True, False), (False, False)):
            with watched_runs() as watched:
                found = gradients_of(writes)
            assert bool(watched) == is_watched, (writes, is_watched)
            for gradient, right in zip(found, expected[writes], strict=True):
                assert torch.allclose(gradient, right, rtol=1e-5), writes
        assert block.forward.saved.written


def test_one_tensor_that_is_saved_twice_is_copied_once() -> None:
    saved, copies = saved_tensors.SavedTensors(), []

    def forward() -> Tensor:
        x = torch.ones(5, requires_grad=True).clone()
        y = x.sin() + x.cos()
        x.mul_(2)
        return (y + x).sum()

    for _ in range(2):
        with mock.patch.object(Tensor, "clone", lambda each, clone=Tensor.clone: copies.append(each) or clone(each)):
            saved.run(forward)
    assert len(saved.written) == 2 and len(copies) == 4, "x itself, and one copy of it, in each of two runs"


def test_a_block_without_anything_to_train_is_passed_through() -> None:
    network = Small().requires_grad_(False)
    adapter, _ = adapted(network)
    x = torch.randn(3, 4, requires_grad=True)
    options = {"modulation": Modulation(torch.ones(4)), "index": 1.0}
    with recomputing(adapter), adapter.off():
        y = blocks(network)[0](torch.randn(3, 4), options, shift=Shift(torch.ones(4), 1.0), extra=[torch.ones(4)])["x"]
        (y * x).sum().backward()
    assert torch.equal(x.grad, y)


def test_without_gradients_a_block_gets_its_own_inputs_and_no_copies() -> None:
    network = Small()
    adapter, _ = adapted(network)
    x, one = torch.randn(3, 4), torch.ones(4)
    with torch.no_grad(), recomputing(adapter):
        output = blocks(network)[0](
            x, {"modulation": Modulation(one), "index": 1.0}, shift=Shift(one, 1.0), extra=[one]
        )
    assert output["x"] is x


def test_a_block_with_a_replaced_forward_is_refused_and_the_others_are_restored() -> None:
    network = Small()
    adapter, _ = adapted(network)
    first, second = blocks(network)
    second.forward = lambda *_: None
    with pytest.raises(ValueError, match="the block InPlace has a replaced forward already"), recomputing(adapter):
        pass
    assert "forward" not in vars(first) and "forward" in vars(second)
