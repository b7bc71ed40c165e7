"""Find each image's batch index by comparing the initial noise: the host does not pass the index to samplers."""

import logging

import torch
from einops import rearrange
from torch import Tensor

# Two limits of the search, about half a second each: for large latents the first (up to index 1023 at 1024 x 1024, or
# 255 for SD3's 16 channels), for small ones the second.
_MAX_NUMBERS, _MAX_INDICES = 2**26, 4096
_COMPARED = 64  # the first numbers of each image are compared: enough that different noises never look equal
_log = logging.getLogger("trajectory-consistency")


def batch_indices(noise: Tensor | None, seed: int) -> list[int] | None:
    """Return each image's index in the sequence of noises that the host draws from the seed; noise is [B, C, ...].

    Usually the index is the image's place in the batch. If the latent has a batch_index (LatentFromBatch), the host
    draws the noises one by one and keeps the listed ones. This function draws them again and compares.

    Returns None if the caller should use the place in the batch. That is so if the latent has no batch_index, if there
    is no noise (as in the second half of a split run), or if the noise was not drawn from this seed.
    """
    if noise is None or not noise.any():
        return None
    noise = noise.cpu()
    generator = torch.Generator()
    if _matches(_draw(noise, generator.manual_seed(seed)), noise).all():
        return None
    generator.manual_seed(seed)
    indices = torch.full((len(noise),), -1)
    for index in range(min(max(_MAX_NUMBERS // noise[0].numel(), 1), _MAX_INDICES)):
        indices[_matches(_draw(noise[:1], generator), noise)] = index
        if (indices >= 0).all():
            return indices.tolist()
    _log.info("The initial noise was not drawn from the seed: later noise is chosen by each image's place in the batch")
    return None


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    # In the dtype of `like`, because older hosts draw in the latent's dtype; newer hosts always draw in float32.
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _matches(drawn: Tensor, noise: Tensor) -> Tensor:
    """Return whether each image equals the drawn one, [B], up to rounding to the latent's dtype (at worst bfloat16)."""
    drawn, noise = (rearrange(images, "b ... -> b (...)")[:, :_COMPARED] for images in (drawn, noise))
    return drawn.isclose(noise, rtol=0.01, atol=1e-6).all(1)
