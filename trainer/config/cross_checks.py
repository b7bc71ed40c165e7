"""Checks of settings against each other; the ranges of single settings are checked in schema.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .settings import Config


def check_together(config: Config) -> None:
    """Check the values of a configuration against each other.

    Raises UserError, with advice on which to change, if two values are incompatible or one needs another to be set.
    """
    if config.method.guidance_min > config.method.guidance_max:
        raise UserError(
            f"method.guidance_min is {config.method.guidance_min}, above method.guidance_max, "
            f"{config.method.guidance_max}: exchange them"
        )
    if 1000 % config.method.origin_steps:
        raise UserError(f"method.origin_steps is {config.method.origin_steps}: use a divisor of 1000, such as 50")
    if config.method.law == "target" and config.method.origin_steps < 8:
        raise UserError(
            f"method.origin_steps is {config.method.origin_steps}, but the law target draws among the times of "
            "samplers of up to 8 steps: use 8 or more, such as 50"
        )
    _check_shares(config)
    if config.training.warmup_steps >= config.training.steps:
        raise UserError(
            f"training.warmup_steps is {config.training.warmup_steps}, and training.steps {config.training.steps}: "
            "the learning rate would never reach its peak, so use fewer warmup_steps"
        )
    phases = config.method.phases
    if config.method.law in ("segment", "phase") and not (
        phases and all(1 <= each <= config.method.origin_steps for each in phases)
    ):
        raise UserError(
            f"method.phases is {list(phases)}: use numbers from 1 to method.origin_steps, "
            f"{config.method.origin_steps}, such as [8, 4, 2, 1]"
        )
    if config.method.order == 2 and config.method.target_time:
        raise UserError(
            "method.order is 2 and method.target_time is set: a network that gets the target time needs one call "
            "for a jump, so use order 1"
        )
    if config.adapter.freeze and not config.method.target_time:
        raise UserError("adapter.freeze leaves nothing to train: set method.target_time, or do not freeze")
    if not config.output.name or Path(config.output.name).name != config.output.name:
        raise UserError(f"output.name is {config.output.name!r}: use a plain file name without folder or ending")


def _check_shares(config: Config) -> None:
    method = config.method
    if method.diagonal + method.to_clean > 1:
        raise UserError(
            f"method.diagonal is {method.diagonal} and method.to_clean {method.to_clean}, together above 1: "
            "they are shares of one batch, so lower one"
        )
    if method.law in ("zero", "phase") and method.diagonal + method.to_clean > 0:
        raise UserError(
            f"method.diagonal is {method.diagonal} and method.to_clean {method.to_clean}, but the law {method.law} has "
            "one target time for each t: set both to 0, or use the law uniform"
        )
