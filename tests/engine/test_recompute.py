"""Gradients, with and without recomputation, and what an exception leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import Batch, add_student, batch_for, each_family, open_network
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from trajectory_consistency.nodes.host.training import HostNetwork
from trajectory_consistency.tcd import AdapterWeights


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
        direction = torch.randn(kept.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        expected = (kept @ direction).item()
        found = central_difference(lambda: loss_of(network, batch), weights, direction, h=1e-3)
    assert found == pytest.approx(expected, rel=2e-3)
