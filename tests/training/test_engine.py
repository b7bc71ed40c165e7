"""Ways to train with less memory or more speed: each gives what the plain way gives."""

import logging
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from tiny_base import context, model_of, random_dataset, small_config, with_adapter, write_inputs
from trajectory_consistency.tcd import DiscreteSchedule, scaled_linear_alpha_bar
from trajectory_consistency.tcd.adapter import AVERAGE, STUDENT
from trajectory_consistency.tcd.distill import StepRecord
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.tcd.distill.memory import MemoryFullError, memory_advice
from trajectory_consistency.tcd.distill.optimizer import lr_factor
from trajectory_consistency.tcd.unet_layers import GROUPS, TARGETS
from trajectory_consistency.trainer.config.memory_advice import caching_advice, training_advice
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.adapter_weights import start_from
from trajectory_consistency.trainer.files.write_lora import write_lora
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.preflight import Inputs, check
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training import loop
from trajectory_consistency.trainer.training.checkpoint import Checkpoints
from trajectory_consistency.trainer.training.compiled import compile_network

Values = dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    return write_inputs(tmp_path_factory.mktemp("inputs"), pictures=1)


def adapted(checkpoint: Path, dtype: torch.dtype = torch.float32) -> tuple[UNetModel, list[torch.nn.Parameter]]:
    """The tiny network in a dtype, with an adapter that has an effect."""
    net = model_of(checkpoint, dtype)
    return net, list(with_adapter(net, alpha=2.0, effect=0.02).parameters())


def records(net: UNetModel, config: Config) -> list[StepRecord]:
    seen: list[StepRecord] = []
    loop.train(net, random_dataset(), config, observers=[seen.append])
    return seen


def test_an_observer_gets_the_record_of_each_step_when_it_is_done(checkpoint: Path, values: Values) -> None:
    net, parameters = adapted(checkpoint)
    config = small_config(values, steps=3, batch=4, warmup_steps=1)
    states: list[torch.Tensor] = []
    seen: list[StepRecord] = []
    observers = [seen.append, lambda _: states.append(parameters[1].detach().clone())]
    losses = loop.train(net, random_dataset(), config, observers=observers)
    assert [record.step for record in seen] == [1, 2, 3] and [record.loss for record in seen] == losses
    assert [record.lr / 1e-3 for record in seen] == [lr_factor(step, 3, 1) for step in range(3)]
    for record in seen:
        assert record.t.shape == record.s.shape == record.losses.shape == (4,) and (record.s < record.t).all()
        assert record.losses.mean().item() == pytest.approx(record.loss) and record.norm > 0
        assert record.images == 4 and record.seconds > 0
    assert torch.equal(states[-1], parameters[1]) and not torch.equal(states[0], states[-1])


def test_gradient_checkpointing_changes_no_bit(checkpoint: Path, values: Values) -> None:
    net, parameters = adapted(checkpoint)
    plain = records(net, small_config(values))
    other, others = adapted(checkpoint)
    calls = []
    other.network.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    frugal = records(other, small_config(values, gradient_checkpointing=True))
    assert [(r.loss, r.norm) for r in frugal] == [(r.loss, r.norm) for r in plain]
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert sum(calls) == 4, "with a gradient it is run twice in each of two steps: forward, and again for the gradient"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_trains_float32_masters(checkpoint: Path, values: Values, dtype: torch.dtype) -> None:
    net, parameters = adapted(checkpoint)
    expected = records(net, small_config(values))
    half, masters = adapted(checkpoint, dtype)
    got = records(half, small_config(values))
    assert {parameter.dtype for parameter in masters} == {torch.float32}
    assert half.network.conv_in.weight.dtype == dtype
    for ours, exact in zip(got, expected, strict=True):
        assert ours.loss == pytest.approx(exact.loss, rel=0.1) and ours.norm == pytest.approx(exact.norm, rel=0.3)


def test_small_gradients_are_not_lost_in_float16(
    checkpoint: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss as small as that of large pictures, whose mean is over so many elements."""
    real = distill_training.step_losses
    monkeypatch.setattr(distill_training, "step_losses", lambda *arguments: 1e-4 * real(*arguments))
    config = small_config(values, steps=1)
    exact = records(adapted(checkpoint)[0], config)[0].norm
    assert records(adapted(checkpoint, torch.float16)[0], config)[0].norm == pytest.approx(exact, rel=0.3)
    monkeypatch.setattr("trajectory_consistency.tcd.distill.loss_scale.FIRST", 1.0)
    lost = records(adapted(checkpoint, torch.float16)[0], config)[0].norm
    assert abs(lost - exact) > 0.3 * exact


def small_network() -> UNetModel:
    """A network that is compiled in seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            mid_block_type=None,
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        )
    unet.requires_grad_(False)
    return UNetModel(unet, DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar()), "eps")


def states_of(net: UNetModel, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Student, teacher, average, and the student again, from the same noise, and the student's gradient."""
    x_t = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    t, cond = net.schedule.point(torch.tensor([999, 19]), 4), context(torch.ones(2, 77, 32))
    predict: Callable[[], torch.Tensor] = lambda: net.x0(x_t, t, cond)  # noqa: E731
    with torch.no_grad():
        found = [predict()]
        with net.adapter.off():
            found.append(predict())
        with net.adapter.using(AVERAGE):
            found.append(predict())
        found.append(predict())
    predict().square().mean().backward()
    return [*found, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])]


def test_a_compiled_unet_is_student_teacher_and_average_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the front end, which decides what is compiled anew and what is not; the code it then makes is torch's own."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # of every step of the compiler

    def states(compiled: bool) -> list[torch.Tensor]:
        net = small_network()
        student = with_adapter(net, rank=2, alpha=2.0, effect=0.02)
        net.adapter.add(AVERAGE, deepcopy(student))
        net.adapter.state = STUDENT
        parameters = list(student.parameters())
        for parameter in parameters:
            parameter.data += 0.02
        if compiled:
            compile_network(net.network, backend="eager")
        first = states_of(net, parameters)
        student.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(first, states_of(net, parameters), strict=True))
        return first

    plain, compiled = states(False), states(True)
    for expected, got in zip(plain, compiled, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    student, teacher, average, again, _ = compiled
    assert torch.equal(student, again) and not torch.allclose(student, teacher, atol=1e-3)
    assert not torch.allclose(student, average, atol=1e-3) and not torch.equal(teacher, average)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler for what inductor writes")
def test_a_run_through_the_compilers_own_code_has_the_losses_of_one_without(checkpoint: Path, values: Values) -> None:
    def few() -> UNetModel:
        net = model_of(checkpoint)  # with an adapter on few layers, of which each is much to compile
        with_adapter(net, alpha=2.0, targets=("to_q", "conv2"), effect=0.02)
        return net

    plain = records(few(), small_config(values, steps=2, batch=2))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = records(few(), small_config(values, steps=2, batch=2, compile=True))
    assert counters["stats"]["unique_graphs"] >= 3, "the student with a gradient and without, and the teacher"
    for expected, got in zip(plain, compiled, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-4) and got.norm == pytest.approx(expected.norm, rel=1e-3)


@pytest.mark.parametrize(("targets", "kinds"), [(["attention"], GROUPS["attention"]), (["conv1", "to_q"], None)])
def test_the_adapter_is_on_its_targets_alone(checkpoint: Path, targets: list[str], kinds: tuple[str, ...]) -> None:
    net = model_of(checkpoint)
    weights = with_adapter(net, rank=2, targets=tuple(targets))
    wanted = tuple(f".{kind}" for kind in kinds or targets)
    assert set(weights.paths) == {name for name, _ in net.network.named_modules() if name.endswith(wanted)}


def test_targets_that_do_not_exist_are_refused(values: Values) -> None:
    for targets in ([], ["attention", "to_qq"]):
        with pytest.raises(UserError, match=r"adapter.targets is .*use the groups all, .* or the kinds to_q, "):
            check(from_mapping({**values, "adapter": {"targets": targets}}))
    assert set(TARGETS) == set(GROUPS["all"]) and len(TARGETS) == 14


def test_training_starts_from_a_lora_file(checkpoint: Path, values: Values, tmp_path: Path) -> None:
    net, _ = adapted(checkpoint)
    path = tmp_path / "lora.safetensors"
    write_lora(path, net, small_config(values), {}, context(torch.ones(1, 77, 32)))

    def started(rank: int = 4, alpha: float = 2.0, targets: tuple[str, ...] = ("all",)) -> dict[str, torch.Tensor]:
        model = model_of(checkpoint)
        weights = with_adapter(model, rank=rank, alpha=alpha, seed=5, targets=targets)
        start_from(model, weights, path)
        return weights.tensors()

    expected, got = net.adapter.weights[STUDENT].tensors(), started()
    assert expected.keys() == got.keys() and all(torch.equal(expected[key].half().float(), got[key]) for key in got)
    with pytest.raises(UserError, match="use its adapter.rank, 4, and adapter.alpha, 2"):
        started(rank=8)
    with pytest.raises(UserError, match="use its adapter.rank, 4, and adapter.alpha, 2"):
        started(alpha=4.0)
    with pytest.raises(UserError, match="not in both are .*the adapter.targets that it was trained with"):
        started(targets=("attention",))
    path.write_bytes(b"no LoRA")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        started()


def test_a_lora_to_start_from_that_does_not_fit_is_refused_before_anything_is_done(
    checkpoint: Path, values: Values, tmp_path: Path
) -> None:
    net, _ = adapted(checkpoint)
    path, other = tmp_path / "lora.safetensors", tmp_path / "sd15.safetensors"
    write_lora(path, net, small_config(values), {}, context(torch.ones(1, 77, 32)))
    down, up = torch.ones(4, 320), torch.ones(320, 4)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, other)

    def begun(file: Path = path, **settings: object) -> Inputs:
        return check(
            from_mapping({**values, "adapter": {"rank": 4, "alpha": 2.0, "start_from": str(file), **settings}})
        )

    begun()
    for settings in ({"rank": 8}, {"alpha": 4.0}):
        with pytest.raises(UserError, match="use its adapter.rank, 4, and adapter.alpha, 2"):
            begun(**settings)
    with pytest.raises(UserError, match="not in both are .*the adapter.targets that it was trained with"):
        begun(targets=["attention"])
    with pytest.raises(UserError, match="not in both are .*use a LoRA for this base"):
        begun(other)
    with pytest.raises(UserError, match="is not a LoRA"):
        begun(checkpoint)
    other.write_bytes(b"no LoRA")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        begun(other)


def test_what_is_not_there_is_said_before_anything_is_done(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="adapter.start_from is /none/x.safetensors, where there is no file"):
        check(from_mapping({**values, "adapter": {"start_from": "/none/x.safetensors"}}))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="needs bitsandbytes .*pip install bitsandbytes, or use adamw"):
        check(small_config(values, optimizer="adamw8bit"))


def test_an_optimizer_in_8_bits_goes_on_from_a_checkpoint_to_the_last_bit(
    checkpoint: Path, values: Values, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    config = small_config(values, steps=4, batch=2, optimizer="adamw8bit", weight_decay=0.1)

    def begun() -> loop.Training:
        net = model_of(checkpoint)
        with_adapter(net, rank=64, alpha=64.0)  # below 4096 numbers it keeps 32 bits
        return loop.Training(net, random_dataset(), config)

    whole = begun()
    for _ in range(4):
        whole.train_step()
    half = begun()
    for _ in range(2):
        half.train_step()
    checkpoints = Checkpoints(tmp_path, 1, 1)
    checkpoints.save(2, half.state_dict())
    saved = checkpoints.load_latest()
    assert saved is not None
    kept = [tensor for name, tensor in saved.items() if name.startswith("optimizer.")]
    assert {tensor.dtype for tensor in kept} == {torch.uint8, torch.float32, torch.int64}
    again = begun()
    again.load_state_dict(saved)
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.state_dict().items())
    for _ in range(2):
        again.train_step()
    expected, got = whole.state_dict(), again.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_full_memory_is_distinguished_from_other_errors(values: Values) -> None:
    advice = training_advice(small_config(values), 3, can_recompute=True)
    for full in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 1")):
        with pytest.raises(MemoryFullError, match="out of memory with 3 pictures of 64 px"), memory_advice(advice):
            raise full
    with pytest.raises(RuntimeError, match="a shape is wrong"), memory_advice(advice):
        raise RuntimeError("a shape is wrong")


PHASES = {
    "trainer.models.unet.text.TextEncoder.encode": "pictures of 64 px were encoded into the cache",
    "trainer.models.unet.single_file.SingleFile.unet": "the base's network was loaded: close other programs",
    "trainer.views.preview.Previews.start": "a preview of 64 x 64 px was drawn. Use a smaller preview.width",
    "trainer.views.preview.Previews._draw_student": "a preview of 64 x 64 px was drawn",
    "trainer.views.preview.Previews.__call__": "a preview of 64 x 64 px was drawn",
    "tcd.distill.training.step_losses": "with 3 pictures of 64 px at a time. Use training.gradient_checkpointing=true",
}


@pytest.mark.parametrize("where", PHASES)
def test_a_full_memory_is_answered_with_what_helps_there(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(f"trajectory_consistency.{where}", full)
    values = {**values, "data": {**values["data"], "cache": str(tmp_path / "cache")}}
    values |= {"output": {"folder": str(tmp_path / "out")}, "preview": {"prompts": ["a circle"], "steps": [1]}}
    with pytest.raises(MemoryFullError) as caught:
        run(small_config(values))
    assert PHASES[where] in str(caught.value)


@pytest.mark.parametrize("why", ["the setting", "the engine"])
def test_recomputing_is_not_advised_where_it_changes_nothing(
    why: str, values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trajectory_consistency.tcd.distill.training.step_losses", full)
    monkeypatch.setattr(UNetModel, "always_recomputes", why == "the engine")
    values = {**values, "data": {**values["data"], "cache": str(tmp_path / "cache")}}
    values |= {"output": {"folder": str(tmp_path / "out")}}
    values["training"] = {**values.get("training", {}), "gradient_checkpointing": why == "the setting"}
    with pytest.raises(MemoryFullError, match=r"at a time\. Use a larger training\.accumulate"):
        run(small_config(values))


def test_where_the_cache_can_be_filled_instead_is_said() -> None:
    config = from_mapping({"base": {"path": "tiny"}, "data": {"folder": "."}, "output": {"folder": "out"}})
    on_gpu = caching_advice(config, torch.device("cuda"), torch.bfloat16)
    assert "tcd-train cache, with the same configuration and training.device=cpu base.dtype=bfloat16" in on_gpu
    assert "tcd-train cache" not in caching_advice(config, torch.device("cpu"), torch.float32)
