"""The alpha of a PEFT config, compared with PEFT itself."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trajectory_consistency.tcd import PEFT_CONFIG_KEY, alpha_by_metadata, peft_alpha

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
def alpha_of(config: dict[str, Any]) -> Callable[[str, int], float | None]:
    return alpha_by_metadata({PEFT_CONFIG_KEY: json.dumps(config)})


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


@pytest.mark.parametrize("alpha", [None, 0, -1.0, math.nan, math.inf, "8", [8], True, 10**400])
def test_a_bad_alpha_is_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match="lora_alpha of conv_in is .*, but must be a positive number"):
        peft_alpha({"lora_alpha": alpha}, "conv_in", 4)


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha_pattern has '\\(', which is not a regular expression"):
        peft_alpha({"lora_alpha": 4, "alpha_pattern": {"(": 2}}, "conv_in", 4)
    with pytest.raises(ValueError, match="alpha_pattern is a list, but must be an object"):
        peft_alpha({"lora_alpha": 4, "alpha_pattern": ["to_q"]}, "conv_in", 4)


@pytest.mark.parametrize("prefix", ["unet.", "transformer.", ""])
def test_the_config_of_the_denoising_network_is_found_with_and_without_a_prefix(prefix: str) -> None:
    network = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 3}}
    text_encoder = {"text_encoder.r": 2, "text_encoder.lora_alpha": 2} if prefix else {}
    alpha = alpha_of({**text_encoder, **{f"{prefix}{key}": value for key, value in network.items()}})
    assert (alpha("attn.to_q", 4), alpha("attn.to_k", 4)) == (3, 8)


def test_each_text_encoder_has_a_config_of_its_own() -> None:
    second = {"text_encoder_2.lora_alpha": 4, "text_encoder_2.alpha_pattern": {"mlp.fc1": 5}}
    alpha = alpha_of({"text_encoder.lora_alpha": 2, **second, "unet.lora_alpha": 8})
    assert [alpha(path, 4) for path in ("text_encoder.x", "lora_te_x", "lora_te1_x")] == [2, 2, 2]
    assert [alpha(path, 4) for path in ("text_encoder_2.x", "lora_te2_x", "text_encoder_2.mlp.fc1")] == [4, 4, 5]
    assert alpha("text_encoder_3.x", 4) is None


def test_without_a_config_of_the_network_there_is_no_alpha() -> None:
    assert alpha_of({"text_encoder.lora_alpha": 8})("conv_in", 4) is None
    assert alpha_of({})("conv_in", 4) is None
    assert alpha_by_metadata({})("conv_in", 4) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "it holds a list"),
        ("3", "it holds a int"),
        ("null", "it holds a NoneType"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["cut", "list", "number", "null", "deep"],
)
def test_damaged_metadata_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"lora_adapter_metadata in the metadata is damaged: .*{message}"):
        alpha_by_metadata({PEFT_CONFIG_KEY: text})
