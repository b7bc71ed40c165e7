"""The shapes world: small pictures of one shape on a patterned background, with complete or partial captions."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
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
PLACES = {"left": (0.28, 0.5), "right": (0.72, 0.5), "top": (0.5, 0.28), "bottom": (0.5, 0.72), "center": (0.5, 0.5)}
PATTERNS = ("plain", "striped", "dotted", "checked")
# The period of every pattern along each axis. A tiny autoencoder can learn the patterns, because they are the same in
# every cell of 8 x 8 pixels, which is one position of the latents.
PERIOD_PX = 8
LINE_SHADE = 0.35  # how much darker the lines of a pattern are than their background; on black, how much lighter


@dataclass(frozen=True)
class Scene:
    """One shape of one color, at one place on a background (ground) of a different color with a pattern."""

    shape: str
    color: str
    place: str
    ground: str
    pattern: str

    @property
    def caption(self) -> str:
        """A caption that describes the scene completely."""
        return self.describe(tuple(LABELS))

    def describe(self, parts: Collection[str]) -> str:
        """Return a caption that mentions only some of `LABELS`, such as "something red left"."""

        def word(name: str) -> str:
            return f" {getattr(self, name)}" if name in parts else ""

        subject = f"a{word('color')}{word('shape')}" if "shape" in parts else f"something{word('color')}"
        ground = f"{word('pattern')}{word('ground')}"
        return subject + word("place") + (f" on a{ground} background" if ground else "")

    @property
    def labels(self) -> tuple[int, ...]:
        """The index of the scene's value in each of `LABELS`."""
        return tuple(values.index(value) for values, value in zip(LABELS.values(), astuple(self), strict=True))


LABELS: dict[str, list[str]] = {
    "shape": list(SHAPES),
    "color": list(COLORS),
    "place": list(PLACES),
    "ground": list(COLORS),
    "pattern": list(PATTERNS),
}
"""The possible values of each field of `Scene`, in its order."""


@dataclass(frozen=True)
class Prompt:
    """A caption that mentions some parts of a scene, by the names in `LABELS`, and leaves the others open."""

    scene: Scene
    parts: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The caption, such as "something red on a dotted background"."""
        return self.scene.describe(self.parts)

    def scenes(self) -> list[Scene]:
        """Return every scene that the caption allows."""
        asked = [(name, getattr(self.scene, name)) for name in self.parts]
        return [scene for scene in all_scenes() if all(getattr(scene, name) == value for name, value in asked)]


def all_scenes() -> list[Scene]:
    """Return every possible scene, in a fixed order."""
    return [Scene(*parts) for parts in product(*LABELS.values()) if parts[1] != parts[3]]


def random_scenes(count: int, seed: int) -> list[Scene]:
    """Return `count` scenes, drawn uniformly with replacement; a function of the seed."""
    return random.Random(seed).choices(all_scenes(), k=count)


def random_prompt(scene: Scene, rng: random.Random) -> Prompt:
    """Choose what a caption mentions: in half of all cases everything, otherwise each part with probability 1/2."""
    mention = rng.choice((0.5, 1.0))
    return Prompt(scene, tuple(name for name in LABELS if rng.random() < mention))


def random_prompts(count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts, half of them complete on average; a function of the seed."""
    rng = random.Random(f"prompts {seed}")
    return [random_prompt(scene, rng) for scene in random_scenes(count, seed)]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as an antialiased RGB picture, SIZE_PX x SIZE_PX; the exact place, size and angle are random."""
    canvas = SIZE_PX * SUPERSAMPLING
    image = Image.fromarray(_background(scene, canvas, rng))
    center_x, center_y = (c * canvas + rng.uniform(-0.04, 0.04) * canvas for c in PLACES[scene.place])
    radius = rng.uniform(0.17, 0.22) * canvas
    pen = ImageDraw.Draw(image)
    if scene.shape == "circle":
        pen.ellipse([center_x - radius, center_y - radius, center_x + radius, center_y + radius], COLORS[scene.color])
    else:
        tilt = rng.uniform(-0.08, 0.08)
        pen.polygon(_outline(scene.shape, center_x, center_y, radius, tilt), COLORS[scene.color])
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def _background(scene: Scene, canvas: int, rng: random.Random) -> NDArray[np.uint8]:
    """Return the background, [canvas, canvas, 3]; the direction of stripes is random."""
    color = np.array(COLORS[scene.ground], dtype=np.float64)
    line_color = color + LINE_SHADE * ((255 if scene.ground == "black" else 0) - color)
    periods = SIZE_PX // PERIOD_PX
    y, x = np.mgrid[: canvas // periods, : canvas // periods] * periods / canvas
    along = rng.choice((x, y, x + y, x - y))
    lines = {
        "plain": np.zeros_like(x, dtype=bool),
        "striped": along % 1 < 0.5,
        "dotted": np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.3,
        "checked": (x % 1 < 0.5) == (y % 1 < 0.5),
    }[scene.pattern]
    return np.tile(np.where(lines[:, :, None], line_color, color).astype(np.uint8), (periods, periods, 1))


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
    """Write `count` random pictures and captions, as by `random_prompt`: `00000.png`, `00000.txt` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for index, scene in enumerate(random_scenes(count, seed)):
        draw(scene, rng).save(folder / f"{index:05d}.png")
        (folder / f"{index:05d}.txt").write_text(random_prompt(scene, rng).caption + "\n", encoding="utf-8")
