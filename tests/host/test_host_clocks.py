"""Every kind of model that the host has, each on its own clock and scale."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trainer.demo.comfy_server import PACK, Host

pytestmark = pytest.mark.host

CLOCKS = {
    "discrete eps": "DiscreteSchedule",
    "discrete v, zero snr": "DiscreteSchedule",
    "discrete lcm": "SparseSchedule",
    "cascade": "ContinuousSchedule",
    "edm": "ContinuousSchedule",
    "continuous v": "ContinuousSchedule",
    "cosmos": "ContinuousSchedule",
    "flow": "FlowSchedule",
    "flux": "FlowSchedule",
    "flow, noise scale 2": "FlowSchedule",
}


@pytest.fixture(scope="module")
def measured(comfy_host: Host) -> dict[str, Any]:
    script = Path(__file__).parent / "scripts" / "clocks.py"
    command = [str(comfy_host.python), str(script), str(PACK)]
    done = subprocess.run(command, cwd=comfy_host.folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("model", CLOCKS)
def test_each_model_has_its_clock(measured: dict[str, Any], model: str) -> None:
    if model not in measured["walls"]:
        pytest.skip(f"this ComfyUI is too old for {model}")
    assert measured["walls"][model]["schedule"] == CLOCKS[model]


@pytest.mark.parametrize("model", CLOCKS)
@pytest.mark.parametrize("gamma", ["0.0", "0.3", "1.0"])
def test_a_network_that_is_sure_is_believed(measured: dict[str, Any], model: str, gamma: str) -> None:
    if model not in measured["walls"]:
        pytest.skip(f"this ComfyUI is too old for {model}")
    wall = measured["walls"][model]
    assert wall["error"][gamma] < 1e-6
    # At each step x is as noisy as the model's scale says: what was kept and what was added make it up to sigma.
    assert len(wall["seen"][gamma]) == 4
    assert wall["seen"][gamma] == pytest.approx([1.0] * 4, abs=0.03)


def test_a_sparse_clock_has_the_same_targets(measured: dict[str, Any]) -> None:
    full, sparse = measured["targets"]["full"], measured["targets"]["sparse"]
    assert sparse[:6] == pytest.approx(full[:6], rel=2e-3)  # between its timesteps it interpolates
    assert sparse[6:] == pytest.approx([0.1345] * 3, rel=1e-3)  # its lowest timestep, 19, in place of 0


def test_the_callback_hears_each_step(measured: dict[str, Any]) -> None:
    assert measured["details"]["steps"] == [[i, 4] for i in range(4)]


def test_without_a_seed_noise_is_new_each_time(measured: dict[str, Any]) -> None:
    assert measured["details"]["unseeded_runs_differ"]


def test_half_precision_latents(measured: dict[str, Any]) -> None:
    assert measured["details"]["half"] == ["torch.float16", True]


def test_one_sigma_is_no_step(measured: dict[str, Any]) -> None:
    assert measured["details"]["calls_for_one_sigma"] == 0


def test_what_is_optional_may_be_left_out(measured: dict[str, Any]) -> None:
    assert measured["details"]["called_barely"] < 1e-6
