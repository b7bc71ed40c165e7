"""Reading a LoRA file: the alpha of modules without one, and files that are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.lora_file import read_lora

MODULE = "unet.mid_block.resnets.0.conv1"
TENSORS = {f"{MODULE}.lora_A.weight": torch.zeros(4, 64, 3, 3), f"{MODULE}.lora_B.weight": torch.zeros(64, 4, 1, 1)}
ALPHA = "lora_unet_mid_block_resnets_0_conv1.alpha"


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ('{"unet.lora_alpha": 12}', 12),
        ('{"lora_alpha": 12}', 12),
        ('{"text_encoder.lora_alpha": 12}', 4),  # it says nothing of the UNet's LoRA, so alpha is the rank
        ("{}", 4),
        ("null", None),
        ("[]", None),
        ("{", None),
        ('{"unet.lora_alpha": -1}', None),
    ],
)
def test_the_alpha_comes_from_the_peft_config_or_is_the_rank(tmp_path: Path, config: str, alpha: float | None) -> None:
    path = tmp_path / "peft.safetensors"
    save_file(TENSORS, path, metadata={"lora_adapter_metadata": config})
    if alpha is None:
        with pytest.raises(UserError, match=r"peft.safetensors .*(lora_adapter_metadata|lora_alpha)"):
            read_lora(path)
    else:
        assert read_lora(path).tensors[ALPHA] == alpha


def test_a_file_without_lora_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.safetensors"
    save_file({}, path)
    assert main(["inspect", str(path)]) == 2
    assert "empty.safetensors is not a LoRA that can be used: it has no LoRA tensors" in capsys.readouterr().err
