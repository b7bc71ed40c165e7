"""The factor of the loss in the backward pass of a float16 network."""

from __future__ import annotations

from collections.abc import Iterable

import torch

FIRST, GROWS_AFTER = 1024.0, 2000


class LossScale:
    """Keeps the gradients within a float16 network from rounding to 0: 1 in every other dtype.

    As in mixed precision training (arXiv 1710.03740), it is halved after a step that was not finite, and doubled after
    GROWS_AFTER steps in a row that were. Powers of 2 change no digit of a gradient.
    """

    def __init__(self, dtype: torch.dtype, finite: Iterable[bool] = ()) -> None:
        """finite: for each step so far, whether it was; the scale is a function of that, so it is not saved."""
        self._is_dynamic = dtype == torch.float16
        self._in_a_row = 0
        self.value = FIRST if self._is_dynamic else 1.0
        for each in finite:
            self.update(each)

    def update(self, finite: bool) -> None:
        """Count one step, whose loss and gradient norm were finite or not."""
        if not self._is_dynamic:
            return
        self._in_a_row = self._in_a_row + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self._in_a_row % GROWS_AFTER == 0:
            self.value *= 2
