"""What `auto` is, by what the machine has."""

from contextlib import nullcontext

import pytest
import torch

from trajectory_consistency.trainer.config.device import resolve_device, resolve_dtype
from trajectory_consistency.trainer.errors import UserError


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, False, "cuda"), (True, True, "cuda"), (False, True, "mps"), (False,) * 2 + ("cpu",)],
)
def test_the_device_is_the_best_that_is_there(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("has_it", [True, False])
def test_the_dtype_is_bfloat16_where_the_card_has_it(monkeypatch: pytest.MonkeyPatch, has_it: bool) -> None:
    asked: list[torch.device] = []

    def is_supported(*, including_emulation: bool) -> bool:
        return has_it or including_emulation  # as torch says of a card older than Ampere

    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    second = torch.device("cuda", 1)
    assert resolve_dtype("auto", second) == (torch.bfloat16 if has_it else torch.float16)
    assert asked == [second], "of two cards the one that is used"
    assert resolve_dtype("bfloat16", second) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("mps")) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="training.device is 'teapot', which cannot be used here"):
        resolve_device("teapot")
