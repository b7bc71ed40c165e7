"""A program: import the trainer, and train a model that it does not know, a convolution with a clock of 100 timesteps.

`test_without_diffusers.py` runs it where diffusers and other packages cannot be imported.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trajectory_consistency import trainer
from trajectory_consistency.tcd import Adapter, AdapterWeights, DiscreteSchedule, TargetInput, TimePoint
from trajectory_consistency.tcd import adapter as lora
from trajectory_consistency.trainer.config import settings
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.dataset import Dataset, Table
from trajectory_consistency.trainer.data.order import Group
from trajectory_consistency.trainer.files.write_lora import write_lora
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.seam import LatentFormat, Model
from trajectory_consistency.trainer.training.loop import train
from trajectory_consistency.trainer.training.processes import ALONE, join_processes
from trajectory_consistency.trainer.views.history import History, read_loss_by_time

ENGINES = ("models/unet", "tiny", "demo")
CPU = torch.device("cpu")
LATENTS = LatentFormat(channels=3, stride=4)


class Convolution:
    """Implements `Model`: x0 is a convolution of x_t."""

    latents, device, dtype = LATENTS, CPU, torch.float32

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)).requires_grad_(False)
        self.adapter = Adapter(self.network, "0")
        self.schedule = DiscreteSchedule(torch.linspace(-3, 3, 100).exp())

    def x0(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None = None) -> Tensor:
        output: Tensor = self.network(x_t)
        return output

    def guided_x0(
        self,
        x_t: Tensor,
        t: TimePoint,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: Tensor,
        s: TimePoint | None = None,
    ) -> Tensor:
        return self.x0(x_t, t, cond, s)

    def layers(self, targets: Sequence[str]) -> list[str]:
        return ["0"]

    def new_weights(
        self, *, rank: int, alpha: float, seed: int, targets: Sequence[str], target_input: TargetInput | None = None
    ) -> AdapterWeights:
        return lora.new_weights(self.network, self.layers(targets), rank=rank, alpha=alpha, seed=seed)

    def layer_kind(self, layer: str) -> str:
        return "convolution"

    def lora_key(self, layer: str) -> str:
        return f"lora_unet_{layer}"

    def blocks(self) -> list[nn.Module]:
        return list(self.network)

    def enable_gradient_checkpointing(self) -> None:
        pass


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
    captions = {"context": torch.randn(4, 2)}
    table = Table(torch.tensor([(0, row, 0, row) for row in range(4)]), [latents], [captions])
    empty = Conditioning.of(context=torch.zeros(1, 2))
    return Dataset((Group(Size(32, 32), 4, 1.0),), [table], empty, lambda rows, sizes: Conditioning.cat(rows))


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
    model: Model = Convolution()
    weights = model.new_weights(rank=2, alpha=2, seed=0, targets=("all",))
    model.adapter.add(lora.STUDENT, weights)
    processes, device = join_processes(CPU)
    assert processes is ALONE and device == CPU
    (loss,) = train(model, dataset(), config, observers=[History(folder)])
    assert loss > 0 and dict(weights.items())["0"].up.abs().min() > 0
    write_lora(folder / "lora.safetensors", model, config, {}, Conditioning.of(context=torch.zeros(1, 2)), final=True)
    losses = read_loss_by_time(folder)
    assert losses is not None and losses.edges[-1] == 100 and losses.pictures.sum() == 4


if __name__ == "__main__":
    assert import_everything() > 60
    train_one_step(Path(sys.argv[-1]))
