"""The trainer's parts on a real, tiny UNet: network, adapter, loop and file."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from tiny_base import context, model_of, random_dataset, small_config, with_adapter
from trajectory_consistency.tcd import (
    DiscreteSchedule,
    TimePoint,
    coverage,
    kohya_name,
    scaled_linear_alpha_bar,
    timestep_grid,
)
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.tcd.distill import StepRecord
from trajectory_consistency.tcd.distill import examples as distill_examples
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.tcd.distill.loss_scale import GROWS_AFTER, LossScale
from trajectory_consistency.tcd.distill.optimizer import lr_factor
from trajectory_consistency.tcd.distill.sampling import initial_noise, sample_latents
from trajectory_consistency.tcd.times import Times, sample_times
from trajectory_consistency.tcd.unet_layers import TARGETS
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files import write_lora as files_write
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.files.write_lora import VerificationError, write_lora
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.preflight import check
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training import examples, loop

COND = context(torch.randn((3, 77, 32), generator=torch.Generator().manual_seed(5)))
UNCOND = context(torch.zeros(1, 77, 32))
SCHEDULE = DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar())


def noisy(seed: int = 0) -> tuple[torch.Tensor, TimePoint]:
    return initial_noise(seed, (3, 4, 8, 8)), SCHEDULE.point(torch.tensor([999, 499, 19]), 4)


def shake(parameters: list[torch.nn.Parameter]) -> None:
    """Give an adapter an effect: LoRA starts as the identity."""
    generator = torch.Generator().manual_seed(9)
    for parameter in parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_guidance_one_is_the_caption_and_zero_is_no_caption(net: UNetModel) -> None:
    x_t, t = noisy()
    with torch.no_grad():
        cond, free = net.x0(x_t, t, COND), net.x0(x_t, t, UNCOND.expand(3))
        for guidance, expected in ((1.0, cond), (0.0, free), (3.0, free + 3 * (cond - free))):
            got = net.guided_x0(x_t, t, COND, UNCOND, torch.full((3,), guidance))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_guidance_belongs_to_its_own_picture(net: UNetModel) -> None:
    x_t, t = noisy()
    with torch.no_grad():
        whole = net.guided_x0(x_t, t, COND, UNCOND, torch.tensor([1.0, 4.0, 7.0]))
        alone = net.guided_x0(x_t[1:2], t.rows(slice(1, 2)), COND[1:2], UNCOND, torch.tensor([4.0]))
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_gamma_zero_is_the_teachers_ddim(net: UNetModel, prediction: str) -> None:
    net = UNetModel(net.network, net.schedule, prediction)  # type: ignore[arg-type]
    noise = initial_noise(1, (3, 4, 8, 8))
    got = sample_latents(net, COND, sigmas=net.schedule.sigmas_for(5), gamma=0.0, noise=noise, seed=0)
    ddim = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
    )
    ddim.set_timesteps(5)
    ddim.timesteps = torch.tensor(timestep_grid(5))  # 999, 799 ... 199: as far apart as its own
    x = noise
    with torch.no_grad():
        for t in ddim.timesteps:
            x = ddim.step(net.network(x, t, COND.tensors["context"]).sample, t, x).prev_sample
    assert ((got - x).norm() / x.norm()).item() < 1e-5


def test_a_new_adapter_is_the_identity_and_the_only_thing_that_trains(net: UNetModel) -> None:
    x_t, t = noisy()
    before = net.x0(x_t, t, COND)
    parameters = list(with_adapter(net).parameters())
    torch.testing.assert_close(net.x0(x_t, t, COND), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in net.network.parameters())
    assert len(parameters) > 100 and all(parameter.requires_grad for parameter in parameters)


def test_every_kind_of_target_is_met_and_masters_are_float32(checkpoint: Path) -> None:
    net = model_of(checkpoint, torch.bfloat16)
    weights = with_adapter(net)
    assert {parameter.dtype for parameter in weights.parameters()} == {torch.float32} and net.dtype == torch.bfloat16
    for target in TARGETS:
        assert any(path.endswith(f".{target}") for path in weights.paths), target


def test_the_teacher_is_the_base_and_the_student_comes_back_after_an_error(net: UNetModel) -> None:
    x_t, t = noisy()
    with torch.no_grad():
        base = net.x0(x_t, t, COND)
        with_adapter(net, effect=0.05)
        student = net.x0(x_t, t, COND)
        assert not torch.allclose(student, base)
        with pytest.raises(KeyError), net.adapter.off():
            torch.testing.assert_close(net.x0(x_t, t, COND), base, rtol=0, atol=0)
            raise KeyError
        torch.testing.assert_close(net.x0(x_t, t, COND), student, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_adapter(checkpoint: Path) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        return [p.data for p in with_adapter(model_of(checkpoint), seed=seed).parameters()]

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, start(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, start(1), strict=True))


def write(net: UNetModel, values: dict[str, dict[str, object]], path: Path, *, final: bool = True) -> None:
    write_lora(path, net, small_config(values), {"tcd.law": "uniform"}, COND[:1], final=final)


def other_alpha(monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    """Let files be written with another alpha than was trained with."""
    real = files_write.file_tensors

    def wrong(*arguments: object) -> dict[str, torch.Tensor]:
        tensors = real(*arguments)  # type: ignore[arg-type]
        return {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in tensors.items()}

    monkeypatch.setattr(files_write, "file_tensors", wrong)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_written_file_gives_what_was_trained(
    net: UNetModel, checkpoint: Path, values: dict[str, dict[str, object]], tmp_path: Path, dtype: str
) -> None:
    values["output"]["dtype"] = dtype
    with_adapter(net, alpha=2.0, effect=0.05)
    path = tmp_path / "lora.safetensors"
    write(net, values, path)
    x_t, t = noisy()
    fresh = model_of(checkpoint)
    with torch.no_grad():
        base, trained = fresh.x0(x_t, t, COND), net.x0(x_t, t, COND)
        fresh.adapter.add(FILE, load_weights(fresh, path))
        loaded = fresh.x0(x_t, t, COND)
    limit = {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
    assert ((loaded - trained).norm() / (trained - base).norm()).item() < 10 * limit
    assert ((trained - base).norm() / base.norm()).item() > 0.05


def test_a_written_file_is_not_blamed_for_the_rounding_of_a_half_precision_base(
    net: UNetModel, values: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    net.network.to(torch.bfloat16)
    with_adapter(net, alpha=2.0, effect=0.05)
    write(net, values, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too_a_file_with_another_effect_does_not_get_its_name(
    net: UNetModel,
    values: dict[str, dict[str, object]],
    tmp_path: Path,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net.network.to(dtype)
    with_adapter(net, alpha=2.0, effect=0.05)
    other_alpha(monkeypatch, 4.0)
    with pytest.raises(VerificationError, match="away from the trained one"):
        write(net, values, tmp_path / "lora.safetensors")


def test_every_tensor_of_the_file_has_a_kohya_name_that_fits_the_model(
    net: UNetModel, values: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    shapes = {
        kohya_name(name): tuple(m.weight.shape) for name, m in net.network.named_modules() if hasattr(m, "weight")
    }
    with_adapter(net, alpha=2.0, effect=0.05)
    write(net, values, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    assert coverage(state, shapes).complete
    alphas = [value.item() for key, value in state.items() if key.endswith(".alpha")]
    assert len(alphas) == len(state) / 3 and set(alphas) == {2.0}


def test_a_file_without_effect_or_with_another_does_not_get_its_name(
    net: UNetModel, values: dict[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "files" / "lora.safetensors"
    path.parent.mkdir()
    parameters = list(with_adapter(net, alpha=2.0).parameters())
    with pytest.raises(VerificationError, match="changes nothing"):
        write(net, values, path)
    shake(parameters)
    other_alpha(monkeypatch, 16.0)
    with pytest.raises(VerificationError, match="away from the trained one"):
        write(net, values, path)
    assert list(path.parent.iterdir()) == []


def test_a_file_without_effect_on_the_way_is_warned_of_and_kept(
    net: UNetModel, values: dict[str, dict[str, object]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = list(with_adapter(net, alpha=2.0).parameters())
    path = tmp_path / "preview.safetensors"
    write(net, values, path, final=False)
    assert path.is_file() and f"{path} changes nothing yet" in caplog.text
    caplog.clear()
    shake(parameters)
    write(net, values, path, final=False)
    assert not caplog.text


def test_a_preview_before_the_lora_has_an_effect_does_not_end_the_run(
    values: dict[str, dict[str, object]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["preview"] = {"prompts": ["a red circle"], "steps": [1], "every": 1}
    real = distill_training.set_learning_rates
    # The first step is at the rate of the end, 0: as one in a bfloat16 base that is below its rounding.
    monkeypatch.setattr(
        distill_training, "set_learning_rates", lambda optimizer, step, training: real(optimizer, 2 - step, training)
    )
    run(small_config(values))
    assert "tcd-lora-step-000001.safetensors changes nothing yet" in caplog.text


@pytest.mark.parametrize(
    ("training", "method", "adapted"),
    [
        ({"lr": 0}, {}, {}),
        ({"lr": 0, "target_time_lr": 0}, {"target_time": True}, {}),
        ({"target_time_lr": 0}, {"target_time": True}, {"freeze": True}),
    ],
)
def test_rates_with_which_nothing_is_trained_are_refused(
    values: dict[str, dict[str, object]],
    training: dict[str, object],
    method: dict[str, object],
    adapted: dict[str, object],
) -> None:
    values |= {"method": method, "adapter": values["adapter"] | adapted}
    with pytest.raises(UserError, match=r"training.lr is .*nothing would be trained: use more than 0"):
        check(small_config(values, **training))
    values["method"] = {"target_time": True}
    check(small_config(values, **{**training, "target_time_lr": 1e-3}))


def test_a_failed_write_leaves_the_old_file_alone(
    net: UNetModel, values: dict[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "files" / "lora.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"the old one")
    with_adapter(net, alpha=2.0, effect=0.05)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trajectory_consistency.tcd.files.atomic.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(net, values, path)
    assert [entry.read_bytes() for entry in path.parent.iterdir()] == [b"the old one"]


def test_a_file_that_is_no_lora_for_the_model(net: UNetModel, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    complaints = {
        tmp_path / "cut.safetensors": "is not a complete safetensors file",
        tmp_path / "none.safetensors": "there is no file",
        checkpoint: "is not a LoRA",
    }
    for path, complaint in complaints.items():
        with pytest.raises(UserError, match=complaint):
            load_weights(net, path)


def test_a_run_writes_the_file_its_metadata_and_its_configuration(values: dict[str, dict[str, object]]) -> None:
    config = small_config(values)
    path = run(config)
    assert path == config.lora_path
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "checkpoints",
        "config.toml",
        "log.csv",
        "log.txt",
        "loss_by_time.csv",
        "report.html",
        path.name,
    ]
    assert (path.parent / "config.toml").read_text(encoding="utf-8") == config.to_toml()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "tcd.law": "uniform",
        "tcd.steps": "4",
        "tcd.eta": "0.0",
        "tcd.cfg": "1.0",
        "tcd.grid": "50",
        "tcd.skip": "20",
        "tcd.resolution": "64",
        "modelspec.prediction_type": "epsilon",
    }
    assert expected.items() <= metadata.items()


def test_two_runs_are_equal_to_the_last_bit_and_another_seed_is_not(
    values: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    def lora(name: str, **training: object) -> dict[str, torch.Tensor]:
        values["output"]["folder"] = str(tmp_path / name)
        return load_file(run(small_config(values, **training)))

    first, second, other = lora("a"), lora("b"), lora("c", seed=1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_training_learns_the_teachers_guided_step(
    values: dict[str, dict[str, object]], net: UNetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step(*arguments: object, **options: object) -> Times:
        t, t_next, _ = sample_times(*arguments, **options)  # type: ignore[arg-type]
        return Times(t, t_next, t_next)  # here the loss is plain regression, so it must fall

    real = examples.read_examples
    monkeypatch.setattr(distill_examples, "sample_times", one_step)
    monkeypatch.setattr(
        examples,
        "read_examples",
        lambda config, dataset, schedule, step, rows: real(config, dataset, schedule, 0, rows),
    )
    values["method"] = {"skip": 400, "guidance_min": 8.0, "guidance_max": 8.0}
    config = small_config(values, steps=60, batch=8, lr=5e-3)
    with_adapter(net)
    losses = loop.train(net, random_dataset(), config)
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]


def test_the_gradient_is_clipped_before_the_step(
    values: dict[str, dict[str, object]], net: UNetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(values, steps=1, clip=1e-4)
    parameters = list(with_adapter(net).parameters())
    norms = []
    real = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, closure: None = None) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    rows = examples.read_examples(config, random_dataset(), net.schedule, 0, slice(0, 3))
    distill_training.step_losses(net, rows, config.method).mean().backward()
    assert torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm() > 1e-3
    for parameter in parameters:
        parameter.grad = None
    loop.train(net, random_dataset(), config)
    assert norms == [pytest.approx(1e-4, rel=1e-2)]


def no_number(losses: torch.Tensor) -> torch.Tensor:
    return losses * float("nan")


def infinite_gradient(losses: torch.Tensor) -> torch.Tensor:
    losses.register_hook(lambda gradient: gradient * float("inf"))
    return losses


@pytest.mark.parametrize(
    ("change", "message"),
    [(no_number, "step 3: loss nan"), (infinite_gradient, r"step 3: loss 0\.\d+, .* norm (nan|inf)")],
)
def test_losses_or_gradients_that_are_no_numbers_stop_before_the_weights(
    values: dict[str, dict[str, object]],
    net: UNetModel,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    config = small_config(values, steps=3)
    parameters = list(with_adapter(net).parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    real = distill_training.step_losses
    monkeypatch.setattr(distill_training, "step_losses", lambda *arguments: change(real(*arguments)))
    with pytest.raises(loop.DivergedError, match=f"{message}.*; no step was finite in 3 in a row; try a smaller"):
        loop.train(net, random_dataset(), config)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def no_number_in_one_row(losses: torch.Tensor) -> torch.Tensor:
    return losses * torch.tensor([1.0] * (len(losses) - 1) + [float("nan")])


@pytest.mark.parametrize("change", [no_number, infinite_gradient, no_number_in_one_row])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    values: dict[str, dict[str, object]],
    net: UNetModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    values["method"] = {"ema_decay": 0.5}
    config = small_config(values, steps=3, batch=4, accumulate=2)
    with_adapter(net)
    real, calls = distill_training.step_losses, itertools.count()

    def losses(*arguments: Any) -> torch.Tensor:
        loss = real(*arguments)
        return change(loss) if next(calls) == 3 else loss  # the second part of the second step

    monkeypatch.setattr(distill_training, "step_losses", losses)
    states: list[dict[str, torch.Tensor]] = []
    records: list[StepRecord] = []

    def observe(record: StepRecord) -> None:
        records.append(record)
        states.append(
            {
                f"{which}.{name}": tensor.detach().clone()
                for which, weights in net.adapter.weights.items()
                for name, tensor in weights.tensors().items()
            }
        )

    returned = loop.train(net, random_dataset(), config, observers=[observe])
    assert [record.skipped for record in records] == [math.isnan(loss) for loss in returned] == [False, True, False]
    assert len({name.partition(".")[0] for name in states[0]}) == 2, "the student and its average"
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert "step 2 is skipped: loss " in caplog.text and "step 3" not in caplog.text


def test_what_another_process_found_not_finite_is_skipped_here_too(
    values: dict[str, dict[str, object]], net: UNetModel
) -> None:
    def add_another(tensors: Sequence[torch.Tensor]) -> None:
        tensors[0].view(-1)[0] = float("inf")

    config, parameters = small_config(values, steps=3), list(with_adapter(net).parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with loop.Training(net, random_dataset(), config) as training:
        training.all_reduce = add_another
        record, _ = training.train_step()
    assert record.skipped and math.isfinite(record.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)


def test_the_loss_scale_of_float16_halves_doubles_and_is_known_again_from_the_losses() -> None:
    scale = LossScale(torch.float16)
    past: list[bool] = []
    for finite, value in ((True, 1024), (False, 512), (False, 256)):
        past.append(finite)
        scale.update(finite)
        assert scale.value == value
    for count in range(1, 2 * GROWS_AFTER + 1):
        past.append(True)
        scale.update(True)
        assert scale.value == 256 * 2 ** (count // GROWS_AFTER)
        if count in (1, GROWS_AFTER - 1, GROWS_AFTER):
            again = LossScale(torch.float16, past)
            assert (again.value, again._in_a_row) == (scale.value, scale._in_a_row)
    assert {LossScale(dtype, past).value for dtype in (torch.float32, torch.bfloat16)} == {1.0}


def test_training_in_float16_halves_its_scale_on_overflow_and_resumes_with_it(
    values: dict[str, dict[str, object]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(values, steps=4)

    def begun() -> loop.Training:
        net = model_of(checkpoint, torch.float16)
        with_adapter(net)
        return loop.Training(net, random_dataset(), config)

    whole, again = begun(), begun()
    with monkeypatch.context() as patch:
        real = distill_training.step_losses
        patch.setattr(distill_training, "step_losses", lambda *arguments: infinite_gradient(real(*arguments)))
        whole.train_step()
    assert whole.scale.value == 512.0
    again.load_state_dict(whole.state_dict())
    assert again.scale.value == 512.0
    first, second = whole.train_step()[0], again.train_step()[0]
    assert not first.skipped and (first.loss, first.norm) == (second.loss, second.norm)
    again.scale = LossScale(torch.float32)
    assert again.train_step()[0].norm == pytest.approx(whole.train_step()[0].norm, rel=0.05), "whatever the scale is"


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    factors = [lr_factor(step, 100, 10) for step in range(100)]
    assert factors[:10] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert lr_factor(0, 1, 0) == 1.0
