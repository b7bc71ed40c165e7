"""Every method that a configuration can ask for, trained for a few steps on a real, tiny UNet."""

import math
from pathlib import Path

import pytest
import torch

from tiny_base import network, random_dataset, small_config, write_base, write_inputs
from trajectory_consistency.tcd.times import Times, sample_times
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet import adapter
from trajectory_consistency.trainer.models.unet.network import Network
from trajectory_consistency.trainer.training import loop, step


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def net(checkpoint: Path) -> Network:
    return network(checkpoint)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, dict[str, object]]:
    return write_inputs(tmp_path)


METHODS = {
    "tcd": {},
    "lcm": {"law": "zero"},
    "tscd": {"law": "segment"},
    "pcm": {"law": "phase", "phases": [4]},
    "tdd": {"law": "target"},
    "second order": {"order": 2},
    "average": {"ema_decay": 0.5},
    "one huber a picture": {"distance": "huber_sample"},
    "l2": {"distance": "l2"},
    "by the gap": {"weighting": "gap"},
    "by x0": {"weighting": "x0"},
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_in_its_own_way_and_the_same_each_time(
    values: dict[str, dict[str, object]], checkpoint: Path, method: str
) -> None:
    def trained(settings: dict[str, object]) -> tuple[list[float], dict[str, torch.Tensor]]:
        values["method"] = settings
        net = network(checkpoint)
        parameters = adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0)
        losses = loop.train(net, parameters, random_dataset(), small_config(values, steps=4, batch=4))
        return losses, adapter.adapter_state(net.unet)

    (losses, state), (again, same) = trained(METHODS[method]), trained(METHODS[method])
    assert losses == again and all(torch.equal(state[key], same[key]) for key in state)
    assert all(math.isfinite(loss) for loss in losses)
    assert method == "tcd" or trained({})[0] != losses


def test_stages_have_equal_shares_of_the_steps(
    values: dict[str, dict[str, object]], net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(*arguments: object, phases: int, **options: object) -> Times:
        seen.append(phases)
        return sample_times(*arguments, phases=phases, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "sample_times", watched)
    values["method"] = {"law": "segment", "phases": [8, 4, 2]}
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0)
    loop.train(net, parameters, random_dataset(), small_config(values, steps=6, batch=1))
    assert seen == [8, 8, 4, 4, 2, 2]


def test_the_average_follows_the_adapter_and_is_not_trained(net: Network) -> None:
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0)
    adapter.add_average(net.unet)
    assert [p for p in net.unet.parameters() if p.requires_grad] == parameters
    x_t, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([499]), Conditioning(torch.randn(1, 77, 32))
    with torch.no_grad():
        start = net.x0(x_t, t, cond)
        for parameter in parameters:
            parameter += 0.1
        trained = net.x0(x_t, t, cond)
        with adapter.averaged(net.unet):
            assert torch.equal(net.x0(x_t, t, cond), start), "the average has not moved yet"
        adapter.update_average(net.unet, 0.0)
        with adapter.averaged(net.unet):
            assert torch.equal(net.x0(x_t, t, cond), trained)
        assert torch.equal(net.x0(x_t, t, cond), trained)
        with adapter.adapters_off(net.unet):
            teacher = net.x0(x_t, t, cond)
        assert not torch.equal(teacher, trained)
    assert set(adapter.adapter_state(net.unet)) and not any("average" in key for key in adapter.adapter_state(net.unet))
