"""SDXL in its full size, with random weights: elsewhere it is tested in its layout at a fraction of the width."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trajectory_consistency.trainer.files.layout import layouts_of, names_of
from trajectory_consistency.trainer.lora_file import read_lora

# The peak is 5.9 GB, of which 5.1 are the weights.
STEP = """
import sys
from pathlib import Path
import torch
from trajectory_consistency.tcd import DiscreteSchedule, scaled_linear_alpha_bar
from trajectory_consistency.trainer.models.unet import families as bases
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.config.settings import from_mapping
from trajectory_consistency.trainer.data.dataset import Dataset, Table, caption_of
from trajectory_consistency.trainer.files.write_lora import write_lora
from trajectory_consistency.trainer.training.loop import train
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.tcd.distill.order import Group

random = torch.Generator().manual_seed(0)
with torch.device("meta"):
    unet = bases.empty_unet("sdxl").to(torch.bfloat16)
unet = unet.to_empty(device="cpu").requires_grad_(False).eval()
for name, weight in unet.named_parameters():
    if weight.dim() == 1:
        weight.data.fill_(float(name.endswith("weight")))
    else:
        weight.data.normal_(0, weight[0].numel() ** -0.5, generator=random)
latents = {"mean": torch.randn(1, 4, 8, 8, generator=random), "sizes": torch.tensor([[64, 64, 0, 0, 64, 64]])}
captions = {"context": torch.randn(2, 77, 2048, generator=random), "pooled": torch.randn(2, 1280, generator=random)}
def join(rows, framing):
    return Conditioning({**Conditioning.cat(rows).tensors, "time_ids": torch.cat(framing, 1).float()})
table = Table(torch.tensor([[0, 0, 0, 1]]), [latents], [captions])
dataset = Dataset((Group(Size(64, 64), 1, 1.0),), [table], caption_of(captions, 0), join)
folder = Path(sys.argv[1])
config = from_mapping(
    {
        "base": {"path": "none"},
        "data": {"folder": "none"},
        "adapter": {"rank": 4, "alpha": 4.0},
        "training": {"steps": 1, "batch": 1, "lr": 1e-3},
        "output": {"folder": str(folder)},
    }
)
model = UNetModel(unet, DiscreteSchedule.from_alpha_bar(scaled_linear_alpha_bar()), "eps")
model.adapter.add(STUDENT, model.new_weights(rank=4, alpha=4.0, seed=0))
print(*train(model, dataset, config))
cond = dataset.batch(0, 1, seed=0, caption_dropout=0).cond
write_lora(folder / "lora.safetensors", model, config, {}, cond, final=True)
"""


def memory() -> float:
    """Of this computer, in GiB; as much as is needed where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return math.inf


@pytest.mark.slow
@pytest.mark.skipif(memory() < 12, reason="it takes 6 GB of memory, of more than there is")
def test_a_full_size_sdxl_trains_a_step_and_its_lora_is_whole(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STEP, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 100
    lora = read_lora(tmp_path / "lora.safetensors")
    layouts = layouts_of(lora)
    assert names_of(layouts) == "sdxl" and {module.rank for module in lora.modules.values()} == {4}
    assert len(lora.modules) == 788
