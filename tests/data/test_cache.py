"""The cache: equal to what is computed directly, whatever happens to it, and enough to train without encoders."""

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import tomli_w
import torch
from PIL import Image
from safetensors import safe_open

from tiny_base import write_base
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data import encode, store
from trajectory_consistency.trainer.data.buckets import Buckets, Size
from trajectory_consistency.trainer.data.cache import cache_paths, input_fingerprints, merge_parts, open_cached
from trajectory_consistency.trainer.data.captions import caption_variants
from trajectory_consistency.trainer.data.dataset import Dataset
from trajectory_consistency.trainer.data.pictures import decode, pixels, size_of
from trajectory_consistency.trainer.errors import UserError
from trajectory_consistency.trainer.models.conditioning import Conditioning
from trajectory_consistency.trainer.models.unet.autoencoder import Vae
from trajectory_consistency.trainer.models.unet.checkpoint import UNetCheckpoint
from trajectory_consistency.trainer.tiny import world

CPU, FLOAT = torch.device("cpu"), torch.float32
Rows = dict[tuple[float, ...], tuple[torch.Tensor, ...]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five squares and three wide pictures, two of them with one caption."""
    folder = tmp_path / "pictures"
    world.write_folder(folder, 5, seed=0)
    for k, color in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (140 + 70 * k, 70), color).save(folder / f"wide{k}.png")
        (folder / f"wide{k}.txt").write_text("just a color" if k else "red", encoding="utf-8")
    return folder


def values(checkpoint: Path, tmp_path: Path, **data: object) -> dict[str, dict[str, object]]:
    return {
        "base": {"path": str(checkpoint)},
        "data": {"resolution": 96, "bucket_step": 32, "cache": str(tmp_path / "cache"), **data},
        "output": {"folder": str(tmp_path / "out")},
    }


def configured(checkpoint: Path, tmp_path: Path, **data: object) -> config.Config:
    return config.from_mapping(values(checkpoint, tmp_path, **data))


def filled(settings: config.Config) -> Dataset:
    encode.fill_cache(settings, CPU, FLOAT)
    cached = open_cached(settings, FLOAT)
    assert cached is not None
    return cached.dataset


def rows(dataset: Dataset) -> list[tuple[torch.Tensor, ...]]:
    """Mean, std, sizes and context of every picture, in the order of the data."""
    found = []
    for table in dataset.tables:
        for shard, row, captions, caption, *_ in table.index.tolist():
            latent = table.latents[shard]
            std = latent["std"][row] if "std" in latent else torch.zeros(())
            found.append((latent["mean"][row], std, latent["sizes"][row], table.captions[captions]["context"][caption]))
    return found


def same(one: Dataset, other: Dataset) -> bool:
    return one.groups == other.groups and all(
        torch.equal(a, b) for pair in zip(rows(one), rows(other), strict=True) for a, b in zip(*pair, strict=True)
    )


def shard_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors") if not path.name.startswith("index"))


class Loads:
    """Counts the loading of each encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        for name in ("load_autoencoder", "load_text_encoder"):
            monkeypatch.setattr(UNetCheckpoint, name, self.counted(name, getattr(UNetCheckpoint, name)))

    def counted(self, name: str, load: Callable[..., object]) -> Callable[..., object]:
        def counting(*arguments: object) -> object:
            self.count[name.removeprefix("load_")] += 1
            return load(*arguments)

        return counting


def base_of(checkpoint: Path) -> UNetCheckpoint:
    return UNetCheckpoint(config.BaseConfig(path=str(checkpoint)))


def signal(images: torch.Tensor) -> torch.Tensor:
    """What a VAE is given of bytes: from -1 to 1."""
    return images.float() / 255 * 2 - 1


def test_what_is_cached_is_what_is_computed(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    dataset = filled(configured(checkpoint, tmp_path, folder=str(pictures)))
    base, scale = base_of(checkpoint), 0.18215
    vae, text_encoder = base.load_autoencoder(CPU).vae, base.load_text_encoder(CPU)
    assert len({tuple(row[2].tolist()) for row in rows(dataset)}) == 4
    expected = []
    for path in sorted(pictures.glob("*.png")):
        image = decode(path.read_bytes())
        crop = Buckets(96, 32).fit(size_of(image))
        assert crop is not None
        with torch.no_grad():
            posterior = vae.encode(signal(pixels(image, crop)[None])).latent_dist
            (cond,) = text_encoder.encode([path.with_suffix(".txt").read_text(encoding="utf-8").strip()])
        context = cond.tensors["context"]
        expected.append((posterior.mean[0] * scale, posterior.std[0] * scale, crop.framing, context[0]))
    assert len(dataset) == len(expected) == 8
    for mean, std, sizes, context in rows(dataset):
        nearest = min(
            expected, key=lambda row: 9e9 if row[0].shape != mean.shape else (row[0] - mean).abs().max().item()
        )
        torch.testing.assert_close(mean.float(), nearest[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(std.float(), nearest[1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(context.float(), nearest[3], rtol=1e-3, atol=1e-3)
        assert torch.equal(sizes, nearest[2].to_rows()[0])
    assert {group.bucket for group in dataset.groups} == {Size(64, 64), Size(64, 128)}


def test_a_call_of_the_vae_has_a_bounded_number_of_pixels(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    sides = {64: 512, 512: 8, 768: 3, 1024: 2, 2048: 1, 4096: 1}
    assert {side: encode.pictures_per_call(Size(side, side), gpu) for side in sides} == sides
    assert encode.pictures_per_call(Size(256, 1024), gpu) == 8 and encode.pictures_per_call(Size(64, 64), CPU) == 1
    monkeypatch.setattr(encode, "_PIXELS_PER_CALL", 3 * 64 * 64)
    together = encode.pictures_per_call
    monkeypatch.setattr(encode, "pictures_per_call", lambda bucket, _: together(bucket, gpu))
    shapes, encode_pictures = [], Vae.encode
    monkeypatch.setattr(Vae, "encode", lambda vae, x: shapes.append(tuple(x.shape)) or encode_pictures(vae, x))
    filled(configured(checkpoint, tmp_path, folder=str(pictures)))
    assert sorted(shapes) == [(1, 3, 64, 128)] * 3 + [(2, 3, 64, 64), (3, 3, 64, 64)]


def test_float16_rounds_the_cache_eight_times_finer_than_bfloat16(checkpoint: Path) -> None:
    base = base_of(checkpoint)
    images = world.draw_pictures(world.random_scenes(8, 0), random.Random(0))
    with torch.no_grad():
        mean = base.load_autoencoder(CPU).vae.encode(signal(images)).latent_dist.mean * 0.18215
    captions = [scene.caption for scene in world.random_scenes(8, 0)]
    context = Conditioning.cat(base.load_text_encoder(CPU).encode(captions)).tensors["context"]
    for exact in (mean, context):
        half, brain = (
            (exact.to(dtype).float() - exact).norm() / exact.norm() for dtype in (torch.half, torch.bfloat16)
        )
        assert half < 3e-4 and 6 < brain / half < 10
    assert torch.float16 == encode.CACHED_DTYPE


def test_a_distinct_caption_and_a_picture_that_is_there_twice_are_encoded_once(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copy(pictures / "00000.png", pictures / "again.png")
    (pictures / "again.txt").write_text("just a color", encoding="utf-8")
    dataset = filled(configured(checkpoint, tmp_path, folder=str(pictures)))
    count: Counter[str] = Counter()
    for path in shard_files(tmp_path / "cache"):
        with safe_open(path, "pt") as file:
            count[path.parent.name.partition("-")[0]] += file.get_slice("digest").get_shape()[0]
    captions = {path.read_text(encoding="utf-8").strip() for path in pictures.glob("*.txt")}
    assert len(dataset) == 9 and count == {"latents": 8, "captions": len(captions) + 1}


class Lengths:
    """A text encoder whose rows are as long as the captions, in words, and hold that number."""

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        counts = [len(caption.split()) for caption in captions]
        return [Conditioning.of(context=torch.full((1, 1 + count, 8), float(count))) for count in counts]


class Loud(Lengths):
    """The same, with rows of "one two" far above float16's maximum, and NaN for "nothing"."""

    def encode(self, captions: Sequence[str]) -> list[Conditioning]:
        factors = [{"one two": 2.0**26, "nothing": float("nan")}.get(caption, 1.0) for caption in captions]
        rows = super().encode(captions)
        return [Conditioning.of(context=row.tensors["context"] * f) for row, f in zip(rows, factors, strict=True)]


def test_an_embedding_above_the_range_of_float16_is_cached_in_float32(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNetCheckpoint, "load_text_encoder", lambda *_: Loud())
    for path, text in zip(sorted(pictures.glob("*.txt")), ["one two", "three words here"] * 4, strict=True):
        path.write_text(text, encoding="utf-8")
    found = [row[3] for row in rows(filled(configured(checkpoint, tmp_path, folder=str(pictures))))]
    assert {(len(row), row.dtype, row[0, 0].item()) for row in found} == {
        (3, torch.float32, 2.0**27),
        (4, torch.float16, 3.0),
    }
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(UserError, match="the caption 'nothing' has an encoding that is not finite: change its weights"):
        filled(configured(checkpoint, tmp_path, folder=str(pictures)))


def test_captions_of_different_lengths_are_cached_side_by_side_and_joined_by_their_model_alone(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNetCheckpoint, "load_text_encoder", lambda *_: Lengths())
    texts = ["one", "one two", "one two three", "three other words"]
    for path, text in zip(sorted(pictures.glob("*.txt")), texts * 2, strict=True):
        path.write_text(text, encoding="utf-8")
    dataset = filled(configured(checkpoint, tmp_path, folder=str(pictures)))
    files = [path.stem for path in shard_files(tmp_path / "cache") if "captions" in path.parent.name]
    assert sorted(name.rpartition("-")[0] for name in files) == [f"captions{1 + words}x8" for words in range(4)]
    assert all((row[3] == len(row[3]) - 1).all() for row in rows(dataset))
    assert Counter(len(row[3]) - 1 for row in rows(dataset)) == {1: 2, 2: 2, 3: 4}
    batch = dataset.batch(0, 5, seed=0, caption_dropout=0.5)
    context, mask = batch.cond.tensors["context"], batch.cond.tensors["mask"]
    words = context[:, 0, 0]
    assert len(set(words.tolist())) > 1 and torch.equal(mask.sum(1), 1 + words)
    assert torch.equal(context, (words[:, None] * mask)[..., None].expand_as(context))
    assert (batch.uncond.tensors["context"] == 0).all() and len(batch.uncond) == 5


def test_the_negative_prompt_guides_the_teacher_and_dropped_captions_are_empty(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    plain = values(checkpoint, tmp_path, sources=[{"path": str(pictures)}, {"path": str(tmp_path / "prompts.txt")}])
    plain["data"]["draw"] = {"steps": 1}
    drawn_with: list[torch.Tensor] = []

    def draw(_: object, __: object, uncond: Conditioning, noise: torch.Tensor, **options: object) -> torch.Tensor:
        drawn_with.append(uncond.tensors["context"][0])
        return noise

    monkeypatch.setattr(encode, "dpm_solver_sample", draw)
    loads, found = Loads(monkeypatch), {}
    for negative in ("", "blurry, (ugly:1.2)", "a blue square"):
        dataset = filled(config.from_mapping({**plain, "method": {"negative_prompt": negative}}))
        batch = dataset.batch(0, 4, seed=0, caption_dropout=1.0)
        found[negative] = batch.uncond.tensors["context"]
        encoded = base_of(checkpoint).load_text_encoder(CPU).encode([negative, ""])
        for row, expected in zip((found[negative], batch.cond.tensors["context"]), encoded, strict=True):
            torch.testing.assert_close(row, expected.tensors["context"].expand_as(row), rtol=1e-3, atol=1e-3)
        assert torch.equal(drawn_with.pop(), found[negative][0]) and not drawn_with
    assert len(found) == 3 and not torch.allclose(found[""], found["a blue square"], atol=0.1)
    assert loads.count["autoencoder"] == 1, "the pictures are encoded once"


def test_captions_do_not_depend_on_the_networks_dtype_but_on_clip_skip(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = values(checkpoint, tmp_path, folder=str(pictures))
    wanted = [
        cache_paths(config.from_mapping({**settings, "base": {**settings["base"], "clip_skip": skip}}), base, dtype)
        for base in [base_of(checkpoint)]
        for skip, dtype in ((0, FLOAT), (0, torch.bfloat16), (2, FLOAT))
    ]
    for kind, same_at in (("captions", [0, 0, 2]), ("latents", [0, 0, 0]), ("drawn", [0, 1, 2])):
        folders = [paths.rows_folder(kind) for paths in wanted]
        assert [folders.index(folder) for folder in folders] == same_at, kind
    expected = filled(config.from_mapping(settings))
    loads = Loads(monkeypatch)
    assert same(encode.load_or_encode(config.from_mapping(settings), CPU, torch.bfloat16), expected) and not loads.count


def test_a_complete_cache_needs_no_encoders_and_a_change_only_what_changed(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, loads = configured(checkpoint, tmp_path, folder=str(pictures)), Loads(monkeypatch)
    first = encode.load_or_encode(settings, CPU, FLOAT)
    assert loads.count == {"autoencoder": 1, "text_encoder": 1}
    loads.count.clear()
    assert same(encode.load_or_encode(settings, CPU, FLOAT), first) and not loads.count
    before = {path: path.stat().st_mtime_ns for path in shard_files(tmp_path / "cache")}
    os.utime(pictures / "00000.png")  # touched, and not changed
    assert open_cached(settings, FLOAT) is None
    assert same(encode.load_or_encode(settings, CPU, FLOAT), first) and not loads.count
    (pictures / "00000.txt").write_text("another caption", encoding="utf-8")
    changed = encode.load_or_encode(settings, CPU, FLOAT)
    assert loads.count == {"text_encoder": 1} and not same(changed, first)
    new = set(shard_files(tmp_path / "cache")) - set(before)
    assert [path.parent.name.partition("-")[0] for path in new] == ["captions"]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


@pytest.mark.parametrize(
    "change", [{"resolution": 64}, {"bucket_step": 64}, {"buckets": False}, {"upscale": True}], ids=str
)
def test_other_settings_have_other_rows(
    checkpoint: Path, pictures: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    filled(configured(checkpoint, tmp_path, folder=str(pictures)))
    other = configured(checkpoint, tmp_path, **{"folder": str(pictures), **change})
    assert open_cached(other, FLOAT) is None
    sizes = {tuple(row[2][4:].tolist()) for row in rows(filled(other))}
    rule = Buckets(
        *(getattr(other.data, key) for key in ("resolution", "bucket_step")), not other.data.buckets, other.data.upscale
    )
    crops = [rule.fit(size_of(decode(path.read_bytes()))) for path in pictures.glob("*.png")]
    assert sizes == {tuple(crop.bucket) for crop in crops if crop}


def test_another_model_has_other_rows(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    filled(configured(checkpoint, tmp_path, folder=str(pictures)))
    other = tmp_path / "other.safetensors"
    content = bytearray(checkpoint.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert open_cached(configured(other, tmp_path, folder=str(pictures)), FLOAT) is None
    copy = shutil.copy(checkpoint, tmp_path / "copy.safetensors")
    assert open_cached(configured(Path(copy), tmp_path, folder=str(pictures)), FLOAT) is not None


def test_another_autoencoder_has_other_latents_and_the_same_captions(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    given = values(checkpoint, tmp_path, folder=str(pictures))
    vae = write_base(tmp_path / "vae.safetensors", seed=1)
    paths, prints = [], []
    for more in ({}, {"vae": str(vae)}, {"vae": str(shutil.copy(checkpoint, tmp_path / "copy.safetensors"))}):
        settings = config.from_mapping({**given, "base": {**given["base"], **more}})
        paths.append(cache_paths(settings, UNetCheckpoint(settings.base), FLOAT))
        prints.append(input_fingerprints(settings, FLOAT))
    own, other, copy = paths
    assert own.rows_folder("latents") == copy.rows_folder("latents") != other.rows_folder("latents")
    assert own.rows_folder("captions") == other.rows_folder("captions")
    assert prints[0].keys() == {"the base", "the base's dtype"} and prints[1].keys() == prints[0].keys() | {"the VAE"}
    assert prints[1]["the base"] == prints[0]["the base"] == prints[2]["the VAE"] != prints[1]["the VAE"]


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "garbage"])
def test_a_damaged_shard_is_computed_anew(checkpoint: Path, pictures: Path, tmp_path: Path, damage: str) -> None:
    settings = configured(checkpoint, tmp_path, folder=str(pictures))
    first = [tuple(tensor.clone() for tensor in row) for row in rows(filled(settings))]
    for shard in shard_files(tmp_path / "cache"):
        whole = shard.read_bytes()
        shard.unlink()
        if damage != "gone":
            shard.write_bytes({"cut": whole[:-10], "empty": b"", "garbage": b"x" * len(whole)}[damage])
        assert open_cached(settings, FLOAT) is None
        again = rows(filled(settings))
        assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))


def test_a_changed_bit_is_found_by_the_cache_command(
    checkpoint: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = configured(checkpoint, tmp_path, folder=str(pictures))
    first = [tuple(tensor.clone() for tensor in row) for row in rows(filled(settings))]
    (shard, *_) = (path for path in shard_files(tmp_path / "cache") if "latents" in path.parent.name)
    content = bytearray(shard.read_bytes())
    content[-40] ^= 4
    shard.unlink()
    shard.write_bytes(content)
    assert open_cached(settings, FLOAT) is not None  # lengths and header are right
    encode.fill_cache(settings, CPU, FLOAT, verify=True)
    assert "is damaged (its checksum does not match)" in caplog.text
    cached = open_cached(settings, FLOAT)
    assert cached is not None
    assert all(
        torch.equal(a, b) for pair in zip(first, rows(cached.dataset), strict=True) for a, b in zip(*pair, strict=True)
    )


def test_parts_of_several_processes_are_the_whole(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    alone = filled(configured(checkpoint, tmp_path / "alone", folder=str(pictures)))
    settings = configured(checkpoint, tmp_path / "parts", folder=str(pictures))
    for part in (2, 0, 1):
        assert open_cached(settings, FLOAT) is None
        encode.fill_cache(settings, CPU, FLOAT, part=part, parts=3)
        merge_parts(settings, FLOAT)
    cached = open_cached(settings, FLOAT)
    assert cached is not None and cached.survey.seen == cached.survey.pictures == 8
    assert same(cached.dataset, alone)


def test_data_that_cannot_be_used_is_reported_or_skipped(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "wide0.txt").unlink()
    with pytest.raises(
        UserError,
        match=r"1 of 9 pictures do not decode: broken\.png \(not a picture of .*\); 2 of 9 pictures have no caption",
    ):
        encode.fill_cache(configured(checkpoint, tmp_path, folder=str(pictures)), CPU, FLOAT)
    settings = configured(checkpoint, tmp_path, folder=str(pictures), skip_bad=True)
    assert len(filled(settings)) == 7
    cached = open_cached(settings, FLOAT)
    assert cached is not None and "1 of 9 pictures do not decode: broken.png" in cached.survey.complaints()
    assert open_cached(configured(checkpoint, tmp_path, folder=str(pictures)), FLOAT) is None
    for path in pictures.glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="no picture is left to train on: 1 of 9 pictures do not decode"):
        filled(settings)


def test_a_prefix_is_before_every_caption_and_each_step_takes_an_order_of_its_tags(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    (wide, *others), text_encoder = sorted(pictures.glob("*.txt")), base_of(checkpoint).load_text_encoder(CPU)
    wide.write_text("one girl, red, green, blue", encoding="utf-8")
    settings = configured(
        checkpoint, tmp_path, folder=str(pictures), caption_prefix="sks ", shuffle_tags=9, keep_tags=1
    )
    dataset = filled(settings)
    texts = [f"sks one girl, {', '.join(tags)}" for tags in permutations(("red", "green", "blue"))]
    texts += [f"sks {' '.join(path.read_text(encoding='utf-8').split())}" for path in others]
    expected = torch.stack([each.tensors["context"][0] for each in text_encoder.encode(texts)])
    drawn: Counter[str] = Counter()
    for step in range(40):
        batch = dataset.batch(step, 4, seed=0, caption_dropout=0.0)
        again = dataset.batch(step, 4, slice(2, 4), seed=0, caption_dropout=0.0)
        assert torch.equal(batch.cond.tensors["context"][2:], again.cond.tensors["context"])
        for context in batch.cond.tensors["context"]:
            distance = (expected - context).abs().amax((1, 2))
            assert distance.min() < 1e-2
            drawn[texts[int(distance.argmin())]] += 1
    assert set(texts[6:]) <= set(drawn) and len(set(texts[:6]) & set(drawn)) >= 4
    one = configured(checkpoint, tmp_path, folder=str(pictures), caption_prefix="sks ", shuffle_tags=1, keep_tags=1)
    assert open_cached(one, FLOAT) is None
    assert {table.index.shape[1] for table in filled(one).tables} == {4}


def test_an_order_of_tags_keeps_all_tags_and_the_first_where_they_are() -> None:
    data = config.from_mapping(
        {
            "base": {"path": "tiny"},
            "data": {"folder": "x", "shuffle_tags": 50, "keep_tags": 2},
            "output": {"folder": "out"},
        }
    ).data
    orders = caption_variants(" a b,c ,, d, e, f,", data)
    assert {tuple(sorted(order.split(", "))) for order in orders} == {("a b", "c", "d", "e", "f")}
    assert all(order.startswith("a b, c, ") for order in orders) and len(set(orders)) == 6
    assert caption_variants("no tags", data) == ["no tags"] * 50
    assert caption_variants("a, b", replace(data, shuffle_tags=0, caption_prefix="")) == ["a, b"]


def test_prompts_are_drawn_with_their_prefix_and_trained_in_all_orders(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("d, c, b, a", encoding="utf-8")
    settings = {"prompts": str(tmp_path / "p.txt"), "draw": {"steps": 2}}
    plain, prefixed, shuffled = (
        rows(filled(configured(checkpoint, tmp_path / str(len(more)), **settings, **more)))[0]
        for more in ({}, {"caption_prefix": "sks"}, {"caption_prefix": "sks", "shuffle_tags": 3})
    )
    assert not torch.equal(plain[0], prefixed[0]) and torch.equal(prefixed[0], shuffled[0])
    assert not torch.equal(plain[3], prefixed[3])


def test_the_cache_knows_the_folders_repeats_its_notes_and_a_broken_link(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    pictures.rename(tmp_path / "3_all")
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "3_all").rename(folder / "3_all")
    (folder / ".hidden.png").touch()
    (folder / "broken.png").symlink_to(tmp_path / "gone")
    settings = configured(checkpoint, tmp_path, folder=str(folder), skip_bad=True)
    dataset = filled(settings)
    assert len(dataset) == 3 * 8 and {group.repeats for group in dataset.groups} == {3}
    cached = open_cached(settings, FLOAT)
    assert cached is not None and cached.survey.remarks() == "hidden: 1 (.hidden.png)" and cached.survey.seen == 9
    for spelling in (folder / ".." / "data", Path(os.path.relpath(folder))):
        assert open_cached(configured(checkpoint, tmp_path, folder=str(spelling), skip_bad=True), FLOAT) is not None
    (folder / "broken.png").unlink()
    assert open_cached(settings, FLOAT) is None


def test_a_full_store_writes_its_largest_kind_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 1000)
    found = store.Store(tmp_path / "rows")
    for k in range(60):
        found.add("ab"[k % 3 == 0], store.digest(b"%d" % k), {"x": torch.full((25,), float(k))})
        assert sum(len(each) for each in found._pending.values()) < 10
    found.flush()
    again = store.Store(tmp_path / "rows")
    for k in range(60):
        shard, row = again.locations[store.digest(b"%d" % k)]
        assert (store.open_shard(tmp_path / "rows" / shard)["x"][row] == k).all()
        assert again.kind(store.digest(b"%d" % k)) == "ab"[k % 3 == 0]
    assert len(list((tmp_path / "rows").iterdir())) >= 6


def test_rows_that_are_long_in_coming_are_written_before_the_shard_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = store.Store(tmp_path / "rows")
    found.add("a", store.digest(b"1"), {"x": torch.zeros(1)})
    assert list((tmp_path / "rows").iterdir()) == []
    monkeypatch.setattr(store, "SHARD_SECONDS", 0.0)
    found.add("a", store.digest(b"2"), {"x": torch.zeros(1)})
    assert len(store.Store(tmp_path / "rows").locations) == 2


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data import encode
from trajectory_consistency.trainer.data import store
store.SHARD_BYTES = 10_000  # many shards, so that many moments are between two
path = Path(sys.argv[1])
settings = config.load(path)
def shards():
    return len([p for p in settings.cache_folder.rglob("*.safetensors") if not p.name.startswith(".")])
real = store.Store._write
for wanted in (1, 3, 4, 9):  # each time killed when that many are there
    def write(rows, kind):
        real(rows, kind)
        if shards() >= wanted:
            os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child:
        store.Store._write = write
        encode.fill_cache(settings, torch.device("cpu"), torch.float32)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes to be killed are forked")
def test_killed_at_any_moment_and_started_again_it_ends_as_one_never_killed(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    for k in range(16):
        Image.new("RGB", (64, 64), (10 * k, 0, 255 - 10 * k)).save(pictures / f"more{k}.png")
        (pictures / f"more{k}.txt").write_text(f"number {k}", encoding="utf-8")
    expected = filled(configured(checkpoint, tmp_path / "whole", folder=str(pictures)))
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(values(checkpoint, tmp_path, folder=str(pictures))), encoding="utf-8")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True)
    assert killed.stdout.split() == ["-9"] * 4, killed.stderr
    settings = config.load(path)
    assert open_cached(settings, FLOAT) is None
    assert same(filled(settings), expected)


def test_the_cache_command_says_what_there_is_and_a_run_then_encodes_nothing(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "config.toml"
    settings = values(checkpoint, tmp_path, folder=str(pictures)) | {"training": {"batch": 4}}
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")
    assert main(["cache", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "8 pictures" in printed and "64x64" in printed and f"cached in {tmp_path / 'cache'}" in printed
    loads = Loads(monkeypatch)
    encode.load_or_encode(config.load(path), CPU, FLOAT)
    assert not loads.count
    for wrong in ("2/2", "x", "1", "-1/2"):
        assert main(["cache", str(path), f"--part={wrong}"]) == 2
        assert "write K/N" in capsys.readouterr().err


FILLED_TOGETHER = """
import os, sys, time, torch
from pathlib import Path
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data import cache, encode, store
from trajectory_consistency.trainer.models import open_checkpoint
def slowly(*arguments, save=store.save_checked, **options):
    save(*arguments, **options)
    time.sleep(0.02)  # so that the others write meanwhile
store.save_checked = cache.save_checked = slowly
store.SHARD_BYTES = 10_000  # many shards, so that many moments are between two
cpu, path = torch.device("cpu"), Path(sys.argv[1])
base = open_checkpoint(config.load(path).base)  # loaded here, so that no child has to import what that needs
base.load_autoencoder(cpu), base.load_text_encoder(cpu)
def fill(folder):
    encode.load_or_encode(config.load(path, [f"data.cache={folder}"]), cpu, torch.float32)
    os._exit(0)
for folder in sys.argv[2:]:
    children = [os.fork() or fill(folder) for _ in range(3)]
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_any_number_of_runs_may_fill_one_cache_at_once(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    path, caches = tmp_path / "config.toml", [tmp_path / f"cache{number}" for number in range(3)]
    path.write_text(tomli_w.dumps(values(checkpoint, tmp_path, folder=str(pictures))), encoding="utf-8")
    command = [sys.executable, "-c", FILLED_TOGETHER, str(path), *map(str, caches)]
    filled_together = subprocess.run(command, capture_output=True, text=True)
    assert filled_together.stdout.split() == ["0"] * 9, filled_together.stderr
    expected = filled(configured(checkpoint, tmp_path / "alone", folder=str(pictures)))
    for cache in caches:
        cached = open_cached(configured(checkpoint, tmp_path, folder=str(pictures), cache=str(cache)), FLOAT)
        assert cached is not None and same(cached.dataset, expected)
        assert not [file for file in cache.rglob("*") if file.name.startswith(".")]


def test_the_cache_lies_beside_the_data_where_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache_of(**data: object) -> Path:
        return config.from_mapping({"base": {"path": "tiny"}, "data": data, "output": {"folder": "out"}}).cache_folder

    (tmp_path / "shards").mkdir()
    (tmp_path / "prompts.txt").touch()
    monkeypatch.chdir(tmp_path)
    beside = tmp_path.resolve() / ".tcd-cache"
    assert cache_of(folder="pictures") == cache_of(folder="./shards/../pictures/") == beside
    assert cache_of(prompts="prompts.txt") == cache_of(sources=[{"path": "shards"}, {"path": "/x"}]) == beside
    assert cache_of(folder="shards/train-*.tar") == tmp_path.resolve() / "shards" / ".tcd-cache"
    assert cache_of(folder="pictures", cache="elsewhere") == Path("elsewhere")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    if sys.platform == "linux":
        assert cache_of(folder="pictures") == tmp_path / "own" / "trajectory-consistency"
    beside.mkdir()
    assert cache_of(folder="pictures") == beside, "what is cached there is used, though nothing can be added"


def test_a_changed_learning_rate_encodes_nothing(
    checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = values(checkpoint, tmp_path, folder=str(pictures), cache="")
    encode.load_or_encode(config.from_mapping(first), CPU, FLOAT)
    loads = Loads(monkeypatch)
    other = {**first, "training": {"lr": 1e-5}, "output": {"folder": str(tmp_path / "other")}}
    encode.load_or_encode(config.from_mapping(other), CPU, FLOAT)
    assert not loads.count


def test_a_damaged_index_is_written_anew(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    settings = configured(checkpoint, tmp_path, folder=str(pictures))
    first = [tuple(tensor.clone() for tensor in row) for row in rows(filled(settings))]
    (index,) = (tmp_path / "cache").glob("index-*.safetensors")
    content = bytearray(index.read_bytes())
    content[-1] ^= 0x40  # a row far behind the end of its shard
    index.write_bytes(content)
    assert open_cached(settings, FLOAT) is None and "the data" not in input_fingerprints(settings, FLOAT)
    again = rows(filled(settings))
    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )
