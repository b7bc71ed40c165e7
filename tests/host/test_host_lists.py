"""The pack's entries in the host's own lists, next to those of other packs, and the batch index of each image."""

from typing import Any

import pytest
from run_script import run_script

from trajectory_consistency.trainer.find_comfyui import Host

pytestmark = pytest.mark.host

EVERYWHERE = {
    name: ["tcd"] for name in ("samplers", "ksampler's samplers", "schedulers", "ksampler's schedulers", "handlers")
}


@pytest.fixture(scope="module")
def seen(comfy_host: Host) -> dict[str, Any]:
    return run_script(comfy_host, "lists.py")


def test_it_is_registered_once_in_place_and_without_a_message(seen: dict[str, Any]) -> None:
    lists = seen["lists"]
    assert lists["once"] == lists["twice"] == EVERYWHERE
    assert lists["in place"]
    assert lists["messages"] == []


def test_a_reload_of_the_hosts_samplers_does_not_undo_it(seen: dict[str, Any]) -> None:
    assert seen["lists"]["after a reload"]


def test_lists_that_another_pack_replaced_get_it_too(seen: dict[str, Any]) -> None:
    assert seen["lists"]["where lists were replaced"] == EVERYWHERE | {"messages": []}


@pytest.mark.parametrize("what", ["sampler", "scheduler"])
def test_another_packs_tcd_is_kept_and_logged(seen: dict[str, Any], what: str) -> None:
    found = seen["lists"][f"beside another pack's {what}"]
    assert found["kept"]
    assert {name: found[name] for name in EVERYWHERE} == EVERYWHERE
    times = 2 if what == "sampler" else 1  # once for each call of register()
    assert (
        found["messages"]
        == [
            f"{what.capitalize()} 'tcd' in KSampler's list belongs to another pack and was kept: to use this pack's, "
            "use SamplerCustom with TCD Sampler and TCD Sigmas"
        ]
        * times
    )


def test_eta_for_another_packs_sampler_is_logged(seen: dict[str, Any]) -> None:
    found = seen["lists"]["where another came later"]
    assert found["messages before"] == []
    assert found["messages"] == [
        "'tcd' in KSampler's list belongs to another pack and ignores eta: use SamplerCustom with TCD Sampler"
    ]


def test_batch_indices_are_found_in_the_hosts_own_noise(seen: dict[str, Any]) -> None:
    found = {name: indices for name, indices in seen["batch indices"].items() if "seed" in name}
    assert len(found) == 45
    for name, (batch, third, some, first) in found.items():
        assert batch is None, name
        assert third == [2], name
        assert some == [5, 1, 5], name
        assert first in (None, [0]), name


def test_other_noise_has_no_batch_indices(seen: dict[str, Any]) -> None:
    found = seen["batch indices"]
    assert found["large"] == [20]
    assert found["from elsewhere"] is None
    assert found["partly from elsewhere"] is None
    assert found["none"] == [None, None]
    assert found["leaves the global generator alone"]


def test_video_latents(seen: dict[str, Any]) -> None:
    video = seen["video"]
    assert video["shape"] == [3, 16, 3, 4, 5]
    assert video["alone"] < 1e-5
    assert video["split"] < 1e-5
    assert video["difference"] > 0.1
