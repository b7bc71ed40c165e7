"""Previews: drawn from the file that is exported, beside the teacher and the start, without a trace in the training."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tcd import timestep_grid
from tiny_base import network, small_config, write_base, write_inputs
from trainer import preview, run
from trainer.adapter import load_adapter
from trainer.config import Config
from trainer.sample import Guidance, decode, initial_noise, sample_latents
from trainer.scenes import load_picture, scene_names
from trainer.teacher import load_encoders

PROMPTS = ["a red circle", "a red circle, \u00e0 gauche"]
STEPS, SEEDS = (1, 4), (3,)


def inputs(folder: Path) -> dict[str, dict[str, object]]:
    """A base, and pictures, and another VAE in the place of the base's own."""
    values = write_inputs(folder)
    values["base"]["vae"] = str(write_base(folder / "other.safetensors", seed=1))
    return values


def previewed(folder: Path, **training: object) -> Config:
    values = inputs(folder)
    values["preview"] = {"prompts": PROMPTS, "seeds": SEEDS, "steps": STEPS, "every": 2, "eta": 0.5, "cfg": 1.0}
    values["method"] = {"guidance_min": 2.0, "guidance_max": 4.0}
    return small_config(values, steps=3, **training)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = previewed(tmp_path_factory.mktemp("previewed"))
    run.run(config)
    return config


def shown(config: Config, when: str, which: int, steps: int) -> torch.Tensor:
    folder = config.output_folder / "previews"
    return load_picture(preview.picture_path(folder, when, scene_names(PROMPTS, SEEDS)[which], steps))


def drawn(config: Config, lora: Path | None, which: int, steps: int, gamma: float, cfg: float) -> torch.Tensor:
    """The picture that a person gets who loads the base, and a file, and samples."""
    net, encoders = network(Path(config.base.path)), load_encoders(config.base.path, vae=config.base.vae)
    if lora:
        load_adapter(net.unet, lora)
    prompt, seed = divmod(which, len(SEEDS))
    latents = sample_latents(
        net,
        encoders.encode([PROMPTS[prompt]]),
        timesteps=timestep_grid(steps),
        gamma=gamma,
        noise=initial_noise(SEEDS[seed], (1, 4, 8, 8)),
        seed=SEEDS[seed],
        guidance=None if cfg == 1 else Guidance(encoders.encode([""]), cfg),
    )
    return decode(encoders.vae, latents)[0]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.int() - other.int()).abs().max() <= 1)


@pytest.mark.parametrize("which", [0, 1])
def test_pictures_are_those_of_the_file_of_their_step(done: Config, which: int) -> None:
    half_way = done.output_folder / "previews" / "tcd-lora-step-000002.safetensors"
    for steps in STEPS:
        assert same(shown(done, "step-000000", which, steps), drawn(done, None, which, steps, 0.5, 1.0))
        assert same(shown(done, "step-000002", which, steps), drawn(done, half_way, which, steps, 0.5, 1.0))
        assert same(shown(done, "step-000003", which, steps), drawn(done, done.lora_path, which, steps, 0.5, 1.0))
    assert not same(shown(done, "step-000000", which, 4), shown(done, "step-000003", which, 4))


def test_the_teachers_picture_is_guided_and_has_no_adapter(done: Config) -> None:
    assert same(shown(done, "teacher", 1, 50), drawn(done, None, 1, 50, 0.0, 3.0))


def test_training_is_the_same_to_the_last_bit_without_previews(done: Config, tmp_path: Path) -> None:
    plain = small_config(inputs(tmp_path) | {"method": {"guidance_min": 2.0, "guidance_max": 4.0}}, steps=3)
    one, other = load_file(done.lora_path), load_file(run.run(plain))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (plain.output_folder / "previews").exists()


def test_the_grid_has_the_teacher_the_start_and_the_step_in_its_rows(done: Config) -> None:
    folder = done.output_folder / "previews"
    for step, rows in ((0, 1 + 2), (2, 1 + 2 * 2), (3, 1 + 2 * 2)):
        with Image.open(preview.grid_path(folder, step)) as grid:
            height = grid.size[1]
        assert height // 134 >= rows and height < (rows + 1.5) * 134, (step, height)
    assert not (folder / "tcd-lora-step-000003.safetensors").exists(), "the last file is the run's own"


def test_previews_are_no_reason_to_refuse_a_run_that_goes_on(done: Config, tmp_path: Path) -> None:
    from trainer.config import changes, from_mapping

    values = write_inputs(tmp_path)
    assert not changes(from_mapping(values), from_mapping(values | {"preview": {"prompts": ["other"]}}))


def test_a_finished_run_has_a_report_with_every_picture_in_it(done: Config) -> None:
    page = (done.output_folder / "report.html").read_text(encoding="utf-8")
    times = 3  # before the first step, after the second and after the last
    assert page.count("data:image/jpeg;base64,") == len(PROMPTS) * len(SEEDS) * (1 + times * len(STEPS))
