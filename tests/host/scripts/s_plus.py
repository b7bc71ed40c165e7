"""Samples stand-ins of model families with an S+ LoRA, by the host and by hand.

Run by the host's interpreter in the host's folder. Arguments: the pack's folder, a folder for files, and the families.
Prints what was measured, by family.
"""

import gc
import json
import sys
from typing import Any

import torch
from families import FAMILIES
from safetensors.torch import load_file
from sampled import (
    FOLDER,
    ByHand,
    apply,
    random_s_plus,
    relative_error,
    sample,
    sigmas_for,
    write_lora,
    written,
)

GRID = [(steps, gamma, cfg) for steps in (1, 2, 4) for gamma in (0.0, 0.3, 1.0) for cfg in (1.0, 2.0)]


def measure(name: str) -> dict[str, Any]:
    family, path = FAMILIES[name], written(name)
    plain = family.load(path)
    network = plain.model.diffusion_model
    lora, embedding = random_s_plus(family, network)
    file = write_lora(f"{name}.safetensors", lora, embedding)
    two = sigmas_for(plain, 2)
    before = sample(plain, family, two)
    drawn_before = torch.random.get_rng_state()
    model = apply(plain, file)
    first = sample(model, family, two)
    drew_nothing = torch.equal(torch.random.get_rng_state(), drawn_before)
    hand = ByHand(family, path, lora, embedding)
    errors = {}
    for steps, gamma, cfg in GRID:
        sigmas = sigmas_for(plain, steps)
        found = sample(model, family, sigmas, gamma=gamma, cfg=cfg)
        errors[f"{steps} {gamma} {cfg}"] = relative_error(found, hand.sample(sigmas, gamma=gamma, cfg=cfg))
    latent = sample(plain, family, sigmas_for(plain, 1))
    half = sigmas_for(plain, 2, denoise=0.5)
    found = sample(model, family, half, latent=latent)
    copies = {"clone": model.clone(), "real copy": model.clone(force_deepcopy=True)}
    equal = {f"{kind} equal": torch.equal(sample(copy, family, two), first) for kind, copy in copies.items()}
    real = copies["real copy"].model.diffusion_model is not network
    again = torch.equal(sample(model, family, two), first)
    del model, copies
    gc.collect()  # the clone is deleted while it is loaded
    return {
        "grid": errors,
        "image to image": relative_error(found, hand.sample(half, gamma=0.3, cfg=1.0, latent=latent)),
        "effect of the embedding": relative_error(sample(apply(plain, _without(file)), family, two), first),
        **equal,
        "the copy has a network of its own": real,
        "again equal": again,
        "plain equal": torch.equal(sample(plain, family, two), before),
        "nothing is drawn": drew_nothing,
    }


def _without(file: str) -> str:
    """Return a file with the LoRA alone."""
    lora = {name: tensor for name, tensor in load_file(FOLDER / file).items() if "target_time" not in name}
    return write_lora(f"without-{file}", lora)


with torch.inference_mode():
    json.dump({name: measure(name) for name in sys.argv[3:]}, sys.stdout)
