"""A text encoder small enough for tests, within the host's own CLIP object."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SmallText(nn.Module):
    """Random embeddings of the tokens up to the end of the caption, and their mean as the pooled output."""

    width, pooled, has_mask = 8, 0, False

    def __init__(self, dtype: torch.dtype, device: torch.device, model_options: dict[str, Any]) -> None:
        super().__init__()
        self.dtypes = {dtype}
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(64, self.width, generator=generator).to(device, dtype))

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """The host sets the layer, which this network does not have."""

    def reset_clip_options(self) -> None:
        """See set_clip_options."""

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the context [1, tokens, width], the pooled output [1, pooled], and a mask of ones if it has one."""
        ids = [token for token, _ in tokens["l"][0]]
        length = 1 + ids.index(49407)  # the end of the caption, after which there is only padding
        context = self.table[torch.tensor(ids[:length]) % len(self.table)].unsqueeze(0)
        pooled = functional.pad(context.mean(1), (0, max(self.pooled - self.width, 0)))[:, : self.pooled]
        mask = {"attention_mask": torch.ones(context.shape[:2], dtype=torch.long)} if self.has_mask else {}
        return context, pooled if self.pooled else None, mask
