"""The adapter of tcd/ beside the host's own layers."""

import pytest
from run_script import run_script

from trajectory_consistency.trainer.find_comfyui import Host

pytestmark = pytest.mark.host


def test_a_lora_is_trained_beside_every_kind_of_layer_of_the_host(comfy_host: Host) -> None:
    found = run_script(comfy_host, "layers.py")
    assert len(found) >= 6
    for layer, (error, trained) in found.items():
        assert error < 1e-5 and trained, layer
