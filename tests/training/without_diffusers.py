"""A program: import the trainer, and train a model that it does not know, that of fake_flow.py on 100 timesteps.

`test_without_diffusers.py` runs it where diffusers and other packages cannot be imported.
"""

import importlib
import sys
from pathlib import Path

import torch

from fake_flow import LATENTS, TEXT, FlowCheckpoint, FlowModel, FlowNetwork
from trajectory_consistency import trainer
from trajectory_consistency.tcd import DiscreteSchedule
from trajectory_consistency.tcd.adapter import STUDENT
from trajectory_consistency.tcd.distill.order import Group
from trajectory_consistency.trainer.config import settings
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Table
from trajectory_consistency.trainer.files.write_lora import write_lora
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.training.loop import train
from trajectory_consistency.trainer.training.processes import ALONE, join_processes
from trajectory_consistency.trainer.views.history import History, read_loss_by_time

ENGINES = ("models/unet", "tiny", "demo")
CPU = torch.device("cpu")
CHECKPOINT = FlowCheckpoint(settings.BaseConfig(path="none"))
EMPTY = Conditioning.of(words=torch.zeros(1, 1, TEXT))


def import_everything() -> int:
    """Import every module of the trainer but the engines and what is made with them; return their number."""
    root = Path(str(trainer.__file__)).parent
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    paths = [path for path in paths if not path.as_posix().startswith(ENGINES) and path.name != "__main__.py"]
    for path in paths:
        importlib.import_module(".".join((trainer.__name__, *path.with_suffix("").parts)).removesuffix(".__init__"))
    return len(paths)


def dataset() -> Dataset:
    latents = {"mean": torch.randn(4, *LATENTS.shape(32, 32)), "sizes": torch.tensor([[32, 32, 0, 0, 32, 32]] * 4)}
    captions = {"words": torch.randn(4, 3, TEXT)}
    table = Table(torch.tensor([(0, row, 0, row) for row in range(4)]), [latents], [captions])
    return Dataset((Group(Size(32, 32), 4, 1.0),), [table], EMPTY, CHECKPOINT.collate)


def train_one_step(folder: Path) -> None:
    config = settings.from_mapping(
        {
            "base": {"path": "none"},
            "data": {"folder": "none"},
            "adapter": {"rank": 2},
            "training": {"steps": 1, "batch": 4, "lr": 0.1, "device": "cpu"},
            "output": {"folder": str(folder)},
        }
    )
    torch.manual_seed(0)
    model = FlowModel(FlowNetwork().requires_grad_(False), DiscreteSchedule(torch.linspace(-3, 3, 100).exp()))
    weights = model.new_weights(rank=2, alpha=2, seed=0, targets=("all",))
    model.adapter.add(STUDENT, weights)
    processes, device = join_processes(CPU)
    assert processes is ALONE and device == CPU
    (loss,) = train(model, dataset(), config, observers=[History(folder)])
    assert loss > 0 and dict(weights.items())["blocks.0.to_q"].up.abs().min() > 0
    cond = CHECKPOINT.collate([EMPTY], Framing.whole(32, 32))
    write_lora(folder / "lora.safetensors", model, config, {}, cond, final=True)
    losses = read_loss_by_time(folder)
    assert losses is not None and losses.edges[-1] == 100 and losses.pictures.sum() == 4


if __name__ == "__main__":
    assert import_everything() > 60
    train_one_step(Path(sys.argv[-1]))
