"""Samples stand-ins with quantised weights and an S+ LoRA: by the pack, by hand beside the weights, and patched.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder and a folder for files. Prints what was
measured, by kind of weight and family.
"""

from sampled import (
    ALPHA,
    MODELS,
    PREFIX,
    RANK,
    ByHand,
    apply,
    logged,
    random_lora,
    random_s_plus,
    relative_error,
    sample,
    sigmas_for,
    write_lora,
    written,
)

# isort: split
import gc
import json
import sys
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from families import FAMILIES
from quantized_files import FLOAT8, write_quantized


def quantized(name: str, kind: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of a stand-in whose weights are quantised, and how to load it.

    kind: "float8", cast by the host's loader; or a format of the host's own, of the Linears in the blocks.
    """
    if kind == "float8":
        return written(name), {"dtype": FLOAT8}
    path = MODELS / f"{name}-{kind}.safetensors"
    write_quantized(written(name), path, kind, FAMILIES[name].prefix)
    return path, {}


def measure(kind: str, name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    path, options = quantized(name, kind)
    plain = family.load(path, **options)
    network = plain.model.diffusion_model
    lora, embedding = random_s_plus(family, network)
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


def slices() -> float:
    """A LoRA on the three parts of Flux's fused qkv, in diffusers' names, against one on the whole."""
    family = FAMILIES["flux"]
    path, options = quantized("flux", "float8")
    plain = family.load(path, **options)
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
    plain = family.load(path, **options)
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
    plain = family.load(path, **options)
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
