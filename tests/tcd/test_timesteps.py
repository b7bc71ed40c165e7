"""Which timesteps a run visits: against the reference scheduler's choice, and what people type."""

import math

import pytest
from diffusers import TCDScheduler

from trajectory_consistency.tcd import parse_flow_times, parse_timesteps, refined_origin_steps, timestep_grid

# The grid


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 679, 339]),
        (4, [999, 759, 499, 259]),
        (5, [999, 799, 599, 399, 199]),
        (6, [999, 839, 679, 499, 339, 179]),
        (7, [999, 859, 719, 579, 439, 299, 159]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
        (50, list(range(999, 0, -20))),
    ],
)
def test_grid(steps: int, timesteps: list[int]) -> None:
    assert timestep_grid(steps) == timesteps


@pytest.mark.parametrize("denoise", [0.02, 0.1, 0.29, 0.5, 0.58, 0.8, 0.99, 1.0])
def test_grid_is_that_of_the_reference_scheduler_for_every_number_of_steps(denoise: float) -> None:
    reference = TCDScheduler()
    for steps in range(1, int(50 * denoise) + 1):
        reference.set_timesteps(steps, strength=denoise)
        assert timestep_grid(steps, denoise=denoise) == reference.timesteps.tolist(), steps


def test_grid_of_another_distillation() -> None:
    assert timestep_grid(2, num_timesteps=1000, origin_steps=4) == [999, 499]
    assert timestep_grid(2, num_timesteps=100, origin_steps=10, denoise=0.5) == [49, 29]


def test_grid_without_denoising_is_empty() -> None:
    assert timestep_grid(4, denoise=0.0) == []


@pytest.mark.parametrize("steps", [0, -1, 2.0, "4", True, None])
def test_steps_that_are_no_positive_number_are_refused(steps: object) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        timestep_grid(steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("denoise", [-0.1, 1.1, math.nan, math.inf])
def test_denoise_out_of_range_is_refused(denoise: float) -> None:
    with pytest.raises(ValueError, match="denoise is .* must be from 0.0 to 1.0"):
        timestep_grid(4, denoise=denoise)


@pytest.mark.parametrize(
    ("steps", "denoise", "advice"),
    [
        (51, 1.0, "use steps of at most 50$"),
        (8, 0.1, "use steps of at most 5 or denoise of at least 0.16$"),
        (1, 0.01, "use denoise of at least 0.02$"),
        (29, 0.58, "use steps of at most 28 or denoise of at least 0.59$"),
    ],
)
def test_too_many_steps_are_refused_with_what_to_type(steps: int, denoise: float, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        timestep_grid(steps, denoise=denoise)


@pytest.mark.parametrize("origin_steps", [0, 1001])
def test_a_grid_finer_than_the_timesteps_is_refused(origin_steps: int) -> None:
    with pytest.raises(ValueError, match="origin_steps"):
        timestep_grid(1, origin_steps=origin_steps)


# Timesteps that a person types


@pytest.mark.parametrize(
    ("text", "timesteps"),
    [("800", [800]), ("999,759,499,259", [999, 759, 499, 259]), (" 999, 0 ", [999, 0])],
)
def test_parse_timesteps(text: str, timesteps: list[int]) -> None:
    assert parse_timesteps(text) == timesteps


@pytest.mark.parametrize("text", ["", "a", "999;499", "999,,499", "999,", "1e3", "999.5", "9_9"])
def test_text_that_is_no_timesteps_is_refused_with_what_to_type(text: str) -> None:
    with pytest.raises(ValueError, match="type whole numbers from 999 down to 0"):
        parse_timesteps(text)


@pytest.mark.parametrize(("text", "num_timesteps"), [("1000", 1000), ("-1", 1000), ("999,-5", 1000), ("100", 100)])
def test_timesteps_out_of_range_are_refused(text: str, num_timesteps: int) -> None:
    with pytest.raises(ValueError, match=f"out of range: .* from {num_timesteps - 1} down to 0"):
        parse_timesteps(text, num_timesteps=num_timesteps)


@pytest.mark.parametrize("text", ["499,999", "999,999", "999,499,500"])
def test_timesteps_that_do_not_descend_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must descend"):
        parse_timesteps(text)


@pytest.mark.parametrize(
    ("text", "times"),
    [("1000", [1.0]), ("1000,750,500,250", [1.0, 0.75, 0.5, 0.25]), (" 913.0435, 1e-3", [0.9130435, 1e-6])],
)
def test_flow_times_are_typed_in_thousandths(text: str, times: list[float]) -> None:
    assert parse_flow_times(text) == pytest.approx(times, rel=1e-12)


@pytest.mark.parametrize("text", ["", "a", "1000;500", "1000,,500", "1000,"])
def test_text_that_is_no_flow_times_is_refused_with_what_to_type(text: str) -> None:
    with pytest.raises(ValueError, match="type numbers from 1000 down to above 0"):
        parse_flow_times(text)


@pytest.mark.parametrize("text", ["1000.5", "0", "1000,0", "-1", "nan", "inf"])
def test_flow_times_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="out of range: type numbers from 1000 down to above 0"):
        parse_flow_times(text)


def test_flow_times_that_do_not_descend_are_refused() -> None:
    with pytest.raises(ValueError, match="timesteps has 750.5 after 750.5, but must descend"):
        parse_flow_times("1000,750.5,750.5")


# Finer grids


@pytest.mark.parametrize(
    ("steps", "origin_steps"),
    [(1, 50), (50, 50), (51, 100), (100, 100), (101, 200), (201, 250), (251, 500), (501, 1000), (1000, 1000)],
)
def test_the_coarsest_grid_that_has_enough_timesteps(steps: int, origin_steps: int) -> None:
    assert refined_origin_steps(steps) == origin_steps
    fine = set(timestep_grid(origin_steps, origin_steps=origin_steps))
    assert len(fine) == origin_steps
    assert set(timestep_grid(50)) <= fine  # a refinement: it visits the distilled timesteps too


def test_more_steps_than_timesteps_are_refused_with_what_to_change() -> None:
    with pytest.raises(ValueError, match="is 1001, but the model has 1000 timesteps: use fewer steps or a higher den"):
        refined_origin_steps(1001)
