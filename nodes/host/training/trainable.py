"""Which models of the host can be distilled, and what a model itself says about being distilled already."""

from typing import Any

import comfy.model_sampling

from ..time_layer import find_time_linear


def time_layer_of(model: Any) -> str:
    """Return the path of the layer whose output is the embedding of t.

    model: the host's BaseModel, which may be on the meta device. Raises ValueError, which says why, if the model is of
    a kind that cannot be trained.
    """
    sampling = model.model_sampling
    bridge: Any = getattr(comfy.model_sampling, "IMG_TO_IMG_FLOW", ())  # older hosts lack the class
    if isinstance(sampling, (comfy.model_sampling.IMG_TO_IMG, bridge)):
        raise ValueError("it starts from a picture instead of noise")
    if getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise ValueError("it is sampled with noise of another scale than 1")
    if model.latent_format.latent_dimensions not in (2, 3):
        raise ValueError("its latents are no pictures or videos")
    found = find_time_linear(model.diffusion_model)
    if found is None:
        raise ValueError("no layer is known in its network that embeds t")
    return found


def known_distillation(model: Any, name: str) -> str:
    """Return what the model itself says about being distilled to few steps; empty if it does not.

    model: the host's BaseModel. name: of its file, without suffix; empty if it is unknown.
    """
    family = type(model.model_config).__name__
    if family == "FluxSchnell":
        return "it is Flux schnell"
    if family == "Flux2" and "klein" in name.lower() and "base" not in name.lower():
        return f"{name} is Klein without base in its name"
    if model.model_config.unet_config.get("meanflow"):
        return "its network takes two times, as in MeanFlow"
    return ""
