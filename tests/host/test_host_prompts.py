"""Prompts are read and encoded as by the host: tokens, weights and chunks, and the embeddings of every CLIP layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_script import run_script
from safetensors.torch import load_file, save_file
from torch import Tensor

from hard_captions import HARD_CAPTIONS, random_prompts
from small_bases import LARGE, SMALL, random_parts, shrink
from trajectory_consistency.trainer.find_comfyui import Host
from trajectory_consistency.trainer.models.unet.families import Family
from trajectory_consistency.trainer.models.unet.prompt import END_TOKEN, read_prompt

pytestmark = pytest.mark.host

ENCODERS: dict[Family, str] = {"sd15": "l", "sd2": "h", "sdxl": "lg"}
PADDING = {"l": END_TOKEN, "h": 0, "g": 0}
LAYERS = (0, 2, 3)
PROMPTS = [*HARD_CAPTIONS, *random_prompts(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def small(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, folder / "bases")
        random_parts.cache_clear()
        yield
        random_parts.cache_clear()


@pytest.fixture(scope="module")
def tokens(comfy_host: Host, folder: Path, small: None) -> dict[str, Any]:
    """The tokens that the host reads, after it has encoded the hard captions with the weights of `random_parts`."""
    sizes: dict[str, dict[str, Any]] = {}
    for family, encoders in ENCODERS.items():
        sizes[family] = {}
        for encoder, model in zip(encoders, random_parts(family).text_encoder, strict=True):
            sizes[family][encoder] = dict(SMALL if encoder == "l" else LARGE)
            # The host has the layer of SD2 that its configuration in diffusers leaves out; it is not used.
            sizes[family][encoder]["num_hidden_layers"] += encoder == "h"
            save_file(_host_names(model.state_dict()), folder / f"{family}-{encoder}.safetensors")
    given = {"prompts": PROMPTS, "encoded": len(HARD_CAPTIONS), "layers": LAYERS, "sizes": sizes}
    (folder / "prompts.json").write_text(json.dumps(given), encoding="utf-8")
    return run_script(comfy_host, "prompts.py", str(folder))


def _host_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name.removeprefix("text_model.") for name in state}
    return {
        (new if new.startswith("text_projection") else f"text_model.{new}"): state[name].contiguous()
        for name, new in names.items()
    }


@pytest.mark.parametrize("family", ENCODERS)
def test_tokens_and_weights_are_those_of_the_host(tokens: dict[str, Any], family: Family) -> None:
    assert len(HARD_CAPTIONS) == 40
    for encoder in ENCODERS[family]:
        for prompt, chunks in zip(PROMPTS, tokens[family][encoder], strict=True):
            ours = read_prompt(prompt, padding=PADDING[encoder])
            assert ours.ids.tolist() == [[token for token, _ in chunk] for chunk in chunks], prompt
            torch.testing.assert_close(
                ours.weights, torch.tensor([[weight for _, weight in chunk] for chunk in chunks])
            )


@pytest.mark.parametrize("family", ENCODERS)
def test_embeddings_are_those_of_the_host(tokens: dict[str, Any], folder: Path, family: Family) -> None:
    theirs, encoder = load_file(folder / f"{family}.safetensors"), random_parts(family).text_encoder
    for layer in LAYERS:
        encoder.clip_skip = layer
        for number, caption in enumerate(HARD_CAPTIONS):
            (row,) = encoder.encode([caption])
            expected = theirs[f"{layer}.{number}.context"]
            torch.testing.assert_close(row.tensors["context"], expected, rtol=1e-5, atol=1e-5, msg=caption)
            assert ("pooled" in row.tensors) == (family == "sdxl")
            if family == "sdxl":
                torch.testing.assert_close(row.tensors["pooled"], theirs[f"{layer}.{number}.pooled"])
    assert not torch.equal(theirs["0.5.context"], theirs["0.3.context"]), "weights must matter"
