"""The node TCDDistill: the trainer's own LoRA, and a model that is as before, also after Cancel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
from families import FAMILIES, written
from quantized_files import write_quantized
from short_run import run as trainer_run
from small_models import each_family, load, relative
from test_checkpoint import base_of
from torch import Tensor

from trajectory_consistency.nodes import host
from trajectory_consistency.nodes.distill import TCDDistill
from trajectory_consistency.nodes.distill_settings import DistillSettings
from trajectory_consistency.nodes.host import distill_progress
from trajectory_consistency.nodes.lora_model import TCDLoraModelLoader
from trajectory_consistency.nodes.save_lora import TCDSaveLora
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Table
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.comfy.conditioning import join, to_row

PICTURES, STEPS = 3, 4


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folders of results and of LoRAs."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    return tmp_path


def latents_of(name: str) -> list[dict[str, Tensor]]:
    """Return LATENTs of one picture each, as the host's VAE gives them."""
    generator = torch.Generator().manual_seed(0)
    return [{"samples": torch.randn(1, *FAMILIES[name].latent, generator=generator)} for _ in range(PICTURES)]


def inputs_of(name: str, **changes: Any) -> dict[str, Any]:
    """Return the inputs of the node, all lists as from the host: a data set of a family's latents and captions."""
    family = FAMILIES[name]
    given = {
        "positive": [family.conditioning(seed) for seed in range(1, PICTURES + 1)],
        "negative": [family.conditioning(9)],
        "latents": latents_of(name),
        "preset": ["fast try"],
        "training_steps": [STEPS],
        "batch": [2],
        "accumulate": [2],
        "learning_rate": [1e-3],
        "rank": [2],
        "seed": [5],
        "target_time": [True],
        "guidance_min": [2.0],
        "guidance_max": [8.0],
        "preview_every": [0],
    }
    return {**given, **changes}


def distilled(model: Any, name: str, **changes: Any) -> Any:
    """Return the outputs of the node, which runs in inference mode as in the host."""
    with torch.inference_mode():
        return TCDDistill.execute(model=[model], **inputs_of(name, **changes)).result


def sampled(model: Any, name: str) -> Tensor:
    """Return what the host samples from the model."""
    family = FAMILIES[name]
    noise = torch.randn(1, *family.latent, generator=torch.Generator().manual_seed(1))
    sigmas = host.tcd_sigmas(model, steps=2, denoise=1.0, timesteps="")
    with torch.inference_mode():
        result: Tensor = comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            host.tcd_sampler(0.3),
            sigmas,
            family.conditioning(1),
            family.conditioning(9),
            torch.zeros_like(noise),
            seed=0,
        )
    return result.clone()


def is_clean(model: Any) -> bool:
    """Whether training left nothing on a model."""
    modules = list(model.model.modules())
    hooks = [module for module in modules if module._forward_hooks or module._backward_hooks]
    # The host itself may leave a class's own forward as an attribute.
    replaced = [each for each in modules if type(vars(each).get("forward")).__module__.startswith("trajectory")]
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    return not (hooks or replaced or trained or comfy.model_management.in_training)


@each_family
def test_every_family_is_distilled_and_samples_as_before(name: str, folder: Path) -> None:
    with torch.inference_mode():
        model = load(name, folder)
    before = sampled(model, name)
    lora, losses, steps = distilled(model, name, training_steps=[2], preview_every=[1])
    assert steps == len(losses["loss"]) == 2 and all(loss > 0 for loss in losses["loss"])
    assert is_clean(model)
    assert torch.equal(sampled(model, name), before)
    assert (
        lora.metadata["tcd.target_time"] == "s"
        and lora.metadata["tcd.family"] == type(model.model.model_config).__name__
    )
    with_lora = TCDLoraModelLoader.execute(model, lora, 1.0).result[0]
    assert not torch.equal(sampled(with_lora, name), before)


def test_a_quantised_model_is_distilled(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "scaled.safetensors"
    write_quantized(written("flux", folder), path, "scaled float8", FAMILIES["flux"].prefix)
    with torch.inference_mode():
        model = FAMILIES["flux"].load(path)
    before = sampled(model, "flux")
    lora, *_ = distilled(model, "flux", training_steps=[2])
    assert is_clean(model) and torch.equal(sampled(model, "flux"), before)
    assert not torch.equal(sampled(TCDLoraModelLoader.execute(model, lora, 1.0).result[0], "flux"), before)


def trainer_lora(name: str, folder: Path, settings: DistillSettings, model: Any) -> dict[str, Tensor]:
    """Return the LoRA that the trainer makes of the same data and settings."""
    given = inputs_of(name)
    method = ("diagonal", "to_clean", "guidance_min", "guidance_max", "ema_decay", "weighting", "target_time")
    training = ("steps", "batch", "accumulate", "lr", "seed", "warmup_steps")
    base = base_of(name, folder)
    config = from_mapping(
        {
            "base": FAMILIES[name].base(folder / f"{name}.safetensors"),
            "data": {"folder": "in", "caption_dropout": settings.caption_dropout},
            "method": {key: getattr(settings, key) for key in method},
            "adapter": {"rank": settings.rank, "alpha": settings.alpha},
            "training": {"device": "cpu", **{key: getattr(settings, key) for key in training}},
            "output": {"folder": "out"},
        }
    )
    checkpoint = open_checkpoint(base)
    normalized = torch.cat([model.model.process_latent_in(each["samples"]) for each in given["latents"]])
    side = normalized.shape[-1] * 8
    latents = {"mean": normalized, "sizes": torch.tensor([side, side, 0, 0, side, side]).expand(PICTURES, -1)}
    rows = [to_row(each) for each in given["positive"]]
    captions = [dict(row.tensors) for row in rows]
    table = Table(torch.tensor([(0, row, row, 0) for row in range(PICTURES)]), [latents], captions)
    groups = (Group(Size(side, side), PICTURES, 1.0),)
    dataset = Dataset(groups, [table], to_row(given["negative"][0]), lambda rows, _: join(rows))
    found = trainer_run(checkpoint.load(torch.float32, torch.device("cpu")), dataset, config)
    return {key.removeprefix("end."): tensor for key, tensor in found.items() if key.startswith("end.")}


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_lora_is_that_of_the_trainer(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("short_run.STEPS", STEPS)
    model = load(name, folder)
    settings = DistillSettings(steps=STEPS, batch=2, accumulate=2, rank=2, lr=1e-3, seed=5)
    expected = trainer_lora(name, folder, settings, model)
    lora, *_ = distilled(model, name)
    assert lora.keys() == expected.keys()
    assert max(relative(lora[key], expected[key]) for key in lora if expected[key].any()) <= 1e-5
    assert all(each.any() for key, each in lora.items() if key.endswith("lora_up.weight")), "all layers were trained"


def cancelled(model: Any, name: str, step: int, **changes: Any) -> None:
    """Run the node, and cancel it in the middle of a step, as the button in the browser does."""
    report, calls = distill_progress.Progress.step, []

    def observe(progress: Any, *args: Any) -> None:
        report(progress, *args)
        calls.append(progress)
        if len(calls) == step - 1:
            comfy.model_management.interrupt_current_processing()  # the next operation of the host sees it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_progress.Progress, "step", observe)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            distilled(model, name, **changes)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_cancelled_run_leaves_the_model_as_it_was_and_resumes_exactly(
    name: str, folder: Path, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(name, folder)
    before, whole = sampled(model, name), distilled(model, name)
    with caplog.at_level("INFO"):
        cancelled(model, name, step=3)
        (kept,) = (folders / "output").rglob("*.safetensors")
        assert str(kept) in caplog.text and "stopped after step 2" in caplog.text
        assert is_clean(model)
        assert torch.equal(sampled(model, name), before)
        resumed = distilled(load(name, folder), name, accumulate=[1])  # as after a restart of the host
    assert f"resuming at step 2 of {STEPS}" in caplog.text
    assert not kept.exists(), "a finished run needs none"
    assert resumed[1]["loss"] == pytest.approx(whole[1]["loss"], rel=1e-5)
    cancelled(model, name, step=3)
    again = distilled(model, name)
    assert again[1] == whole[1]
    assert all(torch.equal(again[0][key], whole[0][key]) for key in whole[0])


def test_another_graph_does_not_resume(folder: Path, folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load("sd3", folder)
    cancelled(model, "sd3", step=3)
    other_captions = [FAMILIES["sd3"].conditioning(seed) for seed in range(11, 14)]
    changes: list[dict[str, Any]] = [
        {"seed": [6]},
        {"positive": other_captions},
        {"latents": latents_of("sd3")[::-1]},
        {"negative": [FAMILIES["sd3"].conditioning(8)]},
    ]
    with caplog.at_level("INFO"):
        for change in changes:
            distilled(model, "sd3", **change)
        assert "resuming" not in caplog.text
        distilled(model, "sd3")
        assert "resuming" in caplog.text
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        distilled(model, "sd3")
    assert not list((folders / "output").rglob("*.safetensors")), "nothing was learned"


def test_a_saved_lora_is_the_one_in_memory(folder: Path, folders: Path) -> None:
    model = load("sd3", folder)
    lora, *_ = distilled(model, "sd3")
    (name,) = TCDSaveLora.execute(lora, "mine/fast").result
    assert name == str(Path("mine", "fast_00001_.safetensors"))
    assert TCDSaveLora.execute(lora, "mine/fast").result[0].endswith("fast_00002_.safetensors")
    file = host.read_lora(name)
    assert file.metadata == {**lora.metadata, "modelspec.title": "fast_00001_"}
    assert file.recommended_settings() == (4, 0.0, 1.0)
    in_memory = TCDLoraModelLoader.execute(model, lora, 0.5).result
    from_file = host.apply_lora(model, file, 0.5)
    assert in_memory[1:] == (4, 0.0, 1.0)
    found, expected = sampled(in_memory[0], "sd3"), sampled(from_file, "sd3")
    assert relative(found, expected) < 1e-3 < relative(sampled(model, "sd3"), expected)
    with pytest.raises(ValueError, match="filename_prefix is empty"):
        TCDSaveLora.execute(lora, " ")
    with pytest.raises(Exception, match="outside the output folder"):
        TCDSaveLora.execute(lora, "../fast")
    broken = type(lora)({**lora, next(iter(lora)): next(iter(lora.values())) * torch.inf}, {})
    with pytest.raises(ValueError, match="numbers that are not finite"):
        TCDSaveLora.execute(broken, "broken")
    assert len(list((folders / "loras").rglob("*"))) == 3


def test_a_lora_is_trained_further(folder: Path) -> None:
    model = load("sd3", folder)
    lora, *_ = distilled(model, "sd3")
    (name,) = TCDSaveLora.execute(lora, "start").result
    again, *_ = distilled(model, "sd3", start_from=[name], learning_rate=[1e-9])
    kept = [key for key in lora if key.startswith("diffusion_model.") and lora[key].any()]
    assert kept and all(relative(again[key], lora[key]) < 2e-3 for key in kept), "rounded to float16"
    with pytest.raises(ValueError, match=r"start_from is start_00001_.safetensors, where .*alpha, 2"):
        distilled(model, "sd3", start_from=[name], rank=[4])
    fingerprint = TCDDistill.fingerprint_inputs(start_from=[name])
    assert fingerprint == host.lora_stamp(name)
    assert TCDDistill.fingerprint_inputs(rank=[3]) == TCDDistill.fingerprint_inputs(rank=[4])


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_without_latents_the_teacher_draws_them(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = host.distill.__globals__["drawn_pairs"]
    monkeypatch.setitem(host.distill.__globals__, "drawn_pairs", lambda *args: made.append(real(*args)) or made[-1])
    model = load(name, folder)
    before = sampled(model, name)
    size = {"width": [64], "height": [128], "per_prompt": [2]}
    first, *_ = distilled(model, name, latents=[], training_steps=[1], **size)
    again, *_ = distilled(model, name, latents=[], training_steps=[1], **size)
    assert all(torch.equal(first[key], again[key]) for key in first)
    (pairs, _) = made
    channels, *frames, _, _ = FAMILIES[name].latent
    assert {tuple(latent.shape) for latent, _ in pairs} == {(channels, *[1 for _ in frames], 16, 8)}
    assert len(pairs) == 2 * PICTURES and not torch.equal(pairs[0][0], pairs[1][0])
    assert torch.equal(sampled(model, name), before)
    with pytest.raises(ValueError, match="width is 65: use a multiple of 8"):
        distilled(model, name, latents=[], width=[65], height=[64])


def with_option(name: str, value: Any) -> Any:
    ((context, options),) = FAMILIES["sd3"].conditioning(1)
    return [[context, {**options, name: value}]]


BAD_INPUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no captions": (lambda: {"positive": []}, "there is no positive CONDITIONING"),
    "unequal lists": (
        lambda: {"positive": [FAMILIES["sd3"].conditioning(seed) for seed in (1, 2)]},
        "there are 3 latents and 2 positive CONDITIONINGs",
    ),
    "no negative": (lambda: {"negative": []}, "there is no negative CONDITIONING"),
    "control": (lambda: {"positive": [with_option("control", object())]}, "has control, a ControlNet"),
    "area": (lambda: {"negative": [with_option("area", (8, 8, 0, 0))]}, "has area, an area of the picture"),
    "combined": (
        lambda: {"positive": [FAMILIES["sd3"].conditioning(1) * 2] * PICTURES},
        "has 2 entries for 1 latents",
    ),
    "channels": (lambda: {"latents": latents_of("sd15")}, "model's have 16 channels"),
    "mask": (
        lambda: {"latents": [{**each, "noise_mask": torch.ones(1, 8, 8)} for each in latents_of("sd3")]},
        "a LATENT has a mask",
    ),
    "parts": (lambda: {"batch": [3]}, "batch is 3 and accumulate is 2"),
    "guidance": (lambda: {"guidance_min": [9.0]}, "guidance_max is 8.0, but must be from 9"),
    "not a number": (lambda: {"learning_rate": [float("nan")]}, "learning_rate is nan"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_refused_before_training(case: str, folder: Path) -> None:
    changes, message = BAD_INPUTS[case]
    model = load("sd3", folder)
    with pytest.raises(ValueError, match=message):
        distilled(model, "sd3", **changes())
    assert is_clean(model)


def test_a_bucket_of_latents_has_one_caption_each(folder: Path) -> None:
    """As the host's Resolution Bucket gives them: a LATENT of several, and a CONDITIONING with as many entries."""
    model, given = load("sd3", folder), inputs_of("sd3")
    latents = [{"samples": torch.cat([each["samples"] for each in given["latents"]])}]
    captions = [[entry for caption in given["positive"] for entry in caption]]
    apart, *_ = distilled(model, "sd3")
    together, *_ = distilled(model, "sd3", latents=latents, positive=captions)
    assert all(torch.equal(apart[key], together[key]) for key in apart)
    wide = [*given["latents"], {"samples": torch.zeros(1, 16, 8, 12)}]
    _, losses, _ = distilled(model, "sd3", latents=wide, positive=given["positive"][:1])
    assert len(losses["loss"]) == STEPS


def test_a_model_without_a_time_layer_is_refused(folder: Path) -> None:
    model = load("sd3", folder)
    model.model.diffusion_model.unknown = model.model.diffusion_model._modules.pop("t_embedder")
    with pytest.raises(ValueError, match="the model is SD3, which cannot be trained: no layer is known"):
        distilled(model, "sd3")


def test_a_distilled_model_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    distilled(load("flux-schnell", folder), "flux-schnell", training_steps=[1])
    assert "this base is distilled to few steps already (it is Flux schnell)" in caplog.text
    caplog.clear()
    model = load("sd3", folder)
    model.cached_patcher_init = (load, ("models/sd3-turbo.safetensors", {}))
    distilled(model, "sd3", training_steps=[1])
    assert "sd3-turbo has turbo in its name" in caplog.text


def test_dynamic_vram_is_turned_off_or_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, static = load("sd3", folder), load("sd3", folder)
    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    clone = monkeypatch.setattr(model, "clone", lambda disable_dynamic: static if disable_dynamic else model)
    assert clone is None and distilled(model, "sd3", training_steps=[1])[2] == 1

    def fails(disable_dynamic: bool) -> Any:
        raise RuntimeError("cached_patcher_init is not initialized.")

    monkeypatch.setattr(model, "clone", fails)
    with pytest.raises(ValueError, match="take the MODEL from a loader node, or start ComfyUI with --disable-dynamic"):
        distilled(model, "sd3")


def test_full_memory_says_which_inputs_to_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = load("sd3", folder)
    monkeypatch.setattr(distill_progress.Progress, "step", full)
    with pytest.raises(RuntimeError, match=r"memory with 1 pictures at a time. Use a larger accumulate \(now 2\)"):
        distilled(model, "sd3")
    assert is_clean(model)


def test_progress_shows_the_loss_the_time_and_previews(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    sent: list[tuple[int, int, Any]] = []
    monkeypatch.setattr(distill_progress, "_show", texts.append)
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda *args, node_id: sent.append(args))
    plain, *_ = distilled(load("sd3", folder), "sd3")
    assert texts[-1].startswith(f"Step {STEPS} of {STEPS}, loss 0.") and texts[-1].endswith(", 0 s left")
    assert sent[-1][:2] == (STEPS, STEPS) and not any(preview for *_, preview in sent)
    sent.clear()
    seen, *_ = distilled(load("sd3", folder), "sd3", preview_every=[2])
    pictures = {value: preview[1].size for value, _, preview in sent if preview}
    assert pictures == {2: (8, 8), 4: (8, 8)}
    assert all(torch.equal(plain[key], seen[key]) for key in plain), "previews change nothing"
