"""The alpha of a PEFT config, compared with PEFT itself."""

import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trajectory_consistency.tcd import parse_peft_config, peft_alpha

LAYERS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "ff.net.0.proj")


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for path in LAYERS:
            *stem, leaf = path.split(".")
            module: torch.nn.Module = self
            for name in stem:
                if not hasattr(module, name):
                    module.add_module(name, torch.nn.Module())
                module = getattr(module, name)
            module.add_module(leaf, torch.nn.Linear(4, 4))


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"to_q": 3.0}},
        {"alpha_pattern": {"attn1.to_q": 3.0, "to_q": 5.0}, "rank_pattern": {"proj": 8}},
        {"alpha_pattern": {r"attn\d.to_.*": 7.0}, "use_rslora": True},
        {"alpha_pattern": {"q": 9.0}},  # the end of a name is not the name
    ],
    ids=str,
)
def test_equals_the_scale_of_peft(settings: dict[str, Any]) -> None:
    config = LoraConfig(r=4, lora_alpha=2, target_modules=list(LAYERS), **settings)
    model = get_peft_model(Network(), config).base_model.model
    for path in LAYERS:
        layer = model.get_submodule(path)
        rank = layer.r["default"]
        assert peft_alpha(config.to_dict(), path, rank) / rank == pytest.approx(layer.scaling["default"])


@pytest.mark.parametrize("alpha", [None, 0, -1.0, math.nan, math.inf, "8", [8]])
def test_a_bad_alpha_is_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match="lora_alpha of conv_in is .*, but must be a positive number"):
        peft_alpha({"lora_alpha": alpha}, "conv_in", 4)


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha_pattern has '\\(', which is not a regular expression"):
        peft_alpha({"lora_alpha": 4, "alpha_pattern": {"(": 2}}, "conv_in", 4)


@pytest.mark.parametrize("prefix", ["unet.", "transformer.", ""])
def test_the_config_of_the_denoising_network_is_found_with_and_without_a_prefix(prefix: str) -> None:
    network = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 3}}
    text_encoder = {"text_encoder.r": 2, "text_encoder.lora_alpha": 2} if prefix else {}
    text = json.dumps({**text_encoder, **{f"{prefix}{key}": value for key, value in network.items()}})
    assert parse_peft_config(text) == network


def test_without_a_config_of_the_denoising_network_there_is_none() -> None:
    assert parse_peft_config(json.dumps({"text_encoder.lora_alpha": 8})) is None
    assert parse_peft_config("{}") is None


@pytest.mark.parametrize(
    ("text", "message"), [("{", "Expecting property name"), ("[]", "it holds a list"), ("3", "it holds a int")]
)
def test_damaged_metadata_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_peft_config(text)
