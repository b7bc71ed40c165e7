"""Sampling of every kind of model that the host has, on its own clock and scale, with analytic networks."""

import math
from typing import Any

import numpy as np
import pytest
from run_script import run_script

from trajectory_consistency.trainer.find_comfyui import Host

pytestmark = pytest.mark.host

DISCRETE, CONTINUOUS, FLOW, BRIDGE = "DiscreteSchedule", "ContinuousSchedule", "FlowSchedule", "BridgeSchedule"

# Schedules by model_sampling, named after their origin in the host (scripts/kinds.py). A kind that is not listed here
# fails a test.
KINDS = {
    "ModelType EPS": DISCRETE,
    "ModelType V_PREDICTION": DISCRETE,
    "ModelType V_PREDICTION_EDM": CONTINUOUS,
    "ModelType STABLE_CASCADE": CONTINUOUS,
    "ModelType EDM": CONTINUOUS,
    "ModelType FLOW": FLOW,
    "ModelType V_PREDICTION_CONTINUOUS": CONTINUOUS,
    "ModelType FLUX": FLOW,
    "ModelType IMG_TO_IMG": DISCRETE,
    "ModelType FLOW_COSMOS": CONTINUOUS,
    "ModelType IMG_TO_IMG_FLOW": BRIDGE,
    "ModelType V_PREDICTION_DDPM": DISCRETE,
    "ModelType FLOW_AV": FLOW,
    **{
        f"ModelSamplingDiscrete {prediction} {zero_snr}": BRIDGE if prediction == "img_to_img_flow" else DISCRETE
        for prediction in ("eps", "v_prediction", "lcm", "x0", "img_to_img", "img_to_img_flow")
        for zero_snr in (False, True)
    },
    **{
        f"ModelSamplingContinuousEDM {prediction}": CONTINUOUS
        for prediction in ("v_prediction", "edm", "edm_playground_v2.5", "eps", "cosmos_rflow")
    },
    "ModelSamplingContinuousV v_prediction": CONTINUOUS,
    "ModelSamplingStableCascade": CONTINUOUS,
    "ModelSamplingSD3": FLOW,
    "ModelSamplingAuraFlow": FLOW,
    "ModelSamplingFlux": FLOW,
    "ModelSamplingLTXV": FLOW,
    "MiniMaxH3SigmaShift": FLOW,
    "ModelNoiseScale": FLOW,
    "class ModelSamplingDiscreteEDM": DISCRETE,
}
NOISY = [name for name, schedule in KINDS.items() if schedule != BRIDGE]

# Default shifts of the flow models' sigma(u): shift u / (1 + (shift - 1) u), or with an exponent.
SHIFTS = {"ModelSamplingSD3": 3.0, "ModelSamplingAuraFlow": 1.73, "MiniMaxH3SigmaShift": 12.0}
EXPONENTS = {"ModelType FLUX": 1.15, "ModelSamplingFlux": 1.15, "ModelSamplingLTXV": 2.05}


@pytest.fixture(scope="module")
def measured(comfy_host: Host) -> dict[str, Any]:
    return run_script(comfy_host, "clocks.py")


def _of(measured: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind not in measured["models"]:
        pytest.skip(f"this ComfyUI is too old for {kind}")
    found: dict[str, Any] = measured["models"][kind]
    return found


def test_no_kind_of_model_is_unknown(measured: dict[str, Any]) -> None:
    assert measured["models"].keys() - KINDS.keys() == set()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_clock(measured: dict[str, Any], kind: str) -> None:
    assert _of(measured, kind)["schedule"] == KINDS[kind]


# Where the steps are


@pytest.mark.parametrize("kind", KINDS)
def test_sigmas_are_evenly_spaced_on_the_clock_of_the_model(measured: dict[str, Any], kind: str) -> None:
    found = _of(measured, kind)
    for steps in (1, 2, 4):
        sigmas = found["sigmas"][str(steps)]
        assert sigmas == pytest.approx(_expected_sigmas(kind, found, steps), rel=1e-5)
        assert sigmas[0] == found["sigma_max"]  # exactly: at sigma_max the host starts from pure noise
        assert sigmas[-1] == 0
    assert found["half"] == pytest.approx(_expected_sigmas(kind, found, 4)[2:], rel=1e-5)
    assert found["none"] == []
    assert found["scheduler"] == found["sigmas"]["4"]


def _expected_sigmas(kind: str, found: dict[str, Any], steps: int) -> list[float]:
    if KINDS[kind] in (DISCRETE, BRIDGE):
        grid = {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]}[steps]
        return [*np.interp(grid, *_known(found)).tolist(), 0.0]
    times = [1 - i / steps for i in range(steps)]
    if KINDS[kind] == CONTINUOUS:
        highest = found["sigma_max"] / (1 + found["sigma_max"])
        return [*(u * highest / (1 - u * highest) for u in times), 0.0]
    if kind in EXPONENTS:
        return [*(math.exp(EXPONENTS[kind]) / (math.exp(EXPONENTS[kind]) + 1 / u - 1) for u in times), 0.0]
    shift = SHIFTS.get(kind, 1.0)
    return [*(shift * u / (1 + (shift - 1) * u) for u in times), 0.0]


def _known(found: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Return the timesteps of a discrete model, and their sigmas."""
    table: list[float] = found["table"]
    skip = 1000 // len(table)
    return list(range(skip - 1, 1000, skip)), table


@pytest.mark.parametrize("kind", KINDS)
def test_the_scheduler_returns_the_requested_number_of_sigmas(measured: dict[str, Any], kind: str) -> None:
    many = np.array(_of(measured, kind)["many"])
    assert len(many) == 1001
    assert many[-1] == 0
    knows_fewer = kind.startswith("ModelSamplingDiscrete lcm")  # so its lowest timesteps share one sigma
    assert (np.diff(many) <= 0).all() if knows_fewer else (np.diff(many) < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_input_is_refused_with_advice(measured: dict[str, Any], kind: str) -> None:
    found = _of(measured, kind)
    assert "steps is 0, but must be a whole number of at least 1" in found["bad steps"]
    assert "denoise is nan, but must be from 0.0 to 1.0" in found["bad denoise"]
    if KINDS[kind] in (DISCRETE, BRIDGE):
        assert "use steps of at most 50" in found["51"]
        assert "use fewer steps or a higher denoise" in found["too many"]
        assert "type whole numbers from 999 down to 0" in found["typed"]
    else:
        assert found["51"] == found["too many"] == "nothing was refused"
    if KINDS[kind] == CONTINUOUS:
        assert "this model has none, as its time is its sigma: leave timesteps empty" in found["typed"]


@pytest.mark.parametrize("kind", [kind for kind, schedule in KINDS.items() if schedule == FLOW])
def test_a_flow_model_takes_timesteps_in_thousandths(measured: dict[str, Any], kind: str) -> None:
    assert _of(measured, kind)["typed"] == "nothing was refused"
    assert _of(measured, kind)["by hand"] == pytest.approx([0.7505, 0.5, 0.0], rel=1e-6)


# Strategic stochastic sampling


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_strategic_target_is_on_the_clock_of_training(measured: dict[str, Any], kind: str, gamma: float) -> None:
    found = _of(measured, kind)
    inner = found["sigmas"]["4"][1:4]
    expected = [_expected_target(kind, found, sigma, gamma) for sigma in inner]
    assert found["targets"][str(gamma)] == pytest.approx(expected, rel=1e-5)


def _expected_target(kind: str, found: dict[str, Any], sigma: float, gamma: float) -> float:
    if KINDS[kind] == FLOW:
        return (1 - gamma) * sigma
    if KINDS[kind] == CONTINUOUS:
        time = (1 - gamma) * sigma / (1 + sigma)
        return time / (1 - time)
    timesteps, table = _known(found)
    t = timesteps[int(np.abs(np.log(table) - np.log(sigma)).argmin())]
    # Between two known timesteps log sigma is interpolated; below the lowest, 19, np.interp holds its sigma.
    return float(np.exp(np.interp(math.floor((1 - gamma) * t), timesteps, np.log(table))))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gamma_it_is_euler(measured: dict[str, Any], kind: str) -> None:
    found = _of(measured, kind)
    # The host's sampler computes x0 as a difference of numbers as large as sigma_max, which rounds more.
    rounding = 1e-7 * max(found["sigma_max"], 10)
    assert max(found["euler"]) < rounding


@pytest.mark.parametrize("kind", NOISY)
def test_with_gamma_1_it_is_multistep_consistency_sampling(measured: dict[str, Any], kind: str) -> None:
    found = _of(measured, kind)
    one_step, *more = found["lcm"]
    assert one_step == 0
    if KINDS[kind] == DISCRETE:  # s is then the lowest timestep, whose sigma is small but not 0
        assert all(1e-3 < error < (0.2 if "lcm" in kind else 0.05) for error in more)
    else:
        assert max(more) < 1e-6


@pytest.mark.parametrize("kind", NOISY)
def test_data_that_is_one_point_is_recovered(measured: dict[str, Any], kind: str) -> None:
    for run in _of(measured, kind)["point mass"]:
        assert run["error"] < 1e-6
        # At each step the kept and the added noise together have exactly the sigma of the host's scale.
        assert run["seen"] == pytest.approx([1.0] * len(run["seen"]), abs=0.03)


@pytest.mark.parametrize("kind", NOISY)
def test_a_gaussian_has_the_expected_moments(measured: dict[str, Any], kind: str) -> None:
    found = _of(measured, kind)
    for run in found["moments"]:
        steps = len(run["levels"]) - 1
        assert len(run["stds"]) == steps + 1
        for i in range(steps):
            expected = _std_after_a_step(kind, found, run, i)
            # The std of 16384 numbers has a standard error of 0.6 %. One step returns a constant, exact up to rounding.
            assert run["stds"][i + 1] == pytest.approx(expected, rel=0.02, abs=1e-6)
            error_of_mean = 5 * run["stds"][i + 1] / math.sqrt(16384) + 1e-6
            assert run["means"][i + 1] == pytest.approx(run["levels"][i + 1][0] * 0.7, abs=error_of_mean)


def _std_after_a_step(kind: str, found: dict[str, Any], run: dict[str, Any], i: int) -> float:
    """Return the std of x after step i from that before it: for a Gaussian a step is linear, and variances add up."""
    (alpha, sigma), (alpha_next, sigma_next) = run["levels"][i : i + 2]  # the host's own factors of image and noise
    sigmas = found["sigmas"][str(len(run["levels"]) - 1)]
    target = _expected_target(kind, found, sigmas[i + 1], run["gamma"]) if sigmas[i + 1] else 0.0
    is_flow = KINDS[kind] == FLOW
    alpha_s, sigma_s = (1 - target if is_flow else 1.0), target * sigma / sigmas[i]
    x0 = alpha * 0.4**2 / (alpha**2 * 0.4**2 + sigma**2)  # derivative of the estimate by x
    eps = (1 - alpha * x0) / sigma
    kept = (alpha_next / alpha_s) * (alpha_s * x0 + sigma_s * eps)
    fresh = sigma_next**2 - (alpha_next / alpha_s * sigma_s) ** 2
    return math.sqrt((kept * run["stds"][i]) ** 2 + max(fresh, 0))


@pytest.mark.parametrize("kind", [kind for kind, schedule in KINDS.items() if schedule == BRIDGE])
def test_a_model_without_noise_refuses_gamma_above_0(measured: dict[str, Any], kind: str) -> None:
    found = _of(measured, kind)
    assert "gamma (eta) is 0.3, but this model carries one picture into another" in found["gamma"]
    assert found["one step"] == 0  # a single step, in which gamma has no effect


# The sampler by itself


def test_the_callback_gets_each_step(measured: dict[str, Any]) -> None:
    assert measured["details"]["steps"] == [[i, 4] for i in range(4)]


def test_without_a_seed_each_run_has_different_noise(measured: dict[str, Any]) -> None:
    assert measured["details"]["unseeded_runs_differ"]


@pytest.mark.parametrize("kind", ["ModelType EPS", "ModelSamplingDiscrete v_prediction True", "ModelType FLOW"])
@pytest.mark.parametrize(("dtype", "rounding"), [("torch.float16", 1e-3), ("torch.bfloat16", 8e-3)])
def test_half_precision_latents(measured: dict[str, Any], kind: str, dtype: str, rounding: float) -> None:
    # This holds at zero terminal SNR too: noise of sigma = 4518.76 is below the maximum of float16, 65504.
    found = measured["details"]["half"][f"{kind}, {dtype}"]
    assert found["dtype"] == dtype
    assert found["error"] < rounding


def test_one_sigma_is_no_step(measured: dict[str, Any]) -> None:
    assert measured["details"]["calls_for_one_sigma"] == 0


def test_optional_arguments_may_be_omitted(measured: dict[str, Any]) -> None:
    assert measured["details"]["without_options"] < 1e-6
