"""A person's first LoRA, by the steps of docs/models.md: from the files in a ComfyUI's folders to its picture there.

The network is the stand-in of SD3; the text encoder, CLIP-L, and the VAE have full size; all weights are random. It
takes some minutes: `python tests/engine --first-run -k first_run`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import comfy.clip_model
import comfy.ops
import comfy.sd1_clip
import numpy as np
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from families import FAMILIES, fill
from PIL import Image
from safetensors.torch import save_file
from saved_workflows import api_prompt

from trajectory_consistency.trainer.demo.comfy_server import ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK, Host, find_host
from trajectory_consistency.trainer.tiny import world

CONFIG = """
[base]
engine = "comfyui"
model = "sd3.safetensors"
text_encoders = ["clip_l.safetensors"]
clip_type = "sd3"
vae = "sd3_vae.safetensors"

[data]
folder = "pictures"
resolution = 64

[method]
target_time = true
diagonal = 0.5
to_clean = 0.15
weighting = "x0"

[adapter]
rank = 4
alpha = 4.0

[training]
steps = 40
batch = 2
lr = 1e-2
checkpoint_every = 4
device = "cpu"

[preview]
prompts = ["a red star"]
steps = [1, 4]
every = 20

[output]
folder = "runs/first"
name = "tcd-sd3"
"""
PROMPT, SEED = "a red circle on a blue background", 3
NAMES = {
    "UNETLoader": ["sd3.safetensors", "default"],
    "CLIPLoader": ["clip_l.safetensors", "sd3", "default"],
    "VAELoader": ["sd3_vae.safetensors"],
    "TCDLoraLoader": ["tcd-sd3.safetensors", 1.0, False],
    "EmptySD3LatentImage": [64, 64, 1],
    "SamplerCustom": [True, SEED, "fixed", 1.0],
}
"""What the person changes in the workflow for Z-Image, by the type of the node."""
NOT_COPIED = {".git", ".venv", "venv", "models", "custom_nodes", "input", "output", "temp", "user"}
"""Of the folders in a ComfyUI."""
VAE = {
    "double_z": True,
    "z_channels": 16,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def comfyui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A ComfyUI of its own, with the files of SD3 in its folders."""
    if not request.config.getoption("--first-run"):
        pytest.skip("takes minutes: give --first-run")
    host = find_host()
    folder = tmp_path_factory.mktemp("first") / "ComfyUI"
    shutil.copytree(host.folder, folder, ignore=lambda source, _: NOT_COPIED if Path(source) == host.folder else set())
    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        (folder / "models" / kind).mkdir(parents=True)
    FAMILIES["sd3"].write(folder / "models" / "diffusion_models" / "sd3.safetensors")
    config = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text(encoding="utf-8"))
    clip = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    for name, module in (("text_encoders/clip_l", clip), ("vae/sd3_vae", AutoencoderKL(ddconfig=VAE, embed_dim=16))):
        fill(module, seed=0)
        tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, folder / "models" / f"{name}.safetensors")
    return Host(folder, host.python)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder in which the person works."""
    world.write_folder(tmp_path / "pictures", 6, seed=0)
    (tmp_path / "my-run.toml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def command(comfyui: Host, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the trainer's command line, and the environment in which it finds this ComfyUI."""
    return [sys.executable, "-m", "trajectory_consistency.trainer", *arguments], {
        **os.environ,
        "COMFYUI_PATH": str(comfyui.folder),
        "COMFYUI_PYTHON": str(comfyui.python),
    }


def trainer(comfyui: Host, work: Path, *arguments: str) -> str:
    """Run a command of the trainer to its end, and return what it prints."""
    line, environment = command(comfyui, *arguments)
    done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def run_and_kill(comfyui: Host, work: Path) -> None:
    """Run the training, and kill it when it has saved two checkpoints."""
    line, environment = command(comfyui, "run", "my-run.toml")
    with open(work / "killed.log", "wb") as log:
        process = subprocess.Popen(line, cwd=work, env=environment, stdout=log, stderr=log)
    while len(list((work / "runs" / "first" / "checkpoints").glob("step-*"))) < 2:
        assert process.poll() is None, (work / "killed.log").read_text(encoding="utf-8")
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (work / "runs" / "first" / "tcd-sd3.safetensors").exists()


def drawn_by_comfyui(comfyui: Host, strengths: Sequence[float]) -> list[np.ndarray]:
    """Draw by the workflow for Z-Image, with the files of SD3, in a server of this ComfyUI; return the pixels."""
    workflow = json.loads((PACK / "workflows" / "tcd-z-image-text-to-image.json").read_text(encoding="utf-8"))
    prompts, pictures = iter([PROMPT, ""]), []
    for node in workflow["nodes"]:
        is_prompt = node["type"] == "CLIPTextEncode"
        node["widgets_values"] = [next(prompts)] if is_prompt else NAMES.get(node["type"], node["widgets_values"])
    with ComfyServer(comfyui.folder, host=comfyui, threads=1) as server:
        prompt = api_prompt(workflow, server.get("/object_info"))
        (loader,) = (node for node in prompt.values() if node["class_type"] == "TCDLoraLoader")
        for strength in strengths:
            loader["inputs"]["strength_model"] = strength
            (output,) = server.run(prompt).values()
            pictures.append(pixels_of(io.BytesIO(server.fetch(output["images"][0]))))
        log = server.log_text()
    assert not re.search("not loaded|another base|other content|Error", log), log
    return pictures


def pixels_of(file: Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"), dtype=float)


@pytest.mark.slow
def test_a_first_run(comfyui: Host, work: Path) -> None:
    said = trainer(comfyui, work, "check", "my-run.toml")
    assert "SD3, loaded by ComfyUI, shift 3" in said and "memory    about" in said
    trainer(comfyui, work, "cache", "my-run.toml")
    run_and_kill(comfyui, work)
    said = trainer(comfyui, work, "run", "my-run.toml")
    (step,) = re.findall(r"resuming at step (\d+) of 40", said)
    assert int(step) >= 8
    lora = work / "runs" / "first" / "tcd-sd3.safetensors"
    assert not list(work.rglob("*unfinished*"))
    trainer(comfyui, work, "sample", str(lora), "--prompt", PROMPT, "--seed", str(SEED), "--device", "cpu")
    shutil.copy(lora, comfyui.folder / "models" / "loras")
    drawn, without_lora = drawn_by_comfyui(comfyui, [1.0, 0.0])
    (sampled,) = map(pixels_of, (work / "samples").glob("*.png"))
    assert drawn.shape == sampled.shape == (64, 64, 3)
    assert np.abs(drawn - sampled).max() <= 2, "up to rounding"
    assert np.abs(drawn - without_lora).max() > 20
