"""The trainer asks of a model what seam.py says, and nothing else: it distills one that has nothing of a UNet."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import oracles
from fake_flow import CAPTIONS, LATENTS, LONGEST, STD, FlowCheckpoint, FlowModel, GaussianFlow, flow_inputs, open_flow
from tiny_base import small_config
from trajectory_consistency.tcd import DiscreteSchedule, FlowSchedule, Level
from trajectory_consistency.tcd.adapter import FILE, STUDENT
from trajectory_consistency.tcd.distill import step_losses
from trajectory_consistency.tcd.distill.sampling import Guidance, initial_noise, sample_latents
from trajectory_consistency.trainer import models
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config.settings import Config, from_mapping
from trajectory_consistency.trainer.data.dataset import Batch, Dataset
from trajectory_consistency.trainer.data.encode import fill_cache, load_or_encode
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.files.adapter_weights import load_weights
from trajectory_consistency.trainer.files.write_lora import write_lora
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.preflight import check
from trajectory_consistency.trainer.run import load_student, run
from trajectory_consistency.trainer.training.checkpoint import Checkpoints
from trajectory_consistency.trainer.training.examples import read_examples
from trajectory_consistency.trainer.training.loop import Training
from trajectory_consistency.trainer.training.memory import MemorySettings, estimate_memory
from trajectory_consistency.trainer.views.history import History, read_log
from trajectory_consistency.trainer.views.preview_prompts import load_picture

Values = dict[str, dict[str, Any]]
CPU, FLOAT = torch.device("cpu"), torch.float32
LAWS = ["uniform", "zero", "segment", "phase", "target"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is chosen where each is: everything else gets its models from `open_checkpoint`."""
    monkeypatch.setattr(models, "ENGINES", [open_flow, *models.ENGINES])


@pytest.fixture
def values(tmp_path: Path) -> Values:
    return flow_inputs(tmp_path)


def with_settings(values: Values, section: str, **settings: object) -> Values:
    return {**values, section: {**values.get(section, {}), **settings}}


def checkpoint_of(config: Config) -> FlowCheckpoint:
    opened = open_checkpoint(config.base)
    assert isinstance(opened, FlowCheckpoint)
    return opened


def student_of(config: Config) -> FlowModel:
    model = load_student(config, checkpoint_of(config), CPU, FLOAT)
    assert isinstance(model, FlowModel)
    return model


def data_of(config: Config) -> Dataset:
    return load_or_encode(config, CPU, FLOAT)


def begun(config: Config) -> Training:
    return Training(student_of(config), data_of(config), config)


def conditioning(checkpoint: FlowCheckpoint, captions: tuple[str, ...] = CAPTIONS) -> Conditioning:
    """Conditioning of captions of different lengths, in one batch."""
    rows = checkpoint.load_text_encoder(CPU).encode(captions)
    return checkpoint.collate(rows, Framing.whole(64, 64, len(captions)))


def noisy(model: FlowModel, count: int, time: int = 700) -> tuple[Tensor, Any]:
    """Noise of the shape of `count` latents, and a point of the model's schedule."""
    x = initial_noise(0, (count, *LATENTS.shape(64, 64)))
    return x, model.schedule.point(torch.full((count,), time), x.ndim)


def padded(cond: Conditioning, words: int, value: float) -> Conditioning:
    """The same with more padding, of any value."""
    missing = words - cond.tensors["words"].shape[1]
    pad = torch.nn.functional.pad
    longer = {
        "words": pad(cond.tensors["words"], (0, 0, 0, missing), value=value),
        "mask": pad(cond.tensors["mask"], (0, missing), value=False),
    }
    return Conditioning({**cond.tensors, **longer})


def test_a_video_of_so_many_frames_has_so_many_latent_frames() -> None:
    """As in causal autoencoders: one frame alone, and one more for each `frame_stride` that follow."""
    shapes = [LATENTS._replace(frames=frames).shape(32, 64) for frames in (1, 5, 9)]
    assert shapes == [(3, 1, 2, 4), (3, 2, 2, 4), (3, 3, 2, 4)]
    assert LATENTS._replace(frames=None).shape(32, 64) == (3, 2, 4)


@torch.no_grad()
def test_what_a_row_predicts_does_not_depend_on_the_rows_and_the_padding_beside_it(values: Values) -> None:
    config = from_mapping(values)
    checkpoint, model = checkpoint_of(config), student_of(config)
    for parameter in model.adapter.weights[STUDENT].parameters():
        parameter += 0.1
    cond = conditioning(checkpoint)
    assert len({int(row.sum()) for row in cond.tensors["mask"]}) == len(CAPTIONS), "the captions differ in length"
    x, t = noisy(model, len(CAPTIONS))
    together = model.x0(x, t, cond, t)
    alone = [model.x0(x[k : k + 1], t.rows(slice(k, k + 1)), conditioning(checkpoint, (c,)), t.rows(slice(k, k + 1)))
             for k, c in enumerate(CAPTIONS)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, model.x0(x, t, padded(cond, LONGEST, 9.0), t), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, model.x0(x, t, cond[torch.tensor([1, 0, 2, 3])], t), atol=1e-3)


def test_what_is_cached_is_latents_with_frames_and_captions_without_padding(values: Values) -> None:
    config = from_mapping(values)
    dataset = data_of(config)
    lengths = {table.captions[row[2]]["words"].shape[1] for table in dataset.tables for row in table.index.tolist()}
    assert lengths == {len(caption.split()) + 1 for caption in CAPTIONS}
    assert dataset.empty.tensors["words"].shape[1] == 1
    batch = dataset.batch(0, 6, seed=0, caption_dropout=0.0)
    assert batch.latents.shape == (6, *LATENTS.shape(64, 64)) and batch.uncond.tensors["mask"].shape == (6, 1)
    still = batch.latents[:, :, 0] - batch.latents[:, :, 1]
    assert still.std().item() == pytest.approx(2**0.5 * STD, rel=0.1), "frames differ by the posterior's noise alone"


def test_the_rows_of_a_step_are_the_same_but_for_their_padding_however_they_are_divided(values: Values) -> None:
    dataset = data_of(from_mapping(values))

    def rows(part: slice) -> Batch:
        return dataset.batch(3, 6, part, seed=0, caption_dropout=0.3)

    whole, parts = rows(slice(0, 6)), [rows(slice(k, k + 2)) for k in (0, 2, 4)]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    longest = whole.cond.tensors["words"].shape[1]
    assert len({part.cond.tensors["words"].shape[1] for part in parts}) > 1, "parts are padded by themselves"
    joined = Conditioning.cat([padded(part.cond, longest, 0.0) for part in parts])
    assert all(torch.equal(whole.cond.tensors[name], joined.tensors[name]) for name in ("words", "mask", "aspect"))


@pytest.mark.parametrize("weighting", ["none", "gap", "x0"])
@pytest.mark.parametrize("law", LAWS)
@torch.no_grad()
def test_the_loss_of_an_exact_model_is_zero(values: Values, law: str, weighting: str) -> None:
    """Guidance, captions, masks, frames and all three times meet in it; none of them can be another row's."""
    method = {"law": law, "weighting": weighting, "guidance_min": 3.0, "guidance_max": 3.0, "distance": "l2"}
    config = from_mapping(with_settings(values, "method", **method))
    base = checkpoint_of(config).load(FLOAT, CPU)
    exact, wrong = (
        GaussianFlow(base.network, base.schedule, skip=config.method.skip, w=w) for w in (3.0, 2.0)
    )  # the second does not know the guidance scale
    for step in range(3):
        examples = read_examples(config, data_of(config), exact.schedule, step, slice(0, 4))
        got, other = (step_losses(each, examples, config.method) for each in (exact, wrong))
        assert got.max() < 1e-11 and other.min() > 1e-8


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_model_is_sampled_exactly(values: Values, steps: int, gamma: float) -> None:
    """Without fresh noise, every number of steps ends where the trajectory ends; with it, in the same distribution."""
    config = from_mapping(values)
    base = checkpoint_of(config).load(FLOAT, CPU)
    model, cond = GaussianFlow(base.network, base.schedule, skip=20, w=3.0), conditioning(checkpoint_of(config))
    noise = initial_noise(0, (len(cond), *LATENTS.shape(512, 512)))
    sigmas = model.schedule.sigmas_for(steps)
    x0 = sample_latents(model, cond, sigmas=sigmas, gamma=gamma, noise=noise, seed=1)
    standardized = (x0 - model.mean(cond, 3.0)) / oracles.STD
    if gamma == 0 or steps == 1:
        torch.testing.assert_close(standardized, noise, rtol=1e-4, atol=1e-4)
    else:
        assert (standardized - noise).abs().mean() > 0.1
        many = noise[0].numel()  # of each caption
        assert standardized.flatten(1).mean(1).abs().max() < 4 / many**0.5
        assert (standardized.flatten(1).std(1) - 1).abs().max() < 4 / (2 * many) ** 0.5


def test_the_exact_map_is_that_of_its_levels() -> None:
    """The oracle: from pure noise to the data, and back, in one jump."""
    noise, (start, clean) = oracles.randn(5), (Level(torch.tensor(0.0), torch.tensor(1.0)), Level(1.0, torch.tensor(0)))
    torch.testing.assert_close(oracles.x0_for_target(noise, start, clean), oracles.MEAN + oracles.STD * noise)


def test_training_resumes_to_the_last_bit(values: Values, tmp_path: Path) -> None:
    config = from_mapping(with_settings(values, "method", ema_decay=0.9))
    whole, half, again = begun(config), begun(config), begun(config)
    for _ in range(4):
        whole.train_step()
    for _ in range(2):
        half.train_step()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, 1)
    checkpoints.save(2, half.state_dict())
    again.load_state_dict(checkpoints.load_latest() or {})
    for _ in range(2):
        again.train_step()
    expected, got = whole.state_dict(), again.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(half.state_dict()["losses"], got["losses"])


@pytest.mark.parametrize("changed", [{"accumulate": 4}, {"accumulate": 2}, {"gradient_checkpointing": True}])
def test_a_step_is_the_same_in_parts_and_with_activations_computed_again(
    values: Values, changed: dict[str, object]
) -> None:
    """With captions of other lengths in each part, and so with other padding."""
    one, other = begun(from_mapping(values)), begun(small_config(values, **changed))
    for _ in range(3):
        (expected, _), (got, _) = one.train_step(), other.train_step()
        assert got.norm == pytest.approx(expected.norm, rel=1e-3)
        torch.testing.assert_close(got.losses, expected.losses, rtol=1e-3, atol=1e-6)


def test_it_learns(values: Values) -> None:
    """The loss at the times and noise of one step, before training and after."""
    config = small_config(with_settings(values, "method", distance="l2"), steps=61, target_time_lr=1e-2)
    training = begun(config)
    examples = read_examples(config, data_of(config), training.model.schedule, 60, slice(0, 4))
    with torch.no_grad():
        before = step_losses(training.model, examples, config.method).sum()
    for _ in range(60):
        training.train_step()
    with torch.no_grad():
        assert step_losses(training.model, examples, config.method).sum() < 0.5 * before


def test_memory_is_estimated(values: Values) -> None:
    config = from_mapping(with_settings(values, "preview", prompts=["a"]))
    model = student_of(config)
    estimate = estimate_memory(checkpoint_of(config), MemorySettings.from_config(config, FLOAT))
    assert estimate.weights == sum(4 * each.numel() for each in model.network.parameters())
    assert estimate.adapter == 3 * sum(4 * each.numel() for each in model.adapter.weights[STUDENT].parameters())
    more = MemorySettings.from_config(small_config(values, batch=8), FLOAT)
    assert 1.5 < estimate_memory(checkpoint_of(config), more).step / estimate.step < 2.5


def test_a_file_has_the_engines_names_and_is_read_back_by_them(values: Values, tmp_path: Path) -> None:
    config, path = from_mapping(values), tmp_path / "lora.safetensors"
    training = begun(config)
    for _ in range(2):
        training.train_step()
    trained, fresh = training.model, checkpoint_of(config).load(FLOAT, CPU)
    cond = conditioning(checkpoint_of(config))
    write_lora(path, trained, config, {}, cond[:1], final=True)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert "lora_transformer_layers_1_ff_in.lora_down.weight" in names and "tcd_target_time.in.weight" in names
    x, t = noisy(fresh, len(cond))
    s = fresh.schedule.point(torch.full((len(x),), 200), x.ndim)
    with torch.no_grad():
        base = fresh.x0(x, t, cond, s)
        fresh.adapter.add(FILE, load_weights(fresh, path))
        expected, got = trained.x0(x, t, cond, s), fresh.x0(x, t, cond, s)
    assert (got - expected).norm() < 1e-3 * expected.norm() < 1e-2 * (base - expected).norm()
    started = student_of(from_mapping(with_settings(values, "adapter", start_from=str(path))))
    with torch.no_grad():
        torch.testing.assert_close(started.x0(x, t, cond, s), got)


def sampled(config: Config, prompt: str, steps: int, gamma: float, cfg: float, lora: Path | None) -> Tensor:
    """The picture that a person gets who loads the base, and a file, and samples."""
    checkpoint, model = checkpoint_of(config), checkpoint_of(config).load(FLOAT, CPU)
    if lora:
        model.adapter.add(FILE, load_weights(model, lora))
    cond, uncond = conditioning(checkpoint, (prompt,)), conditioning(checkpoint, ("",))
    latents = sample_latents(
        model,
        cond,
        sigmas=model.schedule.sigmas_for(steps),
        gamma=gamma,
        noise=initial_noise(3, (1, *LATENTS.shape(64, 64))),
        seed=3,
        guidance=None if cfg == 1 else Guidance(uncond, cfg),
    )
    return checkpoint.load_autoencoder(CPU).decode(latents)[0]


def test_a_whole_run_writes_what_it_writes_of_any_model(values: Values, tmp_path: Path) -> None:
    preview = {"prompts": [CAPTIONS[2]], "seeds": [3], "steps": [1, 4], "every": 2, "eta": 0.3, "cfg": 2.0}
    config = from_mapping({**values, "preview": preview})
    lora, previews = run(config), config.output_folder / "previews"
    assert [row.step for row in read_log(config.output_folder)] == [1, 2, 3, 4]
    assert (config.output_folder / "report.html").is_file() and (previews / "step-000004.jpg").is_file()
    for steps in (1, 4):
        (shown,) = (load_picture(path) for path in (previews / "step-000004").glob(f"*-steps-{steps}.png"))
        assert shown.shape == (3, 64, 2 * 64), "both latent frames, side by side"
        expected = sampled(config, CAPTIONS[2], steps, 0.3, 2.0, lora)
        assert (shown.int() - expected.int()).abs().max() <= 1
    (teacher,) = (load_picture(path) for path in (previews / "teacher").glob("*.png"))
    assert (teacher.int() - sampled(config, CAPTIONS[2], 50, 0.0, 5.0, None).int()).abs().max() <= 1
    assert run(config) == lora, "a finished run is left as it is"


def test_a_run_that_failed_resumes_as_if_it_had_not(
    values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(values, checkpoint_every=1)
    whole = run(from_mapping(with_settings(values, "output", folder=str(tmp_path / "whole"))))

    observe = History.__call__

    def fail(history: History, record: Any) -> None:
        if record.step == 3:
            raise OSError("the disk is full")
        observe(history, record)

    with monkeypatch.context() as patch:
        patch.setattr(History, "__call__", fail)
        with pytest.raises(OSError, match="the disk is full"):
            run(config)
    resumed = run(config)
    with safe_open(whole, "pt") as one, safe_open(resumed, "pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    assert [row.step for row in read_log(config.output_folder)] == [1, 2, 3, 4]


def test_the_teacher_draws_latents_with_frames_for_prompts_alone(values: Values, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS), encoding="utf-8")
    data = {"prompts": str(prompts), "resolution": 64, "draw": {"steps": 4, "guidance": 3.0}}
    config = from_mapping({**values, "data": data})
    batch = data_of(config).batch(0, 4, seed=0, caption_dropout=0.0)
    assert batch.latents.shape == (4, *LATENTS.shape(64, 64)) and batch.latents.std() > 0.1
    assert not torch.allclose(batch.latents[:, :, 0], batch.latents[:, :, 1]), "in a drawn video something moves"
    assert run(config).is_file()


def test_what_a_run_would_do_is_described(values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "config.toml"
    settings.write_text(from_mapping(values).to_toml(), encoding="utf-8")
    assert main(["check", str(settings)]) == 0
    said = capsys.readouterr().out
    assert "fake-flow, a flow with shift 3" in said and "lora_transformer_layers_0_to_q.lora_down.weight" in said
    assert "12 modules" in said and "memory    about" in said


@pytest.mark.parametrize(
    ("section", "settings", "key"),
    [
        ("data", {"resolution": 72}, "data.resolution is 72"),
        ("data", {"bucket_step": 8}, "data.bucket_step is 8"),
        ("preview", {"width": 40}, "preview.width is 40"),
        ("preview", {"height": 56}, "preview.height is 56"),
    ],
)
def test_sizes_that_do_not_fill_the_models_latents_are_refused(
    values: Values, section: str, settings: dict[str, object], key: str
) -> None:
    config = from_mapping(with_settings(values, section, **settings))
    with pytest.raises(UserError, match=f"{key}: use a multiple of 16"):
        check(config)
    if section == "data":
        with pytest.raises(UserError, match=f"{key}: use a multiple of 16"):
            fill_cache(config, CPU, FLOAT)


def test_a_weight_that_the_models_schedule_makes_infinite_is_refused(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distilled model of 50 levels at 19, 39 ... 999: from 19 to 0 there is nothing to jump."""
    sigmas = DiscreteSchedule.from_alpha_bar(torch.linspace(0.99, 0.01, 50, dtype=torch.float64)).sigmas
    distilled = DiscreteSchedule(sigmas, num_timesteps=1000)

    def checked(schedule: FlowSchedule | DiscreteSchedule, **method: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("fake_flow.FlowSchedule", lambda _: schedule)
            check(from_mapping(with_settings(values, "method", **method)))

    with pytest.raises(UserError, match=r'method.weighting is "x0", .* one noise level for all times up to 19'):
        checked(distilled, weighting="x0")
    for weighting in ("none", "gap"):
        checked(distilled, weighting=weighting)
    checked(distilled, weighting="x0", origin_steps=25)  # the lowest t is 39
    checked(FlowSchedule(), weighting="x0")
    checked(DiscreteSchedule(sigmas), weighting="x0", origin_steps=50)
