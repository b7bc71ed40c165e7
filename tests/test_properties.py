"""Laws that hold for every schedule, jump, grid, name, configuration and bucket: hypothesis looks for an exception."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_spellings import SPELLINGS, spelled
from trajectory_consistency.tcd import (
    ContinuousSchedule,
    DiscreteSchedule,
    FlowSchedule,
    Level,
    Schedule,
    jump,
    kohya_name,
    lora_modules,
    renoise,
    sample_tcd,
    scaled_linear_alpha_bar,
    seeded_noise,
    timestep_grid,
    to_kohya,
    zero_terminal_snr,
)
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data.buckets import Buckets, Size
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models import lora_layouts
from trajectory_consistency.trainer.models.unet import families

few = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
numbers = st.floats(-3, 3)


@st.composite
def discrete_schedules(draw: st.DrawFn) -> DiscreteSchedule:
    """Betas of any length and range, with zero terminal SNR or not, of which a model may know every k-th alone."""
    count = draw(st.integers(50, 1000))
    start = draw(st.floats(1e-4, 2e-3))
    alpha_bar = scaled_linear_alpha_bar(count, start, draw(st.floats(2 * start, 2e-2)))
    if draw(st.booleans()):
        return DiscreteSchedule.from_alpha_bar(zero_terminal_snr(alpha_bar))
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    return DiscreteSchedule(sigmas, num_timesteps=count * draw(st.integers(1, 4)))


@st.composite
def flow_schedules(draw: st.DrawFn) -> FlowSchedule:
    """Any shift, of the form of SD3 or of a power."""
    shift = draw(st.floats(0.2, 12))
    if draw(st.booleans()):
        return FlowSchedule(lambda u: u ** min(shift, 2.0))
    return FlowSchedule(lambda u: shift * u / (1 + (shift - 1) * u))


continuous_schedules = st.floats(1, 500).map(ContinuousSchedule)
schedules = st.one_of(discrete_schedules(), flow_schedules(), continuous_schedules)


def levels(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of every whole training time, float64."""
    alpha, sigma = schedule.point(torch.arange(schedule.num_times)).level
    return torch.as_tensor(alpha).double(), torch.as_tensor(sigma).double()


@few
@given(schedules)
def test_signal_falls_and_noise_rises_with_time(schedule: Schedule) -> None:
    alpha, sigma = levels(schedule)
    assert (alpha.diff() <= 1e-6).all() and (sigma.diff() >= -1e-6).all()
    assert alpha[0] > 0.99 and sigma[0] < 0.1
    whole = alpha + sigma if isinstance(schedule, FlowSchedule) else alpha**2 + sigma**2
    assert torch.allclose(whole, torch.ones_like(whole), atol=1e-6)


@few
@given(st.floats(1e-4, 2e-3), st.floats(5e-3, 2e-2), st.integers(10, 1000))
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_clean_end(start: float, end: float, count: int) -> None:
    alpha_bar = scaled_linear_alpha_bar(count, start, end)
    schedule = DiscreteSchedule.from_alpha_bar(zero_terminal_snr(alpha_bar))
    alpha, sigma = levels(schedule)
    assert alpha[-1] == 0 and sigma[-1] == 1 and alpha[-2] > 0
    assert alpha[0] ** 2 == pytest.approx(float(alpha_bar[0]), rel=1e-6)


@few
@given(schedules)
def test_a_time_is_found_again_by_its_sigma(schedule: Schedule) -> None:
    if isinstance(schedule, DiscreteSchedule):
        known = torch.arange(len(schedule.sigmas)) * schedule._skip + schedule._skip - 1
        assert torch.equal(schedule.timestep(schedule.sigma(known)), known)
    else:
        times = torch.arange(schedule.num_times)
        sigma = schedule.sigmas_for(schedule.num_times - 1).flip(0)
        found = schedule.point_at(sigma).time
        assert torch.equal(sigma[found], sigma) and (sigma.unique().numel() < len(times) or torch.equal(found, times))


@few
@given(schedules, st.data())
def test_the_middle_in_half_log_snr_lies_between_both_times(schedule: Schedule, data: st.DataObject) -> None:
    t, s = (torch.tensor([data.draw(st.integers(0, schedule.num_times - 1))]) for _ in range(2))
    t, s = torch.maximum(t, s), torch.minimum(t, s)
    middle = schedule.midpoint(t, s)
    assert (s <= middle).all() and (middle <= t).all()


@st.composite
def three_levels(draw: st.DrawFn) -> tuple[Level, Level, Level]:
    """The levels of times t >= u >= s of a schedule that are not without noise."""
    schedule = draw(schedules)
    times = sorted(draw(st.tuples(*[st.integers(1, schedule.num_times - 1)] * 3)), reverse=True)
    alpha, sigma = levels(schedule)
    assume(sigma[times[-1]] > 1e-6)
    t, u, s = (Level(float(alpha[time]), float(sigma[time])) for time in times)
    return t, u, s


@few
@given(three_levels(), numbers, numbers)
def test_a_jump_in_two_is_the_jump_and_none_changes_nothing(
    times: tuple[Level, Level, Level], start: float, clean: float
) -> None:
    t, u, s = times
    x, x0 = torch.tensor([start, clean]).double()
    torch.testing.assert_close(jump(jump(x, x0, t, u), x0, u, s), jump(x, x0, t, s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jump(x, x0, t, t), x, rtol=0, atol=1e-12)
    noise = (x - t.alpha * x0) / t.sigma
    torch.testing.assert_close(jump(x, x0, t, s), s.alpha * x0 + s.sigma * noise, rtol=1e-9, atol=1e-9)


@few
@given(three_levels(), numbers)
def test_noise_that_is_added_again_makes_up_the_level(times: tuple[Level, Level, Level], clean: float) -> None:
    t, _, s = times
    x0, zero, one = torch.tensor([clean, 0.0, 1.0]).double()
    torch.testing.assert_close(renoise(s.alpha * x0, s, t, zero), t.alpha * x0, rtol=1e-9, atol=1e-9)
    kept, added = renoise(torch.full_like(x0, float(s.sigma)), s, t, zero), renoise(zero, s, t, one)
    assert float(kept**2 + added**2) == pytest.approx(float(t.sigma) ** 2, rel=1e-6, abs=1e-9)


@few
@given(three_levels(), numbers, st.floats(0, 2), numbers)
def test_jumps_follow_the_trajectory_of_a_gaussian(
    times: tuple[Level, Level, Level], mean: float, variance: float, start: float
) -> None:
    """Exact for a point; otherwise the error of n jumps falls as 1 / n."""
    t, _, s = times

    def deviation(level: Level) -> float:
        return math.sqrt(level.alpha**2 * variance + level.sigma**2)

    def error(count: int) -> float:
        x, at = t.alpha * mean + deviation(t) * start, t
        angle_t, angle_s = (math.atan2(level.sigma, level.alpha) for level in (t, s))
        length_t, length_s = math.hypot(*t), math.hypot(*s)
        for k in range(1, count + 1):
            angle = angle_t + (angle_s - angle_t) * k / count
            length = length_t + (length_s - length_t) * k / count
            to = Level(length * math.cos(angle), length * math.sin(angle))
            x0 = mean + variance * at.alpha / deviation(at) ** 2 * (x - at.alpha * mean)
            x, at = jump(x, x0, at, to), to
        return abs(x - (s.alpha * mean + deviation(s) * start))

    if variance == 0:
        assert error(1) < 1e-9
    assert error(256) <= 0.6 * error(128) + 1e-6


@few
@given(st.integers(1, 60), st.sampled_from((50, 100, 250, 1000)), st.floats(0, 1), st.integers(1, 5))
def test_a_grid_descends_from_its_highest_time_within_the_range(
    steps: int, origin: int, denoise: float, factor: int
) -> None:
    count = origin * factor
    try:
        grid = timestep_grid(steps, num_timesteps=count, origin_steps=origin, denoise=denoise)
    except ValueError as error:
        assert int(origin * denoise) < steps and "steps is" in str(error)
        return
    assert len(grid) == (steps if denoise else 0) and grid == sorted(set(grid), reverse=True)
    assert all(0 <= time < count and (time + 1) % factor == 0 for time in grid)
    assert not grid or grid[0] == int(origin * denoise) * factor - 1


@few
@given(schedules, st.integers(1, 40), st.floats(0.1, 1))
def test_sigmas_of_a_run_descend_to_zero(schedule: Schedule, steps: int, denoise: float) -> None:
    try:
        sigmas = schedule.sigmas_for(steps, denoise)
    except ValueError as error:
        assert isinstance(schedule, DiscreteSchedule) and "steps is" in str(error) or "origin_steps" in str(error)
        return
    assert len(sigmas) == steps + 1 and (sigmas.diff() < 0).all() and sigmas[-1] == 0


@few
@given(schedules, st.floats(0, 1), st.integers(2, 6), st.data())
def test_a_run_that_is_split_is_the_whole_run(
    schedule: Schedule, gamma: float, steps: int, data: st.DataObject
) -> None:
    assume(schedule.num_times >= 50)
    sigmas = schedule.sigmas_for(steps)
    at = data.draw(st.integers(1, steps - 1))

    def part(x: Tensor, sigmas: Tensor) -> Tensor:
        return sample_tcd(
            lambda x, sigma, sigma_s: x / (1 + sigma + sigma_s),
            x,
            sigmas,
            schedule=schedule,
            gamma=gamma,
            noise=seeded_noise(7),
        )

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part(part(x, sigmas[: at + 1]), sigmas[at:]), part(x, sigmas), rtol=0, atol=0)


LAYERS = {family: sorted(families.layer_shapes(family)) for family in ("tiny", "sd15")}
a_name = st.text("abyz_019", min_size=1, max_size=9).map("m{}".format)


@few
@given(st.sampled_from(list(LAYERS)), st.sampled_from(list(SPELLINGS)), st.data())
def test_every_spelling_of_a_layer_has_one_kohya_name(family: str, spelling: str, data: st.DataObject) -> None:
    layers = data.draw(st.lists(st.sampled_from(LAYERS[family]), min_size=1, max_size=8, unique=True))
    halves = {(path, side): torch.empty(2, 2, device="meta") for path in layers for side in ("down", "up")}
    names = to_kohya(spelled(halves, SPELLINGS[spelling]))
    assert set(names) == {f"{kohya_name(path)}.lora_{side}.weight" for path, side in halves}
    assert len(lora_modules(names)[0]) == len(layers), "no two layers have one name"
    assert set(to_kohya(names)) == set(names)


@few
@given(st.lists(a_name, min_size=1, max_size=6).map(".".join), st.sampled_from(["", "diffusion_model.", "unet."]))
def test_the_name_of_any_layer_is_its_own_kohya_name_again(path: str, prefix: str) -> None:
    assume(not path.startswith(("unet.", "transformer.", "lycoris_", "lora_", "diffusion_model.", "base_model.")))
    assume(".processor" not in path)
    name = kohya_name(prefix + path)
    assert name == "lora_unet_" + path.replace(".", "_") and kohya_name(name) == name


def test_every_layer_is_found_by_the_kohya_name_of_its_peft_name() -> None:
    """A layer has several kohya names, as files spell them, and one of PEFT's."""
    for layout in lora_layouts():
        for kohya, peft in layout.peft_names.items():
            assert layout.peft_names[kohya_name(peft)] == peft, kohya


def setting(hint: Any, limits: Any) -> st.SearchStrategy[Any]:
    """Values of one setting that are valid by themselves."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is Union:  # a number or a word
        return st.one_of([setting(each, limits) for each in get_args(hint)])
    if get_origin(hint) is tuple:
        return st.lists(setting(get_args(hint)[0], limits), max_size=3)
    if is_dataclass(hint):
        return section(hint, count=2)
    low, high = limits.get("low", 0), min(limits.get("high", 1e6), 1e6 if hint is float else 2**63 - 1)
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        str: st.text(max_size=12),
        int: st.integers(math.ceil(low), int(high)),
        float: st.floats(low, high),
    }
    return kinds[hint]


@st.composite
def section(draw: st.DrawFn, kind: Any, count: int) -> dict[str, Any]:
    """Some settings of one dataclass."""
    hints = get_type_hints(kind)
    of_kind = {entry.name: setting(hints[entry.name], entry.metadata) for entry in fields(kind)}
    chosen = draw(st.lists(st.sampled_from(sorted(of_kind)), max_size=count, unique=True))
    return {name: draw(of_kind[name]) for name in chosen}


RIGHT = {"base": {"path": "tiny"}, "data": {"folder": "pictures"}, "output": {"folder": "out"}}
SECTIONS = get_type_hints(config.Config)


@st.composite
def whole_configurations(draw: st.DrawFn) -> config.Config:
    """A configuration with settings that fit each other, some of them not the default."""
    values = {name: {**RIGHT.get(name, {}), **draw(section(kind, count=2))} for name, kind in SECTIONS.items()}
    try:
        return config.from_mapping(values)
    except UserError:
        assume(False)
        raise


@few
@given(whole_configurations())
def test_a_configuration_is_read_back_equal(written: config.Config) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_text(written.to_toml(), encoding="utf-8")
        assert config.load(path) == written


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
some_key = st.sampled_from(sorted({entry.name for kind in SECTIONS.values() for entry in fields(kind)}))


@few
@given(st.dictionaries(st.sampled_from(sorted(SECTIONS)), anything | st.dictionaries(some_key, anything, max_size=3)))
def test_any_garbage_is_a_configuration_or_refused_with_a_message(garbage: dict[str, Any]) -> None:
    values = {**RIGHT, **garbage}
    try:
        assert isinstance(config.from_mapping(values), config.Config)
    except UserError as error:
        assert len(str(error)) > 10


@few
@given(
    st.sampled_from((8, 16, 64)), st.integers(64, 2048), st.integers(1, 6000), st.integers(1, 6000), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_every_picture_has_one_bucket_or_is_too_small(
    step: int, resolution: int, height: int, width: int, square: bool, upscale: bool
) -> None:
    rule, original = Buckets(resolution, step, square, upscale), Size(height, width)
    crop = rule.fit(original)
    if crop is None:
        assert not upscale and min(original) < 2 * resolution, "no bucket has a longer side"
        return
    bucket, resized = crop.bucket, crop.resized
    assert crop == rule.fit(original) and crop.original == original
    assert bucket.height % step == bucket.width % step == 0 < bucket.height * bucket.width <= resolution**2
    assert not square or bucket.height == bucket.width
    assert 0 <= crop.top <= resized.height - bucket.height and 0 <= crop.left <= resized.width - bucket.width
    assert bucket.height == resized.height or bucket.width == resized.width, "no more is cut than must be"
    assert upscale or (resized.height <= height and resized.width <= width)
