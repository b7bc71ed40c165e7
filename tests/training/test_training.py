"""The trainer's parts on a real, tiny UNet: network, adapter, loop and file."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from tiny_base import network, random_dataset, small_config, write_base, write_inputs
from trajectory_consistency.tcd import coverage, kohya_name, timestep_grid
from trajectory_consistency.tcd.times import Times, sample_times
from trajectory_consistency.trainer.config.targets import TARGETS
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.export import ExportError, write_lora
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.sampling import initial_noise, sample_latents
from trajectory_consistency.trainer.models.unet import adapter
from trajectory_consistency.trainer.models.unet.network import Network
from trajectory_consistency.trainer.models.unet.teacher import load_base
from trajectory_consistency.trainer.run import check, run
from trajectory_consistency.trainer.training import loop, step
from trajectory_consistency.trainer.training.optimizer import lr_factor

COND = Conditioning(torch.randn((3, 77, 32), generator=torch.Generator().manual_seed(5)))
UNCOND = Conditioning(torch.zeros(1, 77, 32))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def net(checkpoint: Path) -> Network:
    return network(checkpoint)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, dict[str, object]]:
    return write_inputs(tmp_path)


def noisy(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return initial_noise(seed, (3, 4, 8, 8)), torch.tensor([999, 499, 19])


def shake(parameters: list[torch.nn.Parameter]) -> None:
    """Give an adapter an effect: LoRA starts as the identity."""
    generator = torch.Generator().manual_seed(9)
    for parameter in parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_guidance_one_is_the_caption_and_zero_is_no_caption(net: Network) -> None:
    x_t, t = noisy()
    with torch.no_grad():
        cond, free = net.x0(x_t, t, COND), net.x0(x_t, t, UNCOND.expand(3))
        for guidance, expected in ((1.0, cond), (0.0, free), (3.0, free + 3 * (cond - free))):
            got = net.guided_x0(x_t, t, COND, UNCOND, torch.full((3,), guidance))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_guidance_belongs_to_its_own_picture(net: Network) -> None:
    x_t, t = noisy()
    with torch.no_grad():
        whole = net.guided_x0(x_t, t, COND, UNCOND, torch.tensor([1.0, 4.0, 7.0]))
        alone = net.guided_x0(x_t[1:2], t[1:2], COND[1:2], UNCOND, torch.tensor([4.0]))
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_gamma_zero_is_the_teachers_ddim(net: Network, prediction: str) -> None:
    net = Network(net.unet, net.alpha_bar, prediction)  # type: ignore[arg-type]
    noise = initial_noise(1, (3, 4, 8, 8))
    got = sample_latents(net, COND, timesteps=timestep_grid(5), gamma=0.0, noise=noise, seed=0)
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
            x = ddim.step(net.unet(x, t, COND.context).sample, t, x).prev_sample
    assert ((got - x).norm() / x.norm()).item() < 1e-5


def test_a_new_adapter_is_the_identity_and_the_only_thing_that_trains(net: Network) -> None:
    x_t, t = noisy()
    before = net.x0(x_t, t, COND)
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0)
    torch.testing.assert_close(net.x0(x_t, t, COND), before, rtol=0, atol=0)
    trainable = [name for name, parameter in net.unet.named_parameters() if parameter.requires_grad]
    assert len(trainable) == len(parameters) > 100 and all("lora_" in name for name in trainable)


def test_every_kind_of_target_is_met_and_masters_are_float32(checkpoint: Path) -> None:
    unet = load_base(str(checkpoint), dtype=torch.bfloat16).unet
    parameters = adapter.add_adapter(unet, rank=4, alpha=4.0, seed=0)
    assert {parameter.dtype for parameter in parameters} == {torch.float32} and unet.dtype == torch.bfloat16
    names = [name.partition(".lora_")[0] for name in adapter.adapter_state(unet)]
    for target in TARGETS:
        assert any(name.endswith(target) for name in names), target


def test_the_teacher_is_the_base_and_the_student_comes_back_after_an_error(net: Network) -> None:
    x_t, t = noisy()
    with torch.no_grad():
        base = net.x0(x_t, t, COND)
        shake(adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0))
        student = net.x0(x_t, t, COND)
        assert not torch.allclose(student, base)
        with pytest.raises(KeyError), adapter.adapters_off(net.unet):
            torch.testing.assert_close(net.x0(x_t, t, COND), base, rtol=0, atol=0)
            raise KeyError
        torch.testing.assert_close(net.x0(x_t, t, COND), student, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_adapter(checkpoint: Path) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        return [p.data for p in adapter.add_adapter(network(checkpoint).unet, rank=4, alpha=4.0, seed=seed)]

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, start(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, start(1), strict=True))


def write(net: Network, values: dict[str, dict[str, object]], path: Path, *, final: bool = True) -> None:
    write_lora(path, net, small_config(values), {"tcd.law": "uniform"}, COND[:1], final=final)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_written_file_gives_what_was_trained(
    net: Network, checkpoint: Path, values: dict[str, dict[str, object]], tmp_path: Path, dtype: str
) -> None:
    values["output"]["dtype"] = dtype
    shake(adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0))
    path = tmp_path / "lora.safetensors"
    write(net, values, path)
    x_t, t = noisy()
    fresh = network(checkpoint)
    with torch.no_grad():
        base, trained = fresh.x0(x_t, t, COND), net.x0(x_t, t, COND)
        adapter.load_adapter(fresh.unet, path)
        loaded = fresh.x0(x_t, t, COND)
    limit = {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
    assert ((loaded - trained).norm() / (trained - base).norm()).item() < 10 * limit
    assert ((trained - base).norm() / base.norm()).item() > 0.05


def test_a_written_file_is_not_blamed_for_the_rounding_of_a_half_precision_base(
    net: Network, values: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    net.unet.to(torch.bfloat16)
    shake(adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0))
    write(net, values, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too_a_file_with_another_effect_does_not_get_its_name(
    net: Network, values: dict[str, dict[str, object]], tmp_path: Path, dtype: torch.dtype
) -> None:
    net.unet.to(dtype)
    shake(adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0))
    values["adapter"]["alpha"] = 4.0
    with pytest.raises(ExportError, match="away from the trained one"):
        write(net, values, tmp_path / "lora.safetensors")


def test_every_tensor_of_the_file_has_a_kohya_name_that_fits_the_model(
    net: Network, values: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    shapes = {kohya_name(name): tuple(m.weight.shape) for name, m in net.unet.named_modules() if hasattr(m, "weight")}
    shake(adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0))
    write(net, values, tmp_path / "lora.safetensors")
    state = load_file(tmp_path / "lora.safetensors")
    assert coverage(state, shapes).complete
    alphas = [value.item() for key, value in state.items() if key.endswith(".alpha")]
    assert len(alphas) == len(state) / 3 and set(alphas) == {2.0}


def test_a_file_without_effect_or_with_another_does_not_get_its_name(
    net: Network, values: dict[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "files" / "lora.safetensors"
    path.parent.mkdir()
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0)
    with pytest.raises(ExportError, match="changes nothing"):
        write(net, values, path)
    shake(parameters)
    values["adapter"]["alpha"] = 16.0  # the file would say another alpha than was trained with
    with pytest.raises(ExportError, match="away from the trained one"):
        write(net, values, path)
    assert list(path.parent.iterdir()) == []


def test_a_file_without_effect_on_the_way_is_warned_of_and_kept(
    net: Network, values: dict[str, dict[str, object]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0)
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
    real = loop.set_rate
    # The first step is at the rate of the end, 0: as one in a bfloat16 base that is below its rounding.
    monkeypatch.setattr(loop, "set_rate", lambda optimizer, step, training: real(optimizer, 2 - step, training))
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
    net: Network, values: dict[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "files" / "lora.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"the old one")
    shake(adapter.add_adapter(net.unet, rank=4, alpha=2.0, seed=0))

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trajectory_consistency.trainer.atomic.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(net, values, path)
    assert [entry.read_bytes() for entry in path.parent.iterdir()] == [b"the old one"]


def test_a_file_that_is_no_lora_for_the_model(net: Network, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    complaints = {
        tmp_path / "cut.safetensors": "is not a whole safetensors file",
        tmp_path / "none.safetensors": "there is no file",
        checkpoint: "is not a LoRA",
    }
    for path, complaint in complaints.items():
        with pytest.raises(UserError, match=complaint):
            adapter.load_adapter(net.unet, path)


def test_a_run_writes_the_file_its_metadata_and_its_configuration(values: dict[str, dict[str, object]]) -> None:
    config = small_config(values)
    path = run(config)
    assert path == config.lora_path
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "config.toml",
        "log.csv",
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
        "tcd.eta": "0.3",
        "tcd.cfg": "1.0",
        "tcd.grid": "50",
        "tcd.skip": "20",
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
    values: dict[str, dict[str, object]], net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step(*arguments: object, **options: object) -> Times:
        t, t_next, _ = sample_times(*arguments, **options)  # type: ignore[arg-type]
        return Times(t, t_next, t_next)  # here the loss is plain regression, so it must fall

    real = loop.draw
    monkeypatch.setattr(step, "sample_times", one_step)
    monkeypatch.setattr(loop, "draw", lambda config, step, shape: real(config, 0, shape))
    values["method"] = {"skip": 400, "guidance_min": 8.0, "guidance_max": 8.0}
    config = small_config(values, steps=60, batch=8, lr=5e-3)
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0)
    losses = loop.train(net, parameters, random_dataset(), config)
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]


def test_the_gradient_is_clipped_before_the_step(
    values: dict[str, dict[str, object]], net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(values, steps=1, clip=1e-4)
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0)
    norms = []
    real = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, closure: None = None) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    batch = random_dataset().batch(0, 3, seed=0, caption_dropout=0.0)
    loop.step_losses(net, batch, loop.draw(config, 0, batch.latents.shape[1:]), config).mean().backward()
    assert torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm() > 1e-3
    net.unet.zero_grad()
    loop.train(net, parameters, random_dataset(), config)
    assert norms == [pytest.approx(1e-4, rel=1e-2)]


def test_a_loss_that_is_no_number_stops_before_the_weights(
    values: dict[str, dict[str, object]], net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(values, steps=3)
    parameters = adapter.add_adapter(net.unet, rank=4, alpha=4.0, seed=0)
    before = [parameter.detach().clone() for parameter in parameters]
    real = loop.step_losses
    monkeypatch.setattr(loop, "step_losses", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(loop.NonFiniteError, match="step 1: loss nan"):
        loop.train(net, parameters, random_dataset(), config)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    factors = [lr_factor(step, 100, 10) for step in range(100)]
    assert factors[:10] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert lr_factor(0, 1, 0) == 1.0
