"""A small engine with nothing of a UNet: videos, a rectified flow, captions of any length, and guidance as an input.

FlowCheckpoint, FlowModel, Words, Stills    the protocols of trainer/models/seam.py
write_flow_base, flow_inputs                a base with random weights, and a configuration that uses it
GaussianFlow                                a model whose predictions are exact, because its data are Gaussian
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

import oracles
from plain_method import PLAIN
from trajectory_consistency.tcd import (
    Adapter,
    AdapterWeights,
    FlowSchedule,
    Schedule,
    TargetInput,
    TargetTime,
    TimePoint,
    to_x0,
)
from trajectory_consistency.tcd.adapter import new_weights
from trajectory_consistency.tcd.target_time import sinusoid
from trajectory_consistency.trainer.config.base import BaseConfig
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.fingerprint import fingerprint
from trajectory_consistency.trainer.models.framing import Framing
from trajectory_consistency.trainer.models.seam import Fingerprints, LatentDistribution, LatentFormat
from trajectory_consistency.trainer.tiny import world

LATENTS = LatentFormat(channels=3, stride=16, frames=5, frame_stride=4)
WIDTH, TIME, TEXT, VOCABULARY, LONGEST = 32, 16, 24, 64, 20
SHIFT, SCALE, STD = -0.2, 0.6, 0.05
"""Normalized latents are (signal - SHIFT) / SCALE, and the posterior's standard deviation is STD."""
GROUPS = {"attention": ("to_q", "to_k", "to_v", "to_out"), "feed_forward": ("ff_in", "ff_out")}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
CAPTIONS = (
    "a red circle",
    "blue",
    "a small green star on the left of a wide white background",
    "two yellow squares, side by side",
)
CPU = torch.device("cpu")


class Block(nn.Module):
    """Attention to the words and to the video itself, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        for kind in KINDS:
            inner, outer = (2 * WIDTH if kind == end else WIDTH for end in ("ff_out", "ff_in"))
            self.add_module(kind, nn.Linear(inner, outer))

    def forward(self, x: Tensor, time: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x: [B, N, W]; time: [B, 1, W]; words: [B, L, W], of which those that mask, [B, L], has are heeded."""
        hidden = functional.layer_norm(x + time, (WIDTH,))
        seen = torch.cat([words, hidden], dim=1)
        heeded = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)[:, None, None]
        query, key, value = (
            rearrange(each, "b n (head d) -> b head n d", head=2)
            for each in (self.to_q(hidden), self.to_k(seen), self.to_v(seen))
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=heeded)
        x = x + self.to_out(rearrange(attended, "b head n d -> b n (head d)"))
        return x + self.ff_out(functional.gelu(self.ff_in(functional.layer_norm(x + time, (WIDTH,)))))


class FlowNetwork(nn.Module):
    """Predicts the flow of a video latent; all of its layers are Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.video_in, self.video_out = nn.Linear(LATENTS.channels, WIDTH), nn.Linear(WIDTH, LATENTS.channels)
        self.words_in = nn.Linear(TEXT, WIDTH)
        self.time = nn.Sequential(nn.Linear(TIME, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.guidance, self.aspect = nn.Linear(1, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.recomputes = False

    def forward(self, x: Tensor, network_time: Tensor, guidance: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the flow [B, C, F, h, w] at x of the same shape; network_time, guidance: [B]."""
        dtype = x.dtype
        time = self.time(sinusoid(network_time, TIME).to(dtype)) + self.guidance(guidance[:, None].to(dtype))
        time = (time + self.aspect(cond["aspect"][:, None].to(dtype)))[:, None]
        hidden, words = self.video_in(rearrange(x, "b c f h w -> b (f h w) c")), self.words_in(cond["words"].to(dtype))
        for block in self.blocks:
            call = partial(recompute, block, use_reentrant=False) if self.recomputes else block
            hidden = call(hidden, time, words, cond["mask"])
        frames, height = x.shape[2:4]
        return rearrange(self.video_out(hidden), "b (f h w) c -> b c f h w", f=frames, h=height)


class FlowModel:
    """The network with its adapter: `Model`."""

    always_recomputes = False

    def __init__(self, network: FlowNetwork, schedule: Schedule) -> None:
        self.network, self.schedule, self.latents = network, schedule, LATENTS
        self.adapter = Adapter(network, "time.2")

    @property
    def device(self) -> torch.device:
        return self.network.video_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.video_in.weight.dtype

    def x0(self, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint | None = None) -> Tensor:
        return self._predict(x_t, t, cond, torch.ones(len(x_t), device=x_t.device), s)

    def guided_x0(
        self,
        x_t: Tensor,
        t: TimePoint,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: Tensor,
        s: TimePoint | None = None,
    ) -> Tensor:
        return self._predict(x_t, t, cond, guidance, s)

    def _predict(self, x_t: Tensor, t: TimePoint, cond: Conditioning, w: Tensor, s: TimePoint | None) -> Tensor:
        self.adapter.times = None if s is None else (t.network_time, s.network_time)
        flow = self.network(x_t.to(self.dtype), t.network_time, w, cond.tensors).float()
        return to_x0(flow, x_t, t.level, "flow")

    def layers(self, targets: Sequence[str]) -> list[str]:
        unknown = set(targets) - {"all", *GROUPS, *KINDS}
        if unknown or not targets:
            raise UserError(f"adapter.targets is {list(targets)}: use all, {', '.join([*GROUPS, *KINDS])}")
        kinds = {kind for target in targets for kind in (KINDS if target == "all" else GROUPS.get(target, (target,)))}
        return [path for path, _ in self.network.named_modules() if path.rpartition(".")[2] in kinds]

    def new_weights(
        self, *, rank: int, alpha: float, seed: int, targets: Sequence[str], target_input: TargetInput | None = None
    ) -> AdapterWeights:
        embedding = None
        if target_input:
            with torch.random.fork_rng(devices=[]), torch.device(self.device):
                torch.manual_seed(seed)
                embedding = TargetTime(TIME, WIDTH, target_input=target_input)
        return new_weights(self.network, self.layers(targets), rank=rank, alpha=alpha, seed=seed, target_time=embedding)

    def layer_kind(self, layer: str) -> str:
        return layer.rpartition(".")[2]

    def lora_key(self, layer: str) -> str:
        """Return a name that is not made of the path: another implementation calls the blocks layers."""
        return "lora_transformer_" + layer.replace("blocks", "layers").replace(".", "_")

    def lora_names(self, layer: str) -> Sequence[str]:
        return (self.lora_key(layer),)

    def unloaded_keys(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return []

    def x0_as_loaded(self, path: Path, x_t: Tensor, t: TimePoint, cond: Conditioning, s: TimePoint) -> None:
        """Return None: there is no program that loads its files."""

    def blocks(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def enable_gradient_checkpointing(self) -> None:
        self.network.recomputes = True


class Words:
    """Captions -> one vector for each word and one for the end: `TextEncoder`."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.embedding = embedding

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        numbers = [[1 + crc32(word.encode()) % (VOCABULARY - 1) for word in text.split()] + [0] for text in captions]
        device = self.embedding.weight.device
        return [Conditioning.of(words=self.embedding(torch.tensor([each], device=device)).float()) for each in numbers]

    def chunks(self, caption: str) -> int:
        return 1

    def to(self, device: torch.device) -> "Words":
        self.embedding.to(device)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.embedding.parameters()


class Stills:
    """Pictures <-> latents of a video in which nothing moves: `Autoencoder`, which has no weights."""

    def encode(self, pixels: Tensor) -> LatentDistribution:
        cells = functional.avg_pool2d(pixels.float() / 127.5 - 1, LATENTS.stride)
        frames = LATENTS.shape(*pixels.shape[2:])[1]
        mean = repeat((cells - SHIFT) / SCALE, "b c h w -> b c f h w", f=frames)
        return LatentDistribution(mean, torch.full_like(mean, STD))

    def decode(self, latents: Tensor) -> Tensor:
        signal = rearrange(latents * SCALE + SHIFT, "b c f h w -> b c h (f w)")
        pixels = repeat(signal, "b c h w -> b c (h y) (w x)", y=LATENTS.stride, x=LATENTS.stride)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def to(self, device: torch.device) -> "Stills":
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())


class FlowCheckpoint:
    """The model in one file: `Checkpoint`."""

    guidance: float | None = None

    def __init__(self, base: BaseConfig) -> None:
        self.path = Path(base.path)
        self.name, self.family, self.latents, self.resolution = self.path.stem, "fake-flow", LATENTS, 64
        self.notes: tuple[str, ...] = ()
        self.schedule: Schedule = FlowSchedule(lambda u: 3 * u / (1 + 2 * u))

    def describe(self) -> str:
        return "fake-flow, a flow with shift 3"

    def check_encoders(self) -> None:
        pass

    def load(self, dtype: torch.dtype, device: torch.device) -> FlowModel:
        network = self._loaded(FlowNetwork, "network.", dtype, device)
        return FlowModel(network.requires_grad_(False).eval(), self.schedule.to(device))

    def load_text_encoder(self, device: torch.device) -> Words:
        return Words(self._loaded(partial(nn.Embedding, VOCABULARY, TEXT), "words.", torch.float32, device))

    def load_autoencoder(self, device: torch.device) -> Stills:
        return Stills()

    def _loaded(self, build: Any, prefix: str, dtype: torch.dtype, device: torch.device) -> Any:
        with torch.device("meta"):
            module = build()
        if device.type != "meta":
            tensors = {k.removeprefix(prefix): v for k, v in load_file(self.path).items() if k.startswith(prefix)}
            module.load_state_dict(tensors, assign=True)
        return module.to(device, dtype)

    def collate(self, captions: Sequence[Conditioning], framing: Framing) -> Conditioning:
        """Pad the words with zeros to the longest caption, and add a mask of them and the aspect ratio."""
        words = [caption.tensors["words"][0] for caption in captions]
        padded = nn.utils.rnn.pad_sequence(words, batch_first=True)
        lengths = torch.tensor([len(each) for each in words], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        height, width = framing.target.unbind(1)
        return Conditioning.of(words=padded, mask=mask, aspect=(width / height).log())

    def placeholder_conditioning(self, rows: int, device: torch.device) -> Conditioning:
        mask = torch.empty(rows, LONGEST, dtype=torch.bool, device=device)
        words, aspect = torch.empty(rows, LONGEST, TEXT, device=device), torch.empty(rows, device=device)
        return Conditioning.of(words=words, mask=mask, aspect=aspect)

    def fingerprints(self) -> Fingerprints:
        return Fingerprints(fingerprint(self.path))

    def lora_metadata(self) -> Mapping[str, str]:
        return {"modelspec.architecture": "fake-flow/lora"}


class GaussianFlow(FlowModel):
    """A model of videos that are N(w * mean over the caption's words, oracles.STD^2) in each element.

    The student, which gets s, and the teacher, whose solver takes steps of `skip`, follow the exact trajectories:
    the flow of Gaussian data has a closed form. w: the guidance scale, which the student knows without getting it.
    """

    def __init__(self, network: FlowNetwork, schedule: Schedule, *, skip: int, w: float) -> None:
        super().__init__(network, schedule)
        self.skip, self.w = skip, w

    def mean(self, cond: Conditioning, w: Tensor | float = 1.0) -> Tensor:
        """Return w times the mean over the first numbers of the caption's words, [B, 1, 1, 1, 1]."""
        first, mask = cond.tensors["words"][..., 0], cond.tensors["mask"]
        return (w * first.masked_fill(~mask, 0).sum(1) / mask.sum(1)).view(-1, 1, 1, 1, 1)

    def _predict(self, x_t: Tensor, t: TimePoint, cond: Conditioning, w: Tensor, s: TimePoint | None) -> Tensor:
        if s is None:
            s = self.schedule.point((t.time - self.skip).clamp(min=0), x_t.ndim)
        else:
            w = torch.full_like(w, self.w)
        apart = self.mean(cond, w) - oracles.MEAN
        return oracles.x0_for_target(x_t - t.level.alpha * apart, t.level, s.level) + apart


def write_flow_base(path: Path) -> Path:
    """Write a base with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, nn.Module] = {"network.": FlowNetwork(), "words.": nn.Embedding(VOCABULARY, TEXT)}
    save_file({prefix + name: each for prefix, part in parts.items() for name, each in part.state_dict().items()}, path)
    return path


def open_flow(base: BaseConfig) -> FlowCheckpoint | None:
    """Open a base of this engine, as one of `ENGINES`."""
    return FlowCheckpoint(base) if base.path.endswith(".flow") else None


def flow_inputs(folder: Path, pictures: int = 6) -> dict[str, dict[str, Any]]:
    """Write a base, and pictures with captions of different lengths; return the values of a configuration."""
    world.write_folder(folder / "data", pictures, seed=0)
    for number in range(pictures):
        caption = CAPTIONS[number % len(CAPTIONS)]
        (folder / "data" / f"{number:05d}.txt").write_text(caption, encoding="utf-8")
    return {
        "base": {"path": str(write_flow_base(folder / "base.flow"))},
        "data": {"folder": str(folder / "data"), "resolution": 64, "cache": str(folder / "cache")},
        "method": {**PLAIN, "target_time": True},
        "adapter": {"rank": 4, "alpha": 4.0},
        "training": {"steps": 4, "batch": 4, "lr": 1e-2, "device": "cpu"},
        "output": {"folder": str(folder / "out")},
    }
