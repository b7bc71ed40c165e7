"""TCF(S+): the student gets s and the teacher never does, the embedding is trained, kept, written and read back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from tiny_base import context, model_of, random_dataset, small_config, with_adapter, write_inputs
from trajectory_consistency.tcd import DiscreteSchedule, TargetInput, TimePoint, scaled_linear_alpha_bar
from trajectory_consistency.tcd.adapter import AVERAGE, FILE, STUDENT
from trajectory_consistency.tcd.distill import step_losses
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.tcd.distill.optimizer import make_optimizer, set_learning_rates
from trajectory_consistency.trainer import run
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.adapter_weights import file_tensors, load_weights, start_from
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.training import examples, loop
from trajectory_consistency.trainer.training.memory import MemorySettings, estimate_memory

Values = dict[str, dict[str, object]]
EMBEDDING = [f"tcd_target_time.{name}" for name in ("in.bias", "in.weight", "out.bias", "out.weight")]
SCHEDULE = DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar())
X_T, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([499, 999])
NEAR, FAR = torch.tensor([479, 979]), torch.tensor([0, 259])
COND = context(torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(2)))


@pytest.fixture
def values(tmp_path: Path) -> Values:
    values = write_inputs(tmp_path)
    values["method"] = {"target_time": True}
    return values


@pytest.fixture
def base(values: Values) -> Path:
    return Path(str(values["base"]["path"]))


def student(base: Path, target_input: TargetInput | None = "s", *, trained: bool = True) -> UNetModel:
    """A tiny network with an adapter, filled as if it had been trained."""
    model = model_of(base)
    with_adapter(model, alpha=2.0, targets=("attention",), target_input=target_input, effect=0.1 if trained else 0.0)
    return model


@torch.no_grad()
def x0(model: UNetModel, s: torch.Tensor | None) -> torch.Tensor:
    return model.x0(X_T, SCHEDULE.point(T, 4), COND, None if s is None else SCHEDULE.point(s, 4))


def test_the_student_heeds_s_and_the_teacher_does_not(base: Path) -> None:
    model = student(base)
    assert not torch.allclose(x0(model, NEAR), x0(model, FAR), atol=1e-3)
    with model.adapter.off():
        assert torch.equal(x0(model, NEAR), x0(model_of(base), None))
        assert torch.equal(x0(model, FAR), x0(model, None))
    assert not torch.allclose(x0(model, NEAR), x0(model, FAR), atol=1e-3), "the student is back"
    with pytest.raises(ValueError, match="has an embedding of the target time: give s"):
        x0(model, None)


def test_the_embedding_of_s_is_added_to_what_the_network_makes_of_t(base: Path) -> None:
    """So to the output of the last Linear of its MLP: after its activation, as in the nodes."""
    model, outputs = student(base), []
    model.network.time_embedding.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x0(model, FAR)
    with model.adapter.off():
        x0(model, None)
    embedding = model.adapter.weights[STUDENT].target_time
    assert embedding is not None
    torch.testing.assert_close(outputs[0], outputs[1] + embedding(T, FAR), rtol=0, atol=0)


def test_weights_with_an_embedding_of_s_and_without_share_a_network(base: Path, tmp_path: Path) -> None:
    expected, paths = {}, {}
    for name, target_input in (("with", "s"), ("without", None)):
        model = student(base, target_input)
        paths[name] = tmp_path / f"{name}.safetensors"
        tensors = file_tensors(model, model.adapter.weights[STUDENT])
        save_file(tensors, paths[name], {"tcd.target_time": "s"})
        expected[name] = x0(model, FAR)
    both = model_of(base)
    for name, path in paths.items():
        both.adapter.add(name, load_weights(both, path))
    for name in ("with", "without", "with"):
        with both.adapter.using(name):
            assert torch.allclose(x0(both, FAR), expected[name], atol=1e-5), name


def test_a_network_without_weights_is_the_teacher_as_it_is(base: Path) -> None:
    model = model_of(base)
    with model.adapter.off():
        assert torch.equal(x0(model, None), x0(model_of(base), None))


def test_a_network_whose_weights_were_removed_is_as_it_was_loaded(base: Path) -> None:
    model, untouched = student(base), model_of(base)
    model.adapter.eject()
    assert torch.equal(x0(model, None), x0(untouched, None))
    assert not any("forward" in vars(module) for module in model.network.modules())
    assert list(model.network.state_dict()) == list(untouched.network.state_dict())


def test_at_first_the_embedding_changes_nothing(base: Path) -> None:
    plain = student(base, None, trained=False)
    for target_input in ("s", "t-s"):
        model = student(base, target_input, trained=False)
        assert torch.equal(x0(model, NEAR), x0(plain, None)) and torch.equal(x0(model, FAR), x0(plain, NEAR))


def test_t_minus_s_is_a_different_input_than_s(base: Path) -> None:
    assert torch.equal(x0(student(base, "t-s"), FAR), x0(student(base, "s"), T - FAR))


def test_both_ends_of_the_loss_get_s_and_the_teacher_does_not(
    base: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = student(base), small_config(values, batch=4)
    rows = examples.read_examples(settings, random_dataset(), model.schedule, 0, slice(0, 4))
    seen: list[tuple[list[int], list[int] | None]] = []
    real = UNetModel._predict

    def watched(self: UNetModel, x_t: torch.Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None) -> object:
        seen.append((t.network_time.tolist(), None if s is None else s.network_time.tolist()))
        return real(self, x_t, t, cond, s)

    monkeypatch.setattr(UNetModel, "_predict", watched)
    step_losses(model, rows, settings.method)
    t, t_next, s = (time.tolist() for time in rows.times)
    target_rows = [k for k in range(4) if s[k] < t_next[k]]
    assert len(target_rows) > 0 and rows.target_rows.tolist() == target_rows
    assert seen == [(t + t, None), ([t_next[k] for k in target_rows], [s[k] for k in target_rows]), (t, s)]


def test_the_embedding_has_a_learning_rate_of_its_own(base: Path, values: Values) -> None:
    settings = small_config(values, lr=1e-3, target_time_lr=1e-2, steps=10).training
    weights = with_adapter(model_of(base), alpha=2.0, target_input="s")
    assert weights.target_time is not None
    parameters, embedding = list(weights.parameters()), list(weights.target_time.parameters())
    optimizer = make_optimizer(torch.optim.AdamW, parameters, settings, embedding)
    assert set_learning_rates(optimizer, 5, settings) == pytest.approx(5e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(embedding) == 4 and len(rates) == len(parameters)
    assert all(rates[id(p)] == pytest.approx(5e-3 if any(p is e for e in embedding) else 5e-4) for p in parameters)


def test_the_average_has_an_embedding_too(base: Path, values: Values) -> None:
    values["method"] |= {"ema_decay": 0.5}
    model = student(base)
    before = x0(model, FAR)
    training = loop.Training(model, random_dataset(), small_config(values, steps=1, target_time_lr=0.1))
    training.train_step()
    with model.adapter.using(AVERAGE):
        average = x0(model, FAR)
    assert not torch.allclose(x0(model, FAR), before, atol=1e-3) and not torch.equal(average, before)
    embeddings = [model.adapter.weights[state].target_time for state in (STUDENT, AVERAGE)]
    ours, theirs = (each["out"].weight for each in embeddings if each is not None)
    assert not torch.equal(ours, theirs)


def test_a_run_writes_what_it_trained(values: Values, tmp_path: Path) -> None:
    values["preview"] = {"prompts": ["a red circle"], "steps": [1], "every": 2}
    path = run.run(small_config(values, steps=3, lr=1e-2, target_time_lr=1e-2))
    with safe_open(path, "pt") as file:
        assert file.metadata()["tcd.target_time"] == "s"
        assert sorted(name for name in file.keys() if name.startswith("tcd_")) == EMBEDDING  # noqa: SIM118
        assert file.get_tensor("tcd_target_time.out.weight").any()
    net = model_of(Path(str(values["base"]["path"])))
    net.adapter.add(FILE, load_weights(net, path))
    assert not torch.allclose(x0(net, NEAR), x0(net, FAR), atol=1e-5)


def test_a_run_without_the_target_time_has_none_of_it(values: Values, base: Path) -> None:
    assert student(base, None).adapter.target_time is None
    del values["method"]
    path = run.run(small_config(values, steps=1))
    with safe_open(path, "pt") as file:
        assert file.metadata()["tcd.target_time"] == "none"
        assert not any(name.startswith("tcd_") for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("method", [{}, {"ema_decay": 0.5}, {"target_input": "t-s"}])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    values: Values, method: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["method"] |= method
    folder = Path(str(values["output"]["folder"]))
    whole = load_file(run.run(small_config(values, steps=4, checkpoint_every=1)))
    values["output"]["folder"] = str(folder.with_name("again"))
    settings = small_config(values, steps=4, checkpoint_every=1)
    real = distill_training.step_losses
    calls = iter(range(100))

    def failing(*arguments: object) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(distill_training, "step_losses", failing)
    with pytest.raises(KeyboardInterrupt):
        run.run(settings)
    again = load_file(run.run(settings))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_lora_may_stay_as_it_is(values: Values) -> None:
    plain = {**values, "output": {"folder": str(values["output"]["folder"]) + "-plain"}}
    del plain["method"]
    start = run.run(small_config(plain, steps=2, lr=1e-2))
    values["adapter"] |= {"start_from": str(start), "freeze": True}
    values["method"] |= {"ema_decay": 0.5}
    settings = small_config(values, steps=3)
    frozen = load_file(run.run(settings))
    before = load_file(start)
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert sorted(frozen.keys() - before.keys()) == EMBEDDING and frozen["tcd_target_time.out.weight"].any()
    with pytest.raises(UserError, match="freeze leaves nothing to train"):
        small_config({**values, "method": {}})


def test_it_needs_no_second_order(values: Values) -> None:
    with pytest.raises(UserError, match="so use order 1"):
        small_config({**values, "method": {"target_time": True, "order": 2}})


def test_a_frozen_lora_costs_no_gradient(values: Values, base: Path) -> None:
    values["adapter"] |= {"freeze": True}
    settings = small_config(values, steps=2, batch=2)
    checkpoint = UNetCheckpoint(settings.base)
    model = run.load_student(settings, checkpoint, torch.device("cpu"), torch.float32)
    weights = model.adapter.weights[STUDENT]
    assert weights.target_time is not None
    with loop.Training(model, random_dataset(), settings) as training:
        training.train_step()
        assert training.parameters == list(weights.target_time.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in weights.loras.parameters())


def test_training_starts_from_a_file_with_an_embedding(values: Values, base: Path) -> None:
    start = run.run(small_config(values, steps=2, lr=1e-2))
    model = model_of(base)
    start_from(model, with_adapter(model, alpha=2.0, seed=5, target_input="s"), start)
    fresh = model_of(base)
    fresh.adapter.add(FILE, load_weights(fresh, start))
    torch.testing.assert_close(x0(model, FAR), x0(fresh, FAR), rtol=1e-4, atol=1e-5)
    for target_input in ("t-s", None):
        model = model_of(base)
        weights = with_adapter(model, alpha=2.0, seed=5, target_input=target_input)
        with pytest.raises(UserError, match='use method.target_time = true and method.target_input = "s"'):
            start_from(model, weights, start)


def test_files_are_described_renamed_and_merged_as_far_as_can_be(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.run(small_config(values, steps=1))
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "target    the network gets the target time, as s" in said and "a LoRA for tiny" in said
    assert main(["export", str(path), str(tmp_path / "bf16.safetensors"), "--dtype", "bfloat16"]) == 0
    tensors = load_file(tmp_path / "bf16.safetensors")
    assert tensors["tcd_target_time.in.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(
        tensors["tcd_target_time.in.weight"].float(),
        load_file(path)["tcd_target_time.in.weight"].float(),
        rtol=0.01,
        atol=0.01,
    )
    for options in (["--names", "peft"], ["--into", str(values["base"]["path"])]):
        assert main(["export", str(path), str(tmp_path / "no.safetensors"), *options]) == 2
        assert "has an embedding of the target time" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()
    damaged = {name: tensor for name, tensor in load_file(path).items() if name != "tcd_target_time.in.bias"}
    save_file(damaged, tmp_path / "damaged.safetensors")
    assert main(["inspect", str(tmp_path / "damaged.safetensors")]) == 2
    assert "the file is damaged" in capsys.readouterr().err


def test_its_memory_is_in_the_estimate(values: Values) -> None:
    def total() -> int:
        config = small_config(values)
        return estimate_memory(UNetCheckpoint(config.base), MemorySettings.from_config(config, torch.float32)).adapter

    embedded = total()
    del values["method"]
    assert embedded - total() == (32 * 128 + 128 + 128 * 128 + 128) * 4 * 3  # and two moments
