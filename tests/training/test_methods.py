"""Every method that a configuration can ask for, trained for a few steps on a real, tiny UNet."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from tiny_base import context, model_of, random_dataset, small_config, with_adapter
from trajectory_consistency.tcd.adapter import AVERAGE, OFF, STUDENT
from trajectory_consistency.tcd.distill import examples as distill_examples
from trajectory_consistency.tcd.times import Times, sample_times
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.training import loop

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
        net = model_of(checkpoint)
        weights = with_adapter(net)
        losses = loop.train(net, random_dataset(), small_config(values, steps=4, batch=4))
        return losses, weights.tensors()

    (losses, state), (again, same) = trained(METHODS[method]), trained(METHODS[method])
    assert losses == again and all(torch.equal(state[key], same[key]) for key in state)
    assert all(math.isfinite(loss) for loss in losses)
    assert method == "tcd" or trained({})[0] != losses


def test_stages_have_equal_shares_of_the_steps(
    values: dict[str, dict[str, object]], net: UNetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(*arguments: object, phases: int, **options: object) -> Times:
        seen.append(phases)
        return sample_times(*arguments, phases=phases, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(distill_examples, "sample_times", watched)
    values["method"] = {"law": "segment", "phases": [8, 4, 2]}
    with_adapter(net)
    for step in range(6):
        config = small_config(values, steps=6, batch=1)
        distill_examples.draw_times_and_guidance(config.method, config.training, net.schedule, step)
    assert seen == [8, 8, 4, 4, 2, 2]


def test_the_average_follows_the_adapter_and_is_not_trained(
    values: dict[str, dict[str, object]], net: UNetModel
) -> None:
    values["method"] = {"ema_decay": 0.9}
    student = with_adapter(net)
    training = loop.Training(net, random_dataset(), small_config(values, steps=4))
    average = net.adapter.weights[AVERAGE]
    assert training.parameters == list(student.parameters())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    expected = {name: tensor.detach().clone() for name, tensor in student.tensors().items()}
    for _ in range(3):
        training.train_step()
        for name, tensor in student.tensors().items():
            expected[name] = 0.9 * expected[name] + 0.1 * tensor.detach()
    for name, tensor in average.tensors().items():
        torch.testing.assert_close(tensor, expected[name])
    assert not all(torch.equal(tensor, student.tensors()[name]) for name, tensor in average.tensors().items())


def test_student_teacher_and_average_are_one_network_in_three_states(net: UNetModel) -> None:
    student = with_adapter(net)
    net.adapter.add(AVERAGE, deepcopy(student))
    net.adapter.state = STUDENT
    x_t, t, cond = torch.randn(1, 4, 8, 8), net.schedule.point(torch.tensor([499]), 4), context(torch.randn(1, 77, 32))
    with torch.no_grad():
        start = net.x0(x_t, t, cond)
        for parameter in student.parameters():
            parameter += 0.1
        trained = net.x0(x_t, t, cond)
        assert not torch.equal(trained, start)
        for state, expected in ((AVERAGE, start), (OFF, start), (STUDENT, trained)):
            with net.adapter.using(state):
                assert torch.equal(net.x0(x_t, t, cond), expected), state
        assert torch.equal(net.x0(x_t, t, cond), trained)
