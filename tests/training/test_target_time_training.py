"""TCF(S+): the student is told s and the teacher never, the embedding is trained, kept, written and read back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from tiny_base import network, random_dataset, small_config, write_inputs
from trajectory_consistency.tcd import TargetInput
from trajectory_consistency.trainer import run
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet import adapter
from trajectory_consistency.trainer.models.unet.network import Network
from trajectory_consistency.trainer.training import loop
from trajectory_consistency.trainer.training.memory import Settings, estimate
from trajectory_consistency.trainer.training.optimizer import make_optimizer, set_rate
from trajectory_consistency.trainer.training.step import draw, step_losses

Values = dict[str, dict[str, object]]
EMBEDDING = [f"tcd_target_time.{name}" for name in ("in.bias", "in.weight", "out.bias", "out.weight")]
X_T, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([499, 999])
NEAR, FAR = torch.tensor([479, 979]), torch.tensor([0, 259])
COND = Conditioning(torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(2)))


@pytest.fixture
def values(tmp_path: Path) -> Values:
    values = write_inputs(tmp_path)
    values["method"] = {"target_time": True}
    return values


@pytest.fixture
def base(values: Values) -> Path:
    return Path(str(values["base"]["path"]))


def student(base: Path, told: TargetInput | None = "s", *, trained: bool = True) -> Network:
    """A tiny network with an adapter, filled as if it had been trained."""
    net = network(base)
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0, targets=("attention",), told=told)
    if trained:
        generator = torch.Generator().manual_seed(3)
        for parameter in parameters:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


@torch.no_grad()
def x0(net: Network, s: torch.Tensor | None) -> torch.Tensor:
    return net.x0(X_T, T, COND, s)


def test_the_student_heeds_s_and_the_teacher_does_not(base: Path) -> None:
    net = student(base)
    assert not torch.allclose(x0(net, NEAR), x0(net, FAR), atol=1e-3)
    with adapter.adapters_off(net.unet):
        assert torch.equal(x0(net, NEAR), x0(network(base), None)) and torch.equal(x0(net, FAR), x0(net, None))
    assert not torch.allclose(x0(net, NEAR), x0(net, FAR), atol=1e-3), "the student is back"
    with pytest.raises(ValueError, match="class_labels"):
        x0(net, None)


def test_an_adapter_that_is_told_and_one_that_is_not_share_a_unet(base: Path, tmp_path: Path) -> None:
    expected = {}
    for name, told in (("told", "s"), ("untold", None)):
        net = student(base, told)
        save_file(adapter.file_tensors(net.unet, 2.0), tmp_path / f"{name}.safetensors", {"tcd.target_time": "s"})
        expected[name] = x0(net, FAR)
    both = network(base)
    for name in expected:
        adapter.load_adapter(both.unet, tmp_path / f"{name}.safetensors", name)
    for name in ("told", "untold", "told"):
        adapter.use_adapter(both.unet, name)
        assert torch.allclose(x0(both, FAR), expected[name], atol=1e-5), name


def test_a_unet_without_adapters_is_the_teacher_as_it_is(base: Path) -> None:
    net = network(base)
    with adapter.adapters_off(net.unet):
        assert torch.equal(x0(net, None), x0(network(base), None))


def test_at_first_it_is_as_if_nothing_were_told(base: Path) -> None:
    untold = student(base, None, trained=False)
    for told in ("s", "t-s"):
        net = student(base, told, trained=False)
        assert torch.equal(x0(net, NEAR), x0(untold, None)) and torch.equal(x0(net, FAR), x0(untold, NEAR))


def test_t_minus_s_is_another_thing_than_s(base: Path) -> None:
    net = student(base, "t-s")
    gap = T - FAR
    with torch.no_grad():
        as_s = student(base, "s")
        expected = as_s.x0(X_T, T, COND, gap)
    assert torch.equal(x0(net, FAR), expected)


def test_both_ends_of_the_loss_are_told_s_and_the_teacher_is_not(
    base: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, settings = student(base), small_config(values, batch=4)
    batch = random_dataset().batch(0, 4, seed=0, caption_dropout=0)
    draws = draw(settings, 0, batch.latents.shape[1:])
    seen: list[tuple[list[int], list[int] | None]] = []
    real = Network._output

    def watched(
        self: Network, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning, s: torch.Tensor | None
    ) -> object:
        seen.append((t.tolist(), None if s is None else s.tolist()))
        return real(self, x_t, t, cond, s)

    monkeypatch.setattr(Network, "_output", watched)
    step_losses(net, batch, draws, settings)
    t, t_next, s = (time.tolist() for time in draws.times)
    far = [k for k in range(4) if s[k] < t_next[k]]
    assert seen == [(t + t, None), ([t_next[k] for k in far], [s[k] for k in far]), (t, s)]


def test_the_embedding_has_a_learning_rate_of_its_own(base: Path, values: Values) -> None:
    settings = small_config(values, lr=1e-3, target_time_lr=1e-2, steps=10).training
    net = network(base)
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0, told="s")
    embedding = adapter.embedding_parameters(net.unet)
    optimizer = make_optimizer(parameters, settings, embedding)
    assert set_rate(optimizer, 5, settings) == pytest.approx(5e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(embedding) == 4 and len(rates) == len(parameters)
    assert all(rates[id(p)] == pytest.approx(5e-3 if any(p is e for e in embedding) else 5e-4) for p in parameters)


def test_the_average_has_an_embedding_too(base: Path) -> None:
    net = student(base)
    adapter.add_average(net.unet)
    before = x0(net, FAR)
    with torch.no_grad():
        for parameter in adapter.embedding_parameters(net.unet):
            parameter += 1
    assert not torch.allclose(x0(net, FAR), before, atol=1e-3)
    with adapter.averaged(net.unet):
        assert torch.equal(x0(net, FAR), before)
    adapter.update_average(net.unet, 0.0)
    with adapter.averaged(net.unet):
        averaged = x0(net, FAR)
    assert torch.equal(averaged, x0(net, FAR))


def test_a_run_writes_what_it_trained(values: Values, tmp_path: Path) -> None:
    values["preview"] = {"prompts": ["a red circle"], "steps": [1], "every": 2}
    path = run.run(small_config(values, steps=3, lr=1e-2, target_time_lr=1e-2))
    with safe_open(path, "pt") as file:
        assert file.metadata()["tcd.target_time"] == "s"
        assert sorted(name for name in file.keys() if name.startswith("tcd_")) == EMBEDDING  # noqa: SIM118
        assert file.get_tensor("tcd_target_time.out.weight").any()
    net = network(Path(str(values["base"]["path"])))
    adapter.load_adapter(net.unet, path)
    assert not torch.allclose(x0(net, NEAR), x0(net, FAR), atol=1e-5)


def test_a_run_that_tells_nothing_has_none_of_it(values: Values, base: Path) -> None:
    net = student(base, None)
    assert net.unet.class_embedding is None and not adapter.embedding_parameters(net.unet)
    del values["method"]
    path = run.run(small_config(values, steps=1))
    with safe_open(path, "pt") as file:
        assert file.metadata()["tcd.target_time"] == "none"
        assert not any(name.startswith("tcd_") for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("method", [{}, {"ema_decay": 0.5}, {"told": "t-s"}])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    values: Values, method: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    values["method"] |= method
    folder = Path(str(values["output"]["folder"]))
    whole = load_file(run.run(small_config(values, steps=4, checkpoint_every=1)))
    values["output"]["folder"] = str(folder.with_name("again"))
    settings = small_config(values, steps=4, checkpoint_every=1)
    real = loop.step_losses
    calls = iter(range(100))

    def failing(*arguments: object) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "step_losses", failing)
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
    net = student(base)
    parameters = adapter.freeze_lora(net.unet)
    loop.train(net, parameters, random_dataset(), small_config(values, steps=2, batch=2))
    assert [p for p in net.unet.parameters() if p.requires_grad] == parameters == adapter.embedding_parameters(net.unet)
    assert all(p.grad is None for name, p in net.unet.named_parameters() if ".lora_" in name)


def test_training_starts_from_a_file_that_is_told(values: Values, base: Path) -> None:
    start = run.run(small_config(values, steps=2, lr=1e-2))
    net = network(base)
    adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=5, told="s")
    adapter.start_from(net.unet, start, 2.0)
    fresh = network(base)
    adapter.load_adapter(fresh.unet, start)
    torch.testing.assert_close(x0(net, FAR), x0(fresh, FAR), rtol=1e-4, atol=1e-5)
    for told in ("t-s", None):
        other = network(base)
        adapter.add_adapter(other.unet, rank=4, alpha=2.0, seed=5, told=told)
        with pytest.raises(UserError, match='told s: use method.target_time = true and method.told = "s"'):
            adapter.start_from(other.unet, start, 2.0)


def test_files_are_told_of_spelled_and_merged_as_far_as_can_be(
    values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.run(small_config(values, steps=1))
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "told      the target time, as s" in said and "a LoRA for tiny" in said
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
        return estimate(Settings.of(small_config(values), "sd15", torch.float32)).adapter

    told = total()
    del values["method"]
    assert told - total() == (320 * 1280 + 1280 + 1280 * 1280 + 1280) * 4 * 3  # and two moments
