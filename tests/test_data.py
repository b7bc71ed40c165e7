"""What a folder of pictures becomes, and what is said of one that is not whole."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer.bases import empty_vae
from trainer.data import Dataset, encode_pictures, find_pictures, load_square
from trainer.errors import UserError
from trainer.tiny import world


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    world.write_folder(tmp_path / "data", 5, seed=1)
    return tmp_path / "data"


def test_pictures_are_found_with_their_captions_also_in_folders_within(folder: Path) -> None:
    (folder / "more").mkdir()
    Image.new("RGB", (80, 64), "red").save(folder / "more" / "a.JPG")
    (folder / "more" / "a.txt").write_text("  just red\n", encoding="utf-8")
    found = find_pictures(folder)
    assert len(found) == 6 and found[-1].caption == "just red"
    assert [picture.caption for picture in found[:5]] == [scene.caption for scene in world.random_scenes(5, 1)]


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no data folder at"):
        find_pictures(tmp_path / "none")
    with pytest.raises(UserError, match="has no pictures in it"):
        find_pictures(tmp_path)


def test_what_is_wrong_is_said_all_together(folder: Path) -> None:
    (folder / "00001.txt").unlink()
    whole = (folder / "00003.png").read_bytes()
    (folder / "00003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "00004.png").write_bytes(b"no picture at all")
    with pytest.raises(UserError) as error:
        find_pictures(folder)
    assert "1 of 5 pictures have no .txt caption beside them: 00001.png" in str(error.value)
    assert "2 of 5 pictures do not decode: 00003.png, 00004.png" in str(error.value)


def test_a_square_is_upright_and_cut_from_the_center(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste((255, 255, 255), (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    assert load_square(tmp_path / "wide.png", 64).min() > 0.9
    halves = Image.new("RGB", (64, 64), "black")
    halves.paste((255, 255, 255), (0, 0, 64, 32))  # white above
    turned = halves.getexif()
    turned[0x0112] = 3  # "turned by 180 degrees": white belongs below
    halves.save(tmp_path / "turned.png", exif=turned)
    upright = load_square(tmp_path / "turned.png", 64)
    assert upright.shape == (3, 64, 64) and upright[:, 40:].min() == 1 and upright[:, :24].max() == -1


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    def encode(captions: list[str]) -> torch.Tensor:
        return torch.tensor([float(len(caption)) for caption in captions]).view(-1, 1, 1)

    torch.manual_seed(0)
    vae = empty_vae("tiny").eval()
    return encode_pictures(find_pictures(folder), vae=vae, encode_captions=encode, resolution=64, batch=2)


def test_every_picture_keeps_its_own_caption(dataset: Dataset) -> None:
    lengths = dataset.contexts[dataset.caption_of].flatten().tolist()
    assert lengths == [float(len(scene.caption)) for scene in world.random_scenes(5, 1)]
    assert dataset.uncond.tolist() == [[[0.0]]]


def test_an_epoch_shows_every_picture_once_in_an_order_of_its_own(dataset: Dataset) -> None:
    plain = Dataset(dataset.mean, torch.zeros_like(dataset.std), dataset.contexts, dataset.caption_of)
    seen = torch.cat([plain.batch(step, 2, seed=3, caption_dropout=0).latents for step in range(5)])
    index = [int((plain.mean == row).flatten(1).all(1).nonzero()) for row in seen]
    assert sorted(index[:5]) == sorted(index[5:]) == [0, 1, 2, 3, 4]
    assert index[:5] != index[5:]


def test_a_batch_is_a_function_of_seed_and_step(dataset: Dataset) -> None:
    same = [dataset.batch(7, 4, seed=1, caption_dropout=0.5) for _ in range(2)]
    torch.testing.assert_close(same[0].latents, same[1].latents, rtol=0, atol=0)
    assert not torch.equal(dataset.batch(7, 4, seed=2, caption_dropout=0.5).latents, same[0].latents)


def test_latents_are_drawn_from_the_posterior(dataset: Dataset) -> None:
    drawn = torch.cat([dataset.batch(step, 5, seed=0, caption_dropout=0).latents for step in range(400)])
    torch.testing.assert_close(
        drawn.mean(0), dataset.mean.mean(0), rtol=0, atol=5 * float(dataset.std.max()) / 400**0.5
    )
    between = dataset.mean.var(0, unbiased=False) + dataset.std.square().mean(0)
    assert ((drawn.var(0) / between) - 1).abs().mean() < 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_captions_are_dropped_as_often_as_asked(dataset: Dataset, dropout: float) -> None:
    contexts = torch.cat([dataset.batch(step, 5, seed=0, caption_dropout=dropout).context for step in range(200)])
    assert abs((contexts == 0).float().mean().item() - dropout) < 0.05
