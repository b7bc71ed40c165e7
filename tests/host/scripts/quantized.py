"""Samples stand-ins with quantised weights and an S+ LoRA: by the pack, by hand beside the weights, and patched.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder and a folder for files. Prints what was
measured, by kind of weight and family.
"""

from sampled import (
    ALPHA,
    FAMILIES,
    FOLDER,
    PREFIX,
    RANK,
    ByHand,
    apply,
    load,
    random_embedding,
    random_lora,
    relative_error,
    sample,
    sigmas_for,
    write_lora,
    written,
)

# isort: split
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


def quantized(name: str, kind: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of a stand-in whose weights are quantised, and how to load it.

    kind: "float8", cast by the host's loader; or a format of the host's own, of the Linears in the blocks.
    """
    if kind == "float8":
        return written(name), {"dtype": FLOAT8}
    path = FOLDER / "models" / f"{name}-{kind}.safetensors"
    state: dict[str, Tensor] = {}
    for key, value in load_file(written(name)).items():
        if key.endswith(".weight") and value.ndim == 2 and "block" in key:
            state |= {f"{key.removesuffix('weight')}{part}": each for part, each in QUANTIZE[kind](value).items()}
        else:
            state[key] = value.bfloat16()
    if kind == "scaled float8":
        state["scaled_fp8"] = torch.tensor([], dtype=FLOAT8)
    save_file(state, path)
    return path, {}


def _scaled_float8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(FLOAT8), "scale_weight": scale}


def _by_layout(layout: str, format: str) -> Any:
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        from comfy.quant_ops import QuantizedTensor

        packed = QuantizedTensor.from_float(weight.bfloat16(), layout, scale="recalculate").state_dict("weight")
        config = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
        return {**packed, "comfy_quant": config}

    return quantize


QUANTIZE = {
    "scaled float8": _scaled_float8,
    "nvfp4": _by_layout("TensorCoreNVFP4Layout", "nvfp4"),
    "int8": _by_layout("TensorWiseINT8Layout", "int8_tensorwise"),
}


def measure(kind: str, name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    path, options = quantized(name, kind)
    plain = load(family, path, **options)
    network = plain.model.diffusion_model
    lora, embedding = random_lora(network), random_embedding(network.get_submodule(family.time_linear).out_features)
    file = write_lora(f"{name}.safetensors", lora, embedding)
    lora_alone = write_lora(f"{name}-lora.safetensors", lora)
    sigmas = sigmas_for(plain, 2)
    before = sample(plain, family, sigmas)
    model, messages = logged(lambda: apply(plain, file))
    found = sample(model, family, sigmas)
    result = {
        "warnings": messages,
        "patches": len(model.patches),
        "clone equal": torch.equal(sample(model.clone(), family, sigmas), found),
        "real copy equal": torch.equal(sample(model.clone(force_deepcopy=True), family, sigmas), found),
    }
    copies = [
        term._copies for patch in model.object_patches.values() for term in patch.terms if hasattr(term, "_copies")
    ]
    result["kept on the device"] = sum(map(len, copies))
    del model, copies
    gc.collect()  # the clone is deleted while it is loaded
    result["plain equal"] = torch.equal(sample(plain, family, sigmas), before)
    hand = ByHand(family, path, lora, embedding, beside=True, **options)
    result["beside"] = relative_error(found, hand.sample(sigmas, gamma=0.3, cfg=1.0))
    hand = ByHand(family, path, lora, beside=True, **options)
    expected = hand.sample(sigmas, gamma=0.3, cfg=1.0)
    result["lora alone"] = relative_error(sample(apply(plain, lora_alone), family, sigmas), expected)
    patched = comfy.sd.load_lora_for_models(plain, None, dict(lora), 1.0, 0)[0]
    result["patched"] = relative_error(sample(patched, family, sigmas), expected)
    return result


def logged(act: Any) -> tuple[Any, list[str]]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("trajectory-consistency")
    log.addHandler(handler)
    try:
        return act(), messages
    finally:
        log.removeHandler(handler)


def slices() -> float:
    """A LoRA on the three parts of Flux's fused qkv, in diffusers' names, against one on the whole."""
    family = FAMILIES["flux"]
    path, options = quantized("flux", "float8")
    plain = load(family, path, **options)
    generator = torch.Generator().manual_seed(3)
    width, parts = 128, {}
    for part in "qkv":
        name = f"transformer.transformer_blocks.0.attn.to_{part}"
        parts[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * width**-0.5
        parts[f"{name}.lora_B.weight"] = torch.randn(width, RANK, generator=generator)
        parts[f"{name}.alpha"] = torch.tensor(ALPHA)
    downs, ups = ([tensor for key, tensor in parts.items() if side in key] for side in ("lora_A", "lora_B"))
    layer = f"{PREFIX}double_blocks.0.img_attn.qkv"
    whole = {
        f"{layer}.lora_down.weight": torch.cat(downs),
        f"{layer}.lora_up.weight": torch.block_diag(*ups),
        f"{layer}.alpha": torch.tensor(ALPHA),
    }
    sigmas = sigmas_for(plain, 2)
    found = sample(apply(plain, write_lora("parts.safetensors", parts)), family, sigmas)
    hand = ByHand(family, path, whole, beside=True, **options).sample(sigmas, gamma=0.3, cfg=1.0)
    assert relative_error(sample(plain, family, sigmas), hand) > 0.01
    return relative_error(found, hand)


def two_files() -> float:
    """Two LoRAs with strengths beside the weights, and one with the sum of both."""
    family = FAMILIES["sd3"]
    path, options = quantized("sd3", "float8")
    plain = load(family, path, **options)
    first, second = (random_lora(plain.model.diffusion_model, seed) for seed in (1, 2))
    model = apply(plain, write_lora("first.safetensors", first), 0.5)
    model = apply(model, write_lora("second.safetensors", second), -0.25)
    both = {}
    for name, tensor in first.items():
        if "lora_up" in name:
            both[name] = torch.cat([0.5 * tensor, -0.25 * second[name]], dim=1)
        else:
            both[name] = tensor if name.endswith("alpha") else torch.cat([tensor, second[name]])
    sigmas = sigmas_for(plain, 2)
    hand = ByHand(family, path, both, beside=True, **options).sample(sigmas, gamma=0.3, cfg=1.0)
    return relative_error(sample(model, family, sigmas), hand)


def dora() -> list[str]:
    """A DoRA depends on the weight, so it cannot stand beside it."""
    family = FAMILIES["sd3"]
    path, options = quantized("sd3", "float8")
    plain = load(family, path, **options)
    lora = random_lora(plain.model.diffusion_model)
    layer = "joint_blocks.0.x_block.attn.qkv"
    lora[f"{PREFIX}{layer}.dora_scale"] = torch.ones(384, 1)
    return logged(lambda: apply(plain, write_lora("dora.safetensors", lora)))[1]


with torch.inference_mode():
    kinds = [(kind, name) for kind in ("float8", "scaled float8", "nvfp4", "int8") for name in ("flux", "wan")]
    json.dump(
        {
            **{f"{kind} {name}": measure(kind, name) for kind, name in [*kinds, ("float8", "sd15")]},
            "slices": slices(),
            "two files": two_files(),
            "dora": dora(),
        },
        sys.stdout,
    )
