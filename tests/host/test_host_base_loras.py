"""The user's own LoRAs on SD1.5: both engines make the same teacher of them."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import sd15_unet, write_sd15_mini
from loras import merged, random_lora
from run_script import run_script
from safetensors.torch import load_file, save_file

from small_bases import use_unet
from trajectory_consistency.trainer.config.base import BaseConfig, BaseLora
from trajectory_consistency.trainer.find_comfyui import Host
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.models.unet.ldm import UNET_PREFIX, unet_to_ldm

pytestmark = pytest.mark.host


def test_both_engines_give_the_same_weights(comfy_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sd15_unet()
    use_unet(monkeypatch, "sd15", unet, tmp_path / "families")
    write_sd15_mini(tmp_path / "base.safetensors", unet)
    strengths = {"first.safetensors": 0.8, "second.safetensors": -0.5}
    expected = unet
    for seed, (name, strength) in enumerate(strengths.items()):
        lora = random_lora(unet, seed)
        save_file(lora, tmp_path / name)
        expected = merged(expected, lora, strength)
    loras = [(str(tmp_path / name), strength) for name, strength in strengths.items()]
    tables = tuple(BaseLora(path=path, strength=strength) for path, strength in loras)
    base = BaseConfig(path=str(tmp_path / "base.safetensors"), loras=tables)
    ours = UNetCheckpoint(base).load(torch.float32, torch.device("cpu")).network
    target = tmp_path / "merged.safetensors"
    run_script(comfy_host, "merged_weights.py", base.path, str(target), json.dumps(loras))
    by_host, by_hand, by_diffusers, plain = (
        load_file(target),
        *(unet_to_ldm(each.state_dict(), each.config) for each in (expected, ours, unet)),
    )
    by_host = {UNET_PREFIX + name: value for name, value in by_host.items()}
    assert by_host.keys() == by_diffusers.keys() == by_hand.keys()
    for name, value in by_hand.items():
        for found in (by_host[name], by_diffusers[name]):
            assert (found - value).norm() <= 1e-6 * value.norm()
    assert sum(not torch.equal(by_host[name], plain[name]) for name in plain) > 50
