"""The tiny base that the training tests share, and a run's settings for it."""

from pathlib import Path

import pytest

from tiny_base import model_of, write_base, write_inputs
from trajectory_consistency.trainer.models.unet.model import UNetModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the tiny family."""
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def net(checkpoint: Path) -> UNetModel:
    """Return the checkpoint's model, without an adapter."""
    return model_of(checkpoint)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, dict[str, object]]:
    """Return settings whose inputs, a base and pictures, exist."""
    return write_inputs(tmp_path)
