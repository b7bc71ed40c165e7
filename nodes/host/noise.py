"""The noise that the host begins with: samplers see it, but are not told which item of a batch each image is."""

import logging

import torch
from torch import Tensor

_NUMBERS = 2**26  # as far as is looked, which takes half a second: item 1023 at 1024 x 1024, or 255 of SD3's
_COMPARED = 64  # numbers of an image: that so many are alike by accident does not happen
_log = logging.getLogger("trajectory-consistency")


def noise_items(noise: Tensor | None, seed: int) -> list[int] | None:
    """Return the item that each image of the initial noise [B, C, ...] is, of those that the host draws from the seed.

    It is the image's place in the batch, unless the latent has a batch_index (LatentFromBatch): for that the host draws
    item by item, and keeps those named. So they are drawn again and compared. None, for the place in the batch, where
    there is no noise (as in the second half of a split run) or it is of another making.
    """
    if noise is None or not noise.any():
        return None
    noise = noise.cpu()
    generator = torch.Generator()
    if _equal(_draw(noise, generator.manual_seed(seed)), noise).all():
        return None
    generator.manual_seed(seed)
    items = torch.full((len(noise),), -1)
    for item in range(max(_NUMBERS // noise[0].numel(), 1)):
        items[_equal(_draw(noise[:1], generator), noise)] = item
        if (items >= 0).all():
            return items.tolist()
    _log.info("The initial noise is not drawn from the seed: that of the steps is by each image's place in the batch")
    return None


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    # In the dtype that it has: older hosts draw in the latent's, and newer ones in float32, whatever the latent's.
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _equal(drawn: Tensor, noise: Tensor) -> Tensor:
    """Tell of each image whether it is the one drawn, were it rounded to the dtype of the latent, bfloat16 at worst."""
    drawn, noise = (images.flatten(1)[:, :_COMPARED] for images in (drawn, noise))
    return drawn.isclose(noise, rtol=0.01, atol=1e-6).all(1)
