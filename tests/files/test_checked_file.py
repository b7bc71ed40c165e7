"""Files with checksums: what is written is read, and a single changed bit is noticed, wherever it is."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trajectory_consistency.trainer.checked_file import open_checked, save_checked

TENSORS = {
    "half": torch.arange(6).half().view(2, 3),
    "scalar": torch.tensor(7),
    "none": torch.zeros(0, 4),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checked(TENSORS, tmp_path / "x.safetensors", {"base": "a b"})
    return tmp_path / "x.safetensors"


def test_what_was_written_is_read(path: Path) -> None:
    for content in (False, True):
        tensors, metadata = open_checked(path, content=content)
        assert metadata == {"base": "a b"} and tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_no_bit_can_change_unnoticed(path: Path) -> None:
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    noticed = 0
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            tensors, metadata = open_checked(path, content=at >= start)
        except (OSError, SafetensorError):
            noticed += 1
        else:  # a blank of the header that means nothing, or the checksum of the content, which was not asked for
            assert at < start and metadata == {"base": "a b"}
            assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert noticed > 0.9 * len(whole)


def test_a_file_without_checksums_is_refused(path: Path) -> None:
    save_file(TENSORS, path, metadata={"base": "a b"})
    with pytest.raises(OSError, match="its checksum does not match"):
        open_checked(path, content=False)
