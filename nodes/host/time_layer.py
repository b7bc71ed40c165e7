"""Find the layer to whose output a target-time embedding is added: the last Linear of the MLP that embeds t.

This is the only place that knows the families of networks, by the names of their parts.
"""

from typing import Any

from ...tcd.adapter import layer_shape

# Where networks have the MLP, or a part that starts with it. The first that is found counts.
_TIME_PARTS = (
    "time_embed",  # UNets
    "time_in",  # Flux, Flux.2, HunyuanVideo, Hunyuan3D
    "t_embedder",  # SD3, AuraFlow, Lumina, Z-Image, PixArt, Cosmos Predict2, PixelDiT
    "time_embedding",  # Wan, Ernie
    "time_embeddings",  # Kandinsky
    "time_embedder",  # MiniMax
    "timestep_embedder",  # ACE-Step
    "time_text_embed",  # Qwen-Image, Lens, Mage-Flow
    "time_caption_embed",  # OmniGen2, Boogu
    "adaln_single",  # LTX
    "tmlp",  # Krea 2
    "to_timestep_embed",  # Stable Audio
    "t_embedding",  # Ideogram
    "t_embedder1",  # HiDream-O1
    "condition_embedder",  # JoyImage
    "time_embedding_linear_2",  # CogVideoX
    "distilled_guidance_layer.in_proj",  # Chroma, whose MLP makes all modulations, also from other inputs than t
)


def find_time_linear(network: Any) -> str | None:
    """Return the path of the last Linear of the MLP that embeds t, or None if the network has no known one."""
    for part in _TIME_PARTS:
        linears = [path for path, module in network.named_modules() if _is_within(path, part) and is_linear(module)]
        if linears:
            # The first Linears that lie side by side: after them come embeddings of other inputs, or a modulation.
            return [path for path in linears if _parent(path) == _parent(linears[0])][-1]
    return None


def is_linear(module: Any) -> bool:
    """Return whether a module is a Linear of any kind; the host's quantised Linear is no torch.nn.Linear."""
    return len(layer_shape(module) or ()) == 2


def _is_within(path: str, part: str) -> bool:
    return f"{path}.".startswith(f"{part}.")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
