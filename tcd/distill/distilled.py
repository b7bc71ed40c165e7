"""Recognizes bases that sample in few steps already: they are no teachers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError

# Followed by no lowercase letter, as in hypernetwork. A model that was "de-distilled" is a teacher again.
_MARKS = re.compile(r"(?i:turbo|lightning|lcm|hyper|schnell|(?<!un)(?<!de)(?<!de[-_])distilled)(?![a-z])")

# The embedding of the guidance scale of an LCM, in the names of latent-diffusion and of diffusers.
_LCM_TENSORS = ("time_embed.cond_proj.weight", "time_embedding.cond_proj.weight")


def refuse_lcm(names: Iterable[str], where: Path) -> None:
    """Raise UserError if a network, with tensors of these names, takes the guidance scale as LCMs do."""
    found = next((name for name in names if name.endswith(_LCM_TENSORS)), None)
    if found:
        raise UserError(
            f"{where} is an LCM, whose network takes the guidance scale as an input ({found}): it is distilled to few "
            "steps already, so it is no teacher; use the base that it was made from"
        )


def distilled_note(names: Iterable[str], known: str = "") -> tuple[str, ...]:
    """Return a warning for the user if the base is distilled already, according to the model itself or to a file name.

    names: of the base's file and of the LoRAs on it. known: what the model itself says, such as `it is Flux schnell`.
    """
    marked = ((name, found.group()) for name in names if (found := _MARKS.search(name)))
    why = known or next((f"{name} has {mark} in its name" for name, mark in marked), "")
    if not why:
        return ()
    return (
        f"warning: this base is distilled to few steps already ({why}), so it is no teacher: its own steps between two "
        "times are not those of a diffusion model. Use the base that it was made from",
    )
