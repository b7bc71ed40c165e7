"""The captioned-shapes world says in its captions what it draws."""

import random
from pathlib import Path

import numpy as np
import pytest

from trajectory_consistency.trainer.tiny import world


def test_captions_tell_all_scenes_apart() -> None:
    scenes = world.all_scenes()
    assert len({scene.caption for scene in scenes}) == len(scenes) == 4 * 6 * 5 * 5
    assert world.Scene("circle", "red", "left", "blue").caption == "a red circle left on a blue background"


def test_labels_index_the_lists() -> None:
    assert world.Scene("star", "black", "top", "green").labels == (3, 5, 2, 1)


@pytest.mark.parametrize("scene", world.all_scenes()[::7], ids=lambda scene: scene.caption)
def test_the_picture_shows_the_color_at_the_place_on_the_ground(scene: world.Scene) -> None:
    image = np.asarray(world.draw(scene, random.Random(0)), dtype=int)
    assert image.shape == (64, 64, 3)
    assert (image[0, 0] == world.COLORS[scene.ground]).all()
    shape = (image == world.COLORS[scene.color]).all(-1)
    rows, columns = shape.nonzero()
    x, y = world.PLACES[scene.place]
    assert abs(columns.mean() / 64 - x) < 0.08 and abs(rows.mean() / 64 - y) < 0.08
    assert 0.01 < shape.mean() < 0.2


def test_a_folder_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        world.write_folder(tmp_path / name, 4, seed)
    read = {name: [p.read_bytes() for p in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert len(read["a"]) == 8 and read["a"] == read["b"] != read["c"]
