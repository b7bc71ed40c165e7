"""Where captioned pictures come from, and what is said of those that are not whole."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.data.buckets import Size
from trajectory_consistency.trainer.data.samples import Sample
from trajectory_consistency.trainer.data.sources import (
    PictureFolder,
    PromptFile,
    Source,
    TarShards,
    open_sources,
)
from trajectory_consistency.trainer.data.survey import GroupKey, bucket_table, data_report, make_groups, survey
from trajectory_consistency.trainer.errors import UserError


def png(color: str = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, name: str, caption: str | None = "a caption", data: bytes | None = None) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if data is None else data)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def configured(tmp_path: Path, **data: object) -> config.Config:
    values = {"resolution": 64, **data}
    return config.from_mapping({"base": {"path": "tiny"}, "data": values, "output": {"folder": str(tmp_path / "out")}})


def opened(**data: object) -> list[Source]:
    return open_sources(config.from_mapping({"base": {"path": "tiny"}, "data": data, "output": {"folder": "out"}}).data)


def named(samples: list[Sample]) -> list[tuple[str, str, str]]:
    """Name, caption, and problem or note of each sample."""
    return [(sample.name, sample.caption, sample.problem or sample.note) for sample in samples]


def everything(source: Source) -> list[tuple[str, str, str]]:
    assert not isinstance(source, PromptFile)
    return named(list(source.samples()))


def test_a_folder_is_read_with_those_within_it_and_hidden_files_are_not(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "  of b\n")
    write(tmp_path, "within/deep/a.JPG", "\ufeffof a")
    write(tmp_path, "._b.png", "what another system left")
    write(tmp_path, "c.png", None)
    write(tmp_path, "notes.pdf", None)
    (source,) = opened(folder=str(tmp_path))
    assert isinstance(source, PictureFolder)
    samples = list(source.samples())
    assert named(samples) == [
        ("._b.png", "", "hidden"),
        ("._b.txt", "", "hidden"),
        ("b.png", "of b", ""),
        ("c.png", "", "have no caption"),
        ("notes.pdf", "", "neither pictures nor captions"),
        ("within/deep/a.JPG", "of a", ""),
    ]
    assert samples[2].read() == png() and [each.left_out for each in samples] == [True, True, False, False, True, False]


def test_a_folder_with_metadata_is_read_by_it(tmp_path: Path) -> None:
    for name in ("a.png", "more/b.png", "unlisted.png"):
        write(tmp_path, name, None)
    lines = [{"file_name": "more/b.png", "text": "of b", "score": 5}, {"file_name": "a.png"}, {"file_name": "no.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    (source,) = opened(folder=str(tmp_path))
    assert isinstance(source, PictureFolder)
    assert named(list(source.samples())) == [
        ("a.png", "", "have no caption"),
        ("more/b.png", "of b", ""),
        ("no.png", "", "have no caption"),
        ("unlisted.png", "", "have no caption"),
    ]


@pytest.mark.parametrize(
    "line", ["{", "[]", "5", '{"text": "x"}', '{"file_name": 5, "text": "x"}', '{"file_name": "a", "text": 5}']
)
def test_metadata_that_is_none_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    write(tmp_path, "a.png", None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line, encoding="utf-8")
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2: "):
        list(opened(folder=str(tmp_path))[0].samples())  # type: ignore[union-attr]


def test_shards_are_read_in_their_order_by_the_names_of_webdataset(tmp_path: Path) -> None:
    one = {
        "x/1.jpg": b"one",
        "x/1.txt": b" of one ",
        "x/1.json": b"{}",
        "2.txt": b"two",
        "2.Seg.png": b"",
        "2.PNG": b"2",
    }
    write_tar(tmp_path / "s-0.tar", one)
    write_tar(tmp_path / "s-1.tar", {"3.webp": b"three", "4.txt": b"alone", "5.png": b"five", "5.txt": b"\xff"})
    write_tar(tmp_path / "other.tar", {"9.png": b"nine"})
    (source,) = opened(folder=str(tmp_path / "s-*.tar"))
    assert isinstance(source, TarShards)
    samples = list(source.samples())
    assert named(samples) == [
        ("s-0.tar/2.Seg.png", "", "further pictures of a sample, such as 1.mask.png beside 1.png"),
        ("s-0.tar/x/1.json", "", "neither pictures nor captions"),
        ("s-0.tar/x/1.jpg", "of one", ""),
        ("s-0.tar/2.PNG", "two", ""),
        ("s-1.tar/4.txt", "", "captions without a picture"),
        ("s-1.tar/3.webp", "", "have no caption"),
        ("s-1.tar/5.png", "", "have a caption that is not UTF-8"),
    ]
    assert [samples[k].read() for k in (2, 3, 5)] == [b"one", b"2", b"three"]


@pytest.mark.parametrize("keep", [100, 700, 1700, 2500])
def test_of_a_truncated_shard_complete_samples_are_read_and_the_rest_is_reported(tmp_path: Path, keep: int) -> None:
    write_tar(tmp_path / "s.tar", {"1.png": b"x" * 600, "1.txt": b"one", "2.png": b"y" * 600, "2.txt": b"two"})
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:keep])
    (source,) = opened(folder=str(tmp_path / "s.tar"))
    samples = list(source.samples())  # type: ignore[union-attr]
    assert samples[-1].problem == "are tar files that end or break off early"
    assert all(sample.read() in (b"x" * 600, b"y" * 600) for sample in samples[:-1])


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_disjoint_and_together_complete(tmp_path: Path, parts: int) -> None:
    for k in range(5):
        write(tmp_path / "folder", f"{k}.png")
        write(tmp_path / "listed", f"{k}.png", None)
        write_tar(tmp_path / "tars" / f"{k}.tar", {f"{k}{each}.png": b"" for each in "abc"})
    lines = (json.dumps({"file_name": f"{k}.png", "text": "x"}) for k in range(4))
    (tmp_path / "listed" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for path in ("folder", "listed", "tars/*.tar"):
        (source,) = opened(folder=str(tmp_path / path))
        assert not isinstance(source, PromptFile)
        names = [sample.name for part in range(parts) for sample in source.samples(part, parts)]
        assert sorted(names) == sorted(sample.name for sample in source.samples()) and len(names) in (5, 15)


def test_prompts_are_the_lines_that_are_not_blank(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n  two # not a comment  \r\n", encoding="utf-8")
    (source,) = opened(prompts=str(tmp_path / "p.txt"))
    assert isinstance(source, PromptFile) and source.captions() == ["one", "two # not a comment"]
    long = b"a fox\n" + b"word " * 2001
    for content, message in (
        (b" \n", "has no prompts"),
        (b"\xff\xfe", "is not UTF-8"),
        (long, "10004 characters, 'word "),
    ):
        (tmp_path / "p.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            source.captions()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "none",
            r"there is no data folder at .*none \(data.sources\[1\].path may be a folder of pictures, .tar shards",
        ),
        ("none.tar", r"data.sources\[1\].path is '.*none.tar', but no such .tar file is there"),
        ("*.tar", r"data.sources\[1\].path is .*no such .tar file"),
        ("none.txt", r"there is no data folder at"),
        ("empty", r"\(data.sources\[1\].path\) has no pictures in it"),
    ],
)
def test_a_source_that_is_not_there_is_named_by_its_key(tmp_path: Path, path: str, message: str) -> None:
    write(tmp_path / "good", "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        opened(sources=[{"path": str(tmp_path / "good")}, {"path": str(tmp_path / path)}])


def bad(tmp_path: Path) -> None:
    """Four pictures of which one is good, and a shard with a good one and a damaged one."""
    write(tmp_path / "f", "good.png")
    write(tmp_path / "f", "cut.png", data=png()[:60])
    write(tmp_path / "f", "small.png", data=png(size=(20, 64)))
    write(tmp_path / "f", "bare.png", None, data=b"")
    write_tar(tmp_path / "t.tar", {"1.png": png(), "1.txt": b"x", "2.png": b"no picture", "2.txt": b"x"})


def test_everything_that_is_wrong_is_said_together_with_counts_and_names(tmp_path: Path) -> None:
    bad(tmp_path)
    sources = [{"path": str(tmp_path / "f")}, {"path": str(tmp_path / "t.tar")}]
    with pytest.raises(UserError) as error:
        survey(configured(tmp_path, sources=sources))
    assert re.match(
        "1 of 6 pictures are smaller than every bucket: small.png; "
        r"2 of 6 pictures do not decode: cut.png \(image file is truncated.*\), t.tar/2.png \(not a picture of a known "
        r"format\); 1 of 6 pictures have no caption: bare.png. Repair them",
        str(error.value),
    )
    found = survey(configured(tmp_path, sources=sources, skip_bad=True))
    assert found.groups == {(0, 1, Size(64, 64)): 1, (1, 1, Size(64, 64)): 1} and found.pictures == 2
    report = data_report(found, configured(tmp_path, sources=sources))
    assert "left out: 1 of 6 pictures are smaller" in report and "1 pictures" in report


@pytest.mark.parametrize("empty", ["", " \n", "\ufeff"])
def test_a_caption_that_says_nothing_is_a_missing_one(tmp_path: Path, empty: str) -> None:
    write(tmp_path / "folder", "a.png", empty)
    write(tmp_path / "listed", "b.png", None)
    (tmp_path / "listed" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "b.png", "text": empty.strip("\ufeff")}), encoding="utf-8"
    )
    write_tar(tmp_path / "t.tar", {"c.png": png(), "c.txt": empty.encode()})
    paths = (tmp_path / "folder", tmp_path / "listed", tmp_path / "t.tar")
    sources = [{"path": str(path)} for path in paths]
    with pytest.raises(UserError, match=r"3 of 3 pictures have no caption: a\.png, b\.png, t\.tar/c\.png"):
        survey(configured(tmp_path, sources=sources))
    found = survey(configured(tmp_path, sources=[*sources, {"path": str(good(tmp_path))}], skip_bad=True))
    assert found.pictures == 1


def good(tmp_path: Path) -> Path:
    """A folder with one picture that can be used."""
    write(tmp_path / "good", "good.png")
    return tmp_path / "good"


def test_a_file_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 pictures cannot be read: gone\.png"):
        survey(configured(tmp_path, folder=str(tmp_path)))


def test_names_are_a_few_and_the_rest_a_number(tmp_path: Path) -> None:
    for k in range(8):
        write(tmp_path, f"{k}.png", None)
    with pytest.raises(UserError, match=r"8 of 8 pictures have no caption: 0.png, 1.png, .* 4.png and 3 more"):
        survey(configured(tmp_path, folder=str(tmp_path)))


def test_the_bucket_table_counts_what_an_epoch_shows(tmp_path: Path) -> None:
    for k in range(5):
        write(tmp_path / "a", f"{k}.png", data=png(size=(300, 80)))
        write(tmp_path / "b", f"{k}.png", data=png(size=(200, 200)))
    sources = [{"path": str(tmp_path / "a"), "repeats": 2}, {"path": str(tmp_path / "b")}]
    settings = configured(tmp_path, sources=sources, resolution=128)
    lines = [line.split() for line in bucket_table(survey(settings), settings, 4).splitlines()]
    assert lines[1:] == [["128x128", "5", "5", "2", "3"], ["256x64", "5", "10", "3", "2"]]


def test_weights_are_shares_of_an_epoch(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 10)):
        for k in range(count):
            write(tmp_path / name, f"{k}.png")
    sources = [{"path": str(tmp_path / "a"), "weight": 1}, {"path": str(tmp_path / "b"), "weight": 3}]
    settings = configured(tmp_path, sources=sources)
    lines = bucket_table(survey(settings), settings, 1).splitlines()
    assert lines[1].split() == ["64x64", "12", "12", "12", "0"]
    groups = make_groups(settings.data, survey(settings).groups.items())
    assert [group.shown(1) for group in groups] == [3, 9]


def test_files_of_a_folder_and_members_of_a_shard_are_read_by_one_rule(tmp_path: Path) -> None:
    files = {
        **{"A.PNG": png(), "A.TXT": b"suffixes in capitals", "b.jfif": png(), "b.caption": b"of b", "b.heic": b""},
        **{"photo.v1.2.png": png(), "photo.v1.2.txt": b"dots", "00000.input.png": png(), "00000.txt": b"webdataset"},
        **{"2.png": png(), "2.txt": b"two", "2.seg.png": png(), "2.caption": b"another"},
        **{"alone.txt": b"x", "only.jxl": b"", "only.txt": b"x", "bare.heic": b"", "x.json": b"{}"},
        **{".trash/t.png": png(), "sub/.ipynb_checkpoints/i.png": png(), "__MACOSX/._2.png": b"", "Thumbs.db": b""},
        **{"e\u0301.png": png(), "\u00e9.txt": b"one letter, spelled in two ways"},
    }
    for name, data in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    write_tar(tmp_path / "s.tar", {f"./{name}": data for name, data in files.items()})
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "folder", ".")
    sources = opened(sources=[{"path": str(tmp_path / name)} for name in ("folder", "s.tar", "s.tar.gz")])
    folder, shard, compressed = (sorted(everything(source)) for source in sources)
    assert sorted((f"s.tar/{name}", *rest) for name, *rest in folder) == shard
    assert sorted((f"s.tar.gz/{name}", *rest) for name, *rest in folder) == compressed
    further, second = "further pictures of a sample, such as 1.mask.png beside 1.png", "captions of a picture that has"
    copy = "in a format that is not read, beside a picture of the same name"
    assert folder == [
        *((f"{name}", "", "hidden") for name in (".trash/t.png",)),
        ("00000.input.png", "webdataset", ""),
        ("2.caption", "", f"{second} another caption"),
        ("2.png", "two", ""),
        ("2.seg.png", "", further),
        ("A.PNG", "suffixes in capitals", ""),
        ("Thumbs.db", "", "neither pictures nor captions"),
        ("__MACOSX/._2.png", "", "hidden"),
        ("alone.txt", "", "captions without a picture"),
        ("b.heic", "", copy),
        ("b.jfif", "of b", ""),
        ("bare.heic", "", "are in a format that is not read"),
        ("e\u0301.png", "one letter, spelled in two ways", ""),
        ("only.jxl", "", "are in a format that is not read"),
        ("photo.v1.2.png", "dots", ""),
        ("sub/.ipynb_checkpoints/i.png", "", "hidden"),
        ("x.json", "", "neither pictures nor captions"),
    ]


def test_what_is_left_out_is_counted_and_named_in_every_report(tmp_path: Path) -> None:
    write(tmp_path / "f", "a.png", "two\n\nlines")
    write(tmp_path / "f", ".trash/b.png")
    write(tmp_path / "f", "a.psd", None)
    write_tar(tmp_path / "s.tar", {"1.png": png(), "1.txt": b"x", "__MACOSX/1.png": b""})
    settings = configured(tmp_path, sources=[{"path": str(tmp_path / "f")}, {"path": str(tmp_path / "s.tar")}])
    found = survey(settings)
    assert found.seen == found.pictures == 2 and not found.problems
    halves = survey(settings, 0, 2)
    halves.merge(survey(settings, 1, 2))
    assert halves.notes == found.notes and halves.groups == found.groups
    assert data_report(found, settings).splitlines()[-1] == (
        "noted: captions of several lines, joined into one line: 1 (a.png); hidden: 3 (.trash/b.png, .trash/b.txt, "
        "s.tar/__MACOSX/1.png); in a format that is not read, beside a picture of the same name: 1 (a.psd)"
    )


def test_lines_of_a_caption_are_joined(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "\ufeff a red square \r\n\r\n  on a wall\n")
    assert everything(*opened(folder=str(tmp_path))) == [
        ("a.png", "a red square on a wall", "captions of several lines, joined into one line")
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes are not for everybody on Windows")
def test_links_are_followed_once_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "a.png")
    write(tmp_path / "data", "z/c.png")
    write(tmp_path / "data", "b.png", "x")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "z" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "another").symlink_to(tmp_path / "data" / "z")
    for name in ("broken.png", "nowhere", "b.caption"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    (tmp_path / "data" / "pipe.txt").write_text("of a pipe", encoding="utf-8")
    found = survey(configured(tmp_path, folder=str(tmp_path / "data"), skip_bad=True))
    assert found.pictures == 3 and found.seen == 6
    assert found.complaints() == (
        "3 of 6 pictures cannot be read: broken.png (No such file or directory), nowhere (No such file or directory), "
        "pipe.png (not a regular file); 1 of 6 pictures have no caption: broken.png"
    )
    assert found.remarks() == (
        "captions of a picture that has another caption: 1 (b.caption); "
        "folders that are read under another name, because of links: 2 (another, z/loop)"
    )
    (tmp_path / "data" / "b.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 6 pictures have a caption that cannot be read: b\.png"):
        survey(configured(tmp_path, folder=str(tmp_path / "data")))


def test_links_in_a_shard_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("1.png", b""), ("2.png", tarfile.SYMTYPE), ("3.png", tarfile.LNKTYPE), ("1.txt", b"")):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = 1 - bool(kind), kind or tarfile.REGTYPE, "1.png" if kind else ""
            tar.addfile(member, io.BytesIO(b"x"))
    assert everything(*opened(folder=str(tmp_path / "s.tar"))) == [
        ("s.tar/2.png", "", "are links, which are not followed in tar files"),
        ("s.tar/3.png", "", "are links, which are not followed in tar files"),
        ("s.tar/1.png", "x", ""),
    ]


def test_names_of_shards_are_taken_as_written_before_they_are_patterns(tmp_path: Path) -> None:
    for name in ("[a]/s-008.tar", "[a]/s-009.tar", "[a]/s-010.tar", "a/s-008.tar", "[a]/t[1].tar", "[a]/x.tgz"):
        write_tar(tmp_path / name, {"1.png": b"", "1.txt": b"x"})

    def paths(pattern: str) -> list[str]:
        (source,) = opened(folder=str(tmp_path / pattern))
        return [path.relative_to(tmp_path).as_posix() for path in source.files()]

    three = [f"[a]/s-{number}.tar" for number in ("008", "009", "010")]
    assert paths("[a]/s-*.tar") == paths("[a]/s-{008..010}.tar") == paths("[[]a]/s-0[01][890].tar") == three
    assert paths("[a]/t[1].tar") == ["[a]/t[1].tar"] and paths("[a]/x.tgz") == ["[a]/x.tgz"]
    with pytest.raises(UserError, match=r"no such .tar file is there: .*s-011\.tar"):
        paths("[a]/s-{008..012}.tar")


@pytest.mark.parametrize("keep", [10, 150, -30, -6])
def test_a_compressed_shard_that_breaks_off_is_named(tmp_path: Path, keep: int) -> None:
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        write(tmp_path, "1.png", data=os.urandom(300))
        for name in ("1.png", "1.txt"):
            tar.add(tmp_path / name, name)
    path = tmp_path / "s.tar.gz"
    path.write_bytes(path.read_bytes()[:keep])
    assert everything(*opened(folder=str(path)))[-1] == ("s.tar.gz", "", "are tar files that end or break off early")


@pytest.mark.parametrize("spelling", ["0.png", "./0.png", "sub/../0.png", ".\\0.png", "{folder}/0.png", "{link}/0.png"])
def test_a_picture_in_metadata_is_the_same_however_it_is_spelled(tmp_path: Path, spelling: str) -> None:
    write(tmp_path / "real", "0.png", None)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    name = spelling.format(folder=tmp_path / "real", link=tmp_path / "link")
    (tmp_path / "real" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}), encoding="utf-8")
    opened_by = "link" if "{folder}" in spelling or "{link}" in spelling else "real"
    (source,) = opened(folder=str(tmp_path / opened_by))
    assert everything(source) == [("0.png", "x", "")]
    assert {path.name for path in source.files()} == {"0.png", "metadata.jsonl"}


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "..\\secret.png", "sub/../../secret.png", ".", "a\0b"]
)
def test_names_in_metadata_stay_inside_their_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path, "secret.png", None)
    write(tmp_path / "data", "a.png", None)
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: file_name is .* not a file in .*data: move the"):
        opened(folder=str(tmp_path / "data"))


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
@pytest.mark.parametrize("file", ["metadata.jsonl", "train/metadata.jsonl", "metadata.csv", "a/b/metadata.csv"])
def test_metadata_files_may_be_in_subfolders_and_have_captions_under_three_keys(
    tmp_path: Path, file: str, key: str
) -> None:
    path = tmp_path / file
    for name in ("0.png", "1.png"):
        write(path.parent, name, "another caption, which is not read" if name == "0.png" else "own")
    rows = f'file_name,size,{key}\n0.png,5,"a, b"\n' if path.suffix == ".csv" else ""
    path.write_text(rows or json.dumps({"file_name": "0.png", "size": 5, key: "a, b"}), encoding="utf-8-sig")
    (source,) = opened(folder=str(tmp_path))
    where = path.parent.relative_to(tmp_path)
    assert everything(source) == [
        ((where / "0.png").as_posix(), "a, b", ""),
        ((where / "0.txt").as_posix(), "", "captions of a picture that has another caption"),
        ((where / "1.png").as_posix(), "own", ""),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"file_name": "0.png", "description": "x"}',
            "has no captions: its keys are file_name, description; name that",
        ),
        ('{"image": "0.png", "text": "x"}', "line 1: there is no file_name; the keys are image, text"),
        ('{"file_name": "0.png", "text": "\\ud800"}', "line 1: text is .* not valid Unicode"),
        ("[" * 100_000, "line 1: not a JSON object"),
    ],
)
def test_metadata_without_captions_are_refused_with_the_keys_that_are_there(
    tmp_path: Path, content: str, message: str
) -> None:
    write(tmp_path, "0.png", None)
    (tmp_path / "metadata.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        opened(folder=str(tmp_path))


def test_the_number_of_a_subfolder_is_how_often_its_pictures_are_shown(tmp_path: Path) -> None:
    for name in ("10_cat/a.png", "10_cat/deep/b.png", "3_dog/c.png", "plain/d.png", "2024_trip/e.png", "007_x/f.png"):
        write(tmp_path / "data", name)
    write(tmp_path / "data", "0_off/g.png")
    write(tmp_path / "data", "plain/5_inner/h.png")
    settings = configured(tmp_path, sources=[{"path": str(tmp_path / "data"), "repeats": 2}])
    found = survey(settings)
    groups = make_groups(settings.data, sorted(found.groups.items()))
    assert [(group.pictures, group.shown(1)) for group in groups] == [(4, 8), (1, 6), (2, 40)]
    assert data_report(found, settings).splitlines()[1:] == [
        "                   1 of them in folders 3_...: 3 times each",
        "                   2 of them in folders 10_...: 10 times each",
        "noted: in a folder 0_name, which is shown 0 times: 1 (0_off/g.png)",
    ]
    weighted = configured(tmp_path, sources=[{"path": str(tmp_path / "data"), "weight": 2}])
    shares = [group.shown(27) for group in make_groups(weighted.data, sorted(found.groups.items()))]
    assert shares == [4 * 7, 3 * 7, 20 * 7]


@pytest.mark.parametrize(("counts", "weights"), [((98, 58), (1, 155)), ((49, 29), (1, 155)), ((4, 6), (0.1, 0.2))])
def test_shares_of_weights_lose_no_picture_to_rounding(counts: tuple[int, int], weights: tuple[float, float]) -> None:
    values = {"sources": [{"path": str(number), "weight": weight} for number, weight in enumerate(weights)]}
    data = config.from_mapping({"base": {"path": "tiny"}, "data": values, "output": {"folder": "out"}}).data
    keys = [GroupKey(number, 1, Size(64, 64)) for number in range(2)]
    groups = make_groups(data, zip(keys, counts, strict=True))
    assert sum(group.shown(1) for group in groups) == sum(counts)
    epochs = round(sum(weights) * 10)
    each = [group.shown(epochs) for group in groups]
    assert each == [round(weight * 10) * sum(counts) for weight in weights]


def test_repeats_count_as_they_are_written(tmp_path: Path) -> None:
    data = configured(tmp_path, sources=[{"path": "a", "repeats": 0.3}, {"path": "b", "repeats": 1.1}]).data
    keys = [GroupKey(0, 1, Size(64, 64)), GroupKey(0, 7, Size(64, 64)), GroupKey(1, 1, Size(64, 64))]
    groups = make_groups(data, zip(keys, (10, 10, 30), strict=True))
    assert [group.shown(1) for group in groups] == [3, 21, 33]


def test_a_caption_that_is_some_other_file_is_not_encoded(tmp_path: Path) -> None:
    write(tmp_path, "0.png", "x" * 10_000)
    write(tmp_path, "1.png", "x" * 10_001)
    (source,) = opened(folder=str(tmp_path))
    problems = {sample.name: sample.problem for sample in source.samples()}  # type: ignore[union-attr]
    assert problems == {"0.png": "", "1.png": "have a caption of more than 10000 characters"}
