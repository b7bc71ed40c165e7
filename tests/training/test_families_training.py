"""Small bases of every family through the whole of training, and v-prediction where no signal is left."""

from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from plain_method import PLAIN
from small_bases import random_parts, shrink, to_state, write
from tiny_base import context, model_of, random_dataset, small_config, with_adapter, write_inputs
from trajectory_consistency.tcd import (
    DiscreteSchedule,
    Level,
    coverage,
    kohya_name,
    scaled_linear_alpha_bar,
    zero_terminal_snr,
)
from trajectory_consistency.tcd.distill import examples as distill_examples
from trajectory_consistency.tcd.distill import training as distill_training
from trajectory_consistency.tcd.distill.sampling import Guidance, initial_noise, sample_latents
from trajectory_consistency.tcd.distill.teacher_sampling import dpm_solver_sample
from trajectory_consistency.tcd.times import Law
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.data.encode import load_or_encode
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.fingerprint import fingerprint
from trajectory_consistency.trainer.models.unet.families import Family
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.run import run
from trajectory_consistency.trainer.training import examples

ARCHITECTURES = {
    "sd15": ("stable-diffusion-v1", "sd_v1"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_v2_v"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "bases")


def configured(family: Family, folder: Path, **base: str) -> Config:
    """Two steps on two pictures, 160 x 80 and 80 x 160, of a small base."""
    (folder / "data").mkdir()
    for name, size in (("wide", (160, 80)), ("tall", (80, 160))):
        Image.new("RGB", size, "red").save(folder / "data" / f"{name}.png")
        (folder / "data" / f"{name}.txt").write_text(f"a {name} picture", encoding="utf-8")
    path = write(folder / "base.safetensors", to_state(random_parts(family)))
    values: dict[str, dict[str, Any]] = {
        "base": {"path": str(path), **base},
        "data": {"folder": str(folder / "data"), "resolution": 64, "bucket_step": 16},
        "method": dict(PLAIN),
        "adapter": {"rank": 2, "alpha": 2.0},
        "training": {"steps": 2, "batch": 2, "lr": 1e-3},
        "output": {"folder": str(folder / "out")},
    }
    return from_mapping(values)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("family", "prediction"), [("sd15", "eps"), ("sd2", "v"), ("sdxl", "v")])
def test_a_base_becomes_a_lora_that_fits_it(family: Family, prediction: str, tmp_path: Path) -> None:
    config = configured(family, tmp_path, prediction=prediction, zero_snr="yes" if prediction == "v" else "no")
    lora, unet = run(config), random_parts(family).unet
    shapes = {kohya_name(name): tuple(m.weight.shape) for name, m in unet.named_modules() if hasattr(m, "weight")}
    found = coverage(load_file(lora), shapes)
    assert found.complete and len(found.matched) > 100
    with safe_open(lora, "pt") as file:
        metadata = file.metadata()
    architecture, version = ARCHITECTURES[family]
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.prediction_type"] == {"eps": "epsilon"}.get(prediction, prediction)
    assert metadata["tcd.family"] == {"sd15": "SD15", "sd2": "SD20", "sdxl": "SDXL"}[family]
    assert metadata["tcd.base_fingerprint"] == fingerprint(Path(config.base.path))
    assert metadata["ss_zero_terminal_snr"] == str(prediction == "v") and metadata["ss_v2"] == str(family == "sd2")


@pytest.mark.usefixtures("small")
def test_sdxl_gets_the_sizes_and_the_crop_of_each_picture(tmp_path: Path) -> None:
    dataset = load_or_encode(configured("sdxl", tmp_path), torch.device("cpu"), torch.float32)
    seen = set()
    for number in range(4):
        batch = dataset.batch(number, 2, seed=0, caption_dropout=0)
        cond, uncond = batch.cond.tensors, batch.uncond.tensors
        assert torch.equal(cond["time_ids"], uncond["time_ids"])
        assert not torch.equal(cond["pooled"], uncond["pooled"])
        assert [8 * side for side in batch.latents.shape[2:]] == cond["time_ids"][0, 4:].tolist()
        seen |= {tuple(row) for row in cond["time_ids"].int().tolist()}
    # Resized to 48 x 96 and 96 x 48, of which 8 are cut from either end of the long side.
    assert seen == {(80, 160, 0, 8, 48, 80), (160, 80, 8, 0, 80, 48)}


@pytest.mark.usefixtures("small")
def test_every_part_of_sdxls_conditioning_reaches_the_unet_as_in_diffusers() -> None:
    unet, draw = random_parts("sdxl").unet, torch.Generator().manual_seed(0)
    net = UNetModel(unet, DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar()), "eps")

    def some(count: int) -> Conditioning:
        text, pooled = torch.randn((count, 77, 24), generator=draw), torch.randn((count, 16), generator=draw)
        sizes = torch.randint(0, 2000, (count, 6), generator=draw).float()
        return Conditioning.of(context=text, pooled=pooled, time_ids=sizes)

    cond, uncond, x, times = some(3), some(3), initial_noise(0, (3, 4, 8, 8)), torch.tensor([999, 499, 19])
    t = net.schedule.point(times, 4)
    with torch.no_grad():
        given = cond.tensors
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
        output = unet(x, times, given["context"], added_cond_kwargs=added).sample
        alpha, sigma = t.level
        torch.testing.assert_close(net.x0(x, t, cond), (x - sigma * output) / alpha)
        free, given = net.x0(x, t, uncond), net.x0(x, t, cond)
        got = net.guided_x0(x, t, cond, uncond, torch.tensor([3.0, 3.0, 3.0]))
        assert ((got - (free + 3 * (given - free))).norm() / got.norm()).item() < 1e-5
        for part in ("context", "pooled", "time_ids"):
            changed = Conditioning({**cond.tensors, part: uncond.tensors[part]})
            assert not torch.allclose(net.x0(x, t, changed), given), part


@pytest.fixture
def without_signal(tmp_path: Path) -> tuple[UNetModel, dict[str, dict[str, object]]]:
    """The tiny UNet as one that predicts v at zero terminal SNR, and the values of a configuration."""
    values = write_inputs(tmp_path)
    unet = model_of(tmp_path / "base.safetensors").network
    schedule = DiscreteSchedule.from_alpha_bar(zero_terminal_snr(scaled_linear_alpha_bar()))
    return UNetModel(unet, schedule, "v"), values


def test_levels_are_finite_and_in_order_up_to_where_no_signal_is_left(
    without_signal: tuple[UNetModel, dict[str, dict[str, object]]],
) -> None:
    net, _ = without_signal
    end = net.schedule.point(torch.tensor([999]), 4).level
    assert end == Level(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    alphas = net.schedule.point(torch.tensor([0.0, 500.5, 998.0, 998.5, 999.0]), 4).level.alpha
    assert isinstance(alphas, torch.Tensor) and alphas.isfinite().all() and (alphas.diff(dim=0) < 0).all()
    t, s = torch.tensor([999, 999, 999, 19]), torch.tensor([0, 979, 998, 0])
    middle = net.schedule.midpoint(t, s)
    assert middle.isfinite().all() and (middle < t).all() and (middle > s).all()


def test_every_method_trains_where_no_signal_is_left(
    without_signal: tuple[UNetModel, dict[str, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, values = without_signal
    parameters = list(with_adapter(net, alpha=2.0).parameters())
    real = distill_examples.sample_times
    for law, (order, weighting) in product(get_args(Law), ((1, "x0"), (2, "gap"))):
        values["method"] = {**PLAIN, "law": law, "order": order, "weighting": weighting, "phases": [2]}
        config = small_config(values)

        def from_the_end(*arguments: Any, **options: Any) -> Any:
            times = real(*arguments, **options)
            return times._replace(t=torch.full_like(times.t, 999), t_next=torch.full_like(times.t, 979))

        monkeypatch.setattr(distill_examples, "sample_times", from_the_end)
        rows = examples.read_examples(config, random_dataset(), net.schedule, 0, slice(0, 3))
        losses = distill_training.step_losses(net, rows, config.method)
        losses.sum().backward()
        assert losses.isfinite().all() and (losses > 0).all(), (law, order, weighting)
        assert all(each.grad is not None and each.grad.isfinite().all() for each in parameters)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_begins_where_no_signal_is_left(
    without_signal: tuple[UNetModel, dict[str, dict[str, object]]], steps: int, gamma: float
) -> None:
    net, _ = without_signal
    draw = torch.Generator().manual_seed(3)
    cond, uncond = (context(torch.randn((2, 77, 32), generator=draw)) for _ in range(2))
    noise = initial_noise(0, (2, 4, 8, 8))
    guidance = Guidance(uncond, 2.0)
    out = sample_latents(
        net, cond, sigmas=net.schedule.sigmas_for(steps), gamma=gamma, noise=noise, seed=0, guidance=guidance
    )
    assert out.isfinite().all()
    if steps == 1:  # x0 = -v, where x_t is noise alone
        with torch.no_grad():
            free, given = (
                -net.network(noise, torch.tensor(999), each.tensors["context"]).sample for each in (uncond, cond)
            )
        assert ((out - (free + 2 * (given - free))).norm() / out.norm()).item() < 1e-2
    drawn = dpm_solver_sample(net, cond, uncond, noise, steps=steps, guidance=2.0)
    assert drawn.isfinite().all()
