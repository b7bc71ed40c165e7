"""Which Linear of ComfyUI is computed together with its LoRA."""

from __future__ import annotations

from pathlib import Path

import comfy.ops
import pytest
import torch
from families import FAMILIES, written
from quantized_files import FLOAT8, write_float8
from small_models import add_student, batch_for, load, open_network
from torch import Tensor, nn

from trajectory_consistency.nodes.host.training import HostNetwork
from trajectory_consistency.nodes.host.training.frozen_linear import is_frozen_linear
from trajectory_consistency.tcd.adapter import STUDENT, layer_shape


def linear(operations: type) -> nn.Linear:
    layer: nn.Linear = operations.Linear(4, 4, dtype=torch.float32, device="cpu")  # type: ignore[attr-defined]
    return layer.requires_grad_(False)


@pytest.mark.parametrize("operations", [comfy.ops.disable_weight_init, comfy.ops.manual_cast])
def test_the_hosts_own_linear_is_a_plain_one_until_its_weights_change(operations: type) -> None:
    assert is_frozen_linear(linear(operations))
    for name in ("weight_function", "bias_function"):
        layer = linear(operations)
        setattr(layer, name, [lambda weight: 2 * weight])
        assert not is_frozen_linear(layer), name
    moved = linear(operations)
    moved._v = object()
    assert not is_frozen_linear(moved), "in dynamic VRAM"
    assert not is_frozen_linear(linear(operations).requires_grad_(True)), "its own gradient would be lost"


def test_a_subclass_may_compute_something_else() -> None:
    class Other(comfy.ops.manual_cast.Linear):  # type: ignore[misc]
        pass

    assert not is_frozen_linear(Other(4, 4, dtype=torch.float32, device="cpu").requires_grad_(False))
    assert not is_frozen_linear(nn.Linear(4, 4).requires_grad_(False))


def test_gradient_hooks_of_all_weights_are_called(folder: Path) -> None:
    with open_network("sd3", folder) as network:
        batch, weights, called = batch_for("sd3", network), add_student(network), []
        network.enable_gradient_checkpointing()
        for name, parameter in weights.named_parameters():
            parameter.register_hook(lambda _, name=name: called.append(name))
        network.x0(batch.x_t, batch.points.t, batch.conds).square().mean().backward()
    assert sorted(called) == sorted(name for name, _ in weights.named_parameters())


def gradients(network: HostNetwork, name: str, plain: bool) -> dict[str, Tensor]:
    """Return the output of a training call and the gradients of the adapter's weights, by name.

    plain: compute each Linear and its LoRA one after the other.
    """
    batch = batch_for(name, network)
    weights = add_student(network)
    network.adapter.is_frozen_linear = (lambda _: False) if plain else is_frozen_linear
    output = network.x0(batch.x_t, batch.points.t, batch.conds)
    output.square().mean().backward()
    found = {path: parameter.grad for path, parameter in weights.named_parameters() if parameter.grad is not None}
    network.adapter.remove(STUDENT)
    return {**found, "output": output.detach()}


@pytest.mark.parametrize("name", [*FAMILIES, "flux in float8"])
def test_together_they_give_what_one_after_the_other_gives(name: str, folder: Path, tmp_path: Path) -> None:
    family, path = name.removesuffix(" in float8"), tmp_path / "float8.safetensors"
    if family == name:
        model = load(name, folder)
    else:
        write_float8(written(family, folder), path)
        model = FAMILIES[family].load(path, dtype=FLOAT8)
    with HostNetwork(model, FAMILIES[family].time_linear) as network:
        network.enable_gradient_checkpointing()
        count = sum(map(is_frozen_linear, network.network.modules()))
        assert count > 0.8 * sum(len(layer_shape(module) or ()) == 2 for module in network.network.modules())
        assert any(weight.dtype == FLOAT8 for weight in network.network.parameters()) == (family != name)
        together, apart = (gradients(network, family, plain) for plain in (False, True))
    tolerance = 1e-5 if family == name else 2e-2  # a float8 network computes in bfloat16 or float32
    largest = max(each.norm() for each in apart.values())
    for each, expected in apart.items():
        assert (together[each] - expected).norm() < tolerance * expected.norm() + 1e-6 * largest, each
