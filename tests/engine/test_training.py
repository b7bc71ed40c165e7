"""A few steps of consistency distillation on every small stand-in, in float32 and in 8 bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from families import FAMILIES, written
from quantized_files import FLOAT8, write_quantized
from small_models import Batch, add_student, batch_for, each_family, load, open_network
from torch import Tensor

from trajectory_consistency.nodes.host.training import HostNetwork
from trajectory_consistency.tcd import TimePoint
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.tcd.objective import Follow, first_order, huber, tcd_loss


def loss_of(network: HostNetwork, batch: Batch) -> Tensor:
    """The consistency distillation loss, with a guided teacher: the network without its adapter."""
    unconds, guidance = batch.unconds * len(batch.conds), torch.full((len(batch.conds),), 2.0)

    def student(conds: list[Any]) -> Follow:
        return first_order(lambda x_t, t, s: network.x0(x_t, t, conds, s))

    def teacher(x_t: Tensor, t: TimePoint, _: TimePoint) -> Tensor:
        with network.adapter.off():
            return network.guided_x0(x_t, t, batch.conds, unconds, guidance)

    rows = torch.tensor([0])  # the second example is on the diagonal
    return tcd_loss(
        student(batch.conds),
        student(batch.conds[:1]),
        teacher,
        batch.x0,
        batch.eps,
        batch.points,
        target_rows=rows,
        distance=partial(huber, c=1e-3),
    ).mean()


def train(network: HostNetwork, batch: Batch, steps: int = 4) -> list[float]:
    weights = add_student(network, fresh=True, target_input="s")
    network.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(weights.parameters(), lr=3e-4, weight_decay=0)
    losses = []
    for _ in range(steps):
        loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@each_family
def test_the_loss_falls(name: str, folder: Path) -> None:
    with open_network(name, folder) as network:
        losses = train(network, batch_for(name, network))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("kind", ["plain", "scaled"])
@each_family
def test_a_base_in_8_bits_trains(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    family, path = FAMILIES[name], tmp_path / "scaled.safetensors"
    with torch.inference_mode():  # as in a graph of the host
        patcher = load(name, folder, dtype=FLOAT8)
        if kind == "scaled":
            write_quantized(written(name, folder), path, "scaled float8", family.prefix)
            patcher = family.load(path)
    network = HostNetwork(patcher, family.time_linear)
    batch = batch_for(name, network)
    with torch.no_grad():
        before = network.x0(batch.x_t, batch.points.t, batch.conds)
    with network:
        losses = train(network, batch)
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]
        assert all(parameter.isfinite().all() for parameter in network.adapter.weights[STUDENT].parameters())
        with torch.no_grad(), network.adapter.off():
            assert torch.equal(network.x0(batch.x_t, batch.points.t, batch.conds), before)
    with torch.no_grad():
        assert torch.equal(network.x0(batch.x_t, batch.points.t, batch.conds), before)
    weights = [parameter.data for parameter in network.network.parameters()]
    if kind == "plain":
        assert any(weight.dtype == FLOAT8 for weight in weights)
    else:
        assert any(isinstance(weight, QuantizedTensor) for weight in weights)
