"""The captioned-shapes world says in its captions what it draws."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trajectory_consistency.trainer.tiny import world


def test_captions_tell_all_scenes_apart() -> None:
    scenes = world.all_scenes()
    assert len({scene.caption for scene in scenes}) == len(scenes) == 4 * 6 * 5 * 5 * 4
    scene = world.Scene("circle", "red", "left", "blue", "dotted")
    assert scene.caption == "a red circle left on a dotted blue background"


@pytest.mark.parametrize(
    ("parts", "caption"),
    [
        ((), "something"),
        (("shape",), "a circle"),
        (("color", "place"), "something red left"),
        (("ground",), "something on a blue background"),
        (("shape", "pattern"), "a circle on a dotted background"),
    ],
)
def test_a_caption_mentions_only_some_parts(parts: tuple[str, ...], caption: str) -> None:
    assert world.Scene("circle", "red", "left", "blue", "dotted").describe(parts) == caption


def test_labels_index_the_lists() -> None:
    assert world.Scene("star", "black", "top", "green", "plain").labels == (3, 5, 2, 1, 0)


def test_a_prompt_allows_the_scenes_that_agree_with_what_it_mentions() -> None:
    scene = world.Scene("circle", "red", "left", "blue", "dotted")
    assert world.Prompt(scene, ("shape", "color", "place", "ground", "pattern")).scenes() == [scene]
    assert world.Prompt(scene, ()).scenes() == world.all_scenes()
    allowed = world.Prompt(scene, ("color", "pattern")).scenes()
    assert {(each.color, each.pattern) for each in allowed} == {("red", "dotted")} and scene in allowed
    assert len(allowed) == 4 * 5 * 5


def test_half_of_the_prompts_are_complete_and_the_others_mention_each_part_half_of_the_time() -> None:
    prompts = world.random_prompts(4000, seed=0)
    counts = Counter(name for prompt in prompts for name in prompt.parts)
    assert set(counts) == set(world.LABELS)
    assert all(count / 4000 == pytest.approx(0.75, abs=0.03) for count in counts.values())
    complete = sum(len(prompt.parts) == len(world.LABELS) for prompt in prompts) / 4000
    assert complete == pytest.approx(0.5 + 0.5**6, abs=0.03)
    assert prompts == world.random_prompts(4000, seed=0) != world.random_prompts(4000, seed=1)


@pytest.mark.parametrize("scene", world.all_scenes()[::49], ids=lambda scene: scene.caption)
def test_the_picture_shows_the_color_at_the_place_on_the_ground(scene: world.Scene) -> None:
    image = np.asarray(world.draw(scene, random.Random(0)), dtype=int)
    assert image.shape == (64, 64, 3)
    shape = (image == world.COLORS[scene.color]).all(-1)
    rows, columns = shape.nonzero()
    x, y = world.PLACES[scene.place]
    assert abs(columns.mean() / 64 - x) < 0.08 and abs(rows.mean() / 64 - y) < 0.08
    assert 0.01 < shape.mean() < 0.2


@pytest.mark.parametrize("ground", world.COLORS)
@pytest.mark.parametrize("pattern", world.PATTERNS)
def test_the_background_repeats_its_pattern_in_every_cell_of_the_latents(pattern: str, ground: str) -> None:
    scene = world.Scene("circle", "white" if ground != "white" else "red", "right", ground, pattern)
    cells = np.asarray(world.draw(scene, random.Random(0)), dtype=int)[:, :16].reshape(8, 8, 2, 8, 3)
    assert (cells == cells[:1, :, :1]).all(), "the shape is at the right"
    cell = cells[0, :, 0]
    assert (cell == world.COLORS[ground]).all(-1).any()
    assert (cell.std((0, 1)).max() > 20) == (pattern != "plain")


def test_the_direction_of_stripes_is_random() -> None:
    scene, rng = world.Scene("circle", "red", "center", "white", "striped"), random.Random(0)
    assert len({np.asarray(world.draw(scene, rng))[:8, :8].tobytes() for _ in range(40)}) == 4


def test_a_folder_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        world.write_folder(tmp_path / name, 4, seed)
    read = {name: [p.read_bytes() for p in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert len(read["a"]) == 8 and read["a"] == read["b"] != read["c"]
