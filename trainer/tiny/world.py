"""The shapes world: small pictures of one shape each, with captions that describe them completely."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

SIZE_PX = 64
SUPERSAMPLING = 4

COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (245, 205, 50),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
SHAPES = ("circle", "square", "triangle", "star")
# The center (x, y) of the shape, as fractions of the picture's width and height.
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "center": (0.5, 0.5)}


@dataclass(frozen=True)
class Scene:
    """One shape of one color, at one place on a background (ground) of a different color."""

    shape: str
    color: str
    place: str
    ground: str

    @property
    def caption(self) -> str:
        """A caption that describes the scene completely."""
        return f"a {self.color} {self.shape} {self.place} on a {self.ground} background"

    @property
    def labels(self) -> tuple[int, ...]:
        """The index of the scene's value in each of `LABELS`."""
        return tuple(values.index(value) for values, value in zip(LABELS.values(), astuple(self), strict=True))


LABELS: dict[str, list[str]] = {
    "shape": list(SHAPES),
    "color": list(COLORS),
    "place": list(PLACES),
    "ground": list(COLORS),
}
"""The possible values of each field of `Scene`, in its order."""


def all_scenes() -> list[Scene]:
    """Return every possible scene, in a fixed order."""
    return [Scene(*parts) for parts in product(*LABELS.values()) if parts[1] != parts[3]]


def random_scenes(count: int, seed: int) -> list[Scene]:
    """Return `count` scenes, drawn uniformly with replacement; a function of the seed."""
    return random.Random(seed).choices(all_scenes(), k=count)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as an antialiased RGB picture, SIZE_PX x SIZE_PX; the exact place, size and angle are random."""
    canvas = SIZE_PX * SUPERSAMPLING
    image = Image.new("RGB", (canvas, canvas), COLORS[scene.ground])
    center_x, center_y = (c * canvas + rng.uniform(-0.07, 0.07) * canvas for c in PLACES[scene.place])
    radius = rng.uniform(0.14, 0.23) * canvas
    pen = ImageDraw.Draw(image)
    if scene.shape == "circle":
        pen.ellipse([center_x - radius, center_y - radius, center_x + radius, center_y + radius], COLORS[scene.color])
    else:
        tilt = rng.uniform(-0.12, 0.12)
        pen.polygon(_outline(scene.shape, center_x, center_y, radius, tilt), COLORS[scene.color])
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def _outline(shape: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    """Return the corners (x, y), in pixels, of a polygon around (x, y), rotated by `tilt` radians."""
    corners, inner, start = {
        "square": (4, 1.0, math.pi / 4),
        "triangle": (3, 1.0, 0.0),
        "star": (10, 0.45, 0.0),
    }[shape]
    points = []
    for k in range(corners):
        angle = start + tilt + 2 * math.pi * k / corners
        reach = radius * (inner if k % 2 else 1.0) * (1.15 if shape != "star" else 1.2)
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return points


def draw_pictures(scenes: Sequence[Scene], rng: random.Random) -> Tensor:
    """Draw one picture for each scene, uint8 [B, 3, 64, 64]."""
    images = np.stack([np.asarray(draw(scene, rng)) for scene in scenes])
    return torch.from_numpy(rearrange(images, "b h w c -> b c h w").copy())


def write_folder(folder: Path, count: int, seed: int) -> None:
    """Write `count` random pictures and their captions into a folder, as `00000.png`, `00000.txt` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index, scene in enumerate(random_scenes(count, seed)):
        draw(scene, rng).save(folder / f"{index:05d}.png")
        (folder / f"{index:05d}.txt").write_text(scene.caption + "\n", encoding="utf-8")
