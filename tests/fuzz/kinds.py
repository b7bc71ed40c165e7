"""What people bring, each kind as a function that writes a mangled one into an empty folder and reads it.

A reader returns, or raises UserError or RunError. What a kind asserts of the result is what later code relies on.
"""

import atexit
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any
from unittest.mock import patch

import tomli_w
import torch
from mangle import (
    DEEP,
    Weights,
    damaged,
    damaged_json,
    damaged_tar,
    damaged_tree,
    damaged_weights,
    odd_caption,
    odd_value,
)
from PIL import Image
from safetensors import SafetensorError, safe_open

import trajectory_consistency
from tiny_base import random_dataset, with_adapter, write_inputs
from trajectory_consistency.tcd import PEFT_CONFIG_KEY, AdapterWeights, to_kohya
from trajectory_consistency.tcd.adapter import FILE
from trajectory_consistency.tcd.target_time import PREFIX
from trajectory_consistency.trainer import preflight
from trajectory_consistency.trainer.checked_file import save_checked
from trajectory_consistency.trainer.config import settings as config
from trajectory_consistency.trainer.config.base import BaseConfig, BaseLora
from trajectory_consistency.trainer.data import pictures
from trajectory_consistency.trainer.data.cache import cache_paths, input_fingerprints, open_cached
from trajectory_consistency.trainer.data.encode import load_or_encode
from trajectory_consistency.trainer.data.store import Store
from trajectory_consistency.trainer.data.survey import data_report, survey
from trajectory_consistency.trainer.errors import RunError, UserError
from trajectory_consistency.trainer.files.adapter_weights import file_tensors, start_from, using_file
from trajectory_consistency.trainer.files.convert import convert
from trajectory_consistency.trainer.files.describe_file import describe_file
from trajectory_consistency.trainer.files.merge import merge
from trajectory_consistency.trainer.lora_file import read_lora
from trajectory_consistency.trainer.models import open_checkpoint
from trajectory_consistency.trainer.models.unet.base_loras import MergedLoras
from trajectory_consistency.trainer.models.unet.checkpoint import TINY_PATH, UNetCheckpoint
from trajectory_consistency.trainer.models.unet.model import UNetModel
from trajectory_consistency.trainer.training.checkpoint import Checkpoints
from trajectory_consistency.trainer.training.loop import Training, _resume
from trajectory_consistency.trainer.training.processes import ALONE
from trajectory_consistency.trainer.views.report import write_report

CPU, F32 = torch.device("cpu"), torch.float32


def _shared_folder() -> Path:
    """Make a folder for the inputs that all cases of a kind begin with; it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---- LoRA files


@cache
def _loras() -> tuple[Weights, ...]:
    """A file as the trainer writes it, with an embedding; one of PEFT; one with DoRA, Tucker form and text weights."""
    model = _model()
    tensors = {name: each.clone() for name, each in file_tensors(model, _new_weights(model)).items()}
    embedding = {name: each for name, each in tensors.items() if name.startswith(PREFIX)}
    kohya = {name: each.half() for name, each in tensors.items() if name not in embedding}
    peft = {}
    for path in [path for path, _ in _new_weights(model).items()][:6]:
        name = "lora_unet_" + path.replace(".", "_")
        down, up = kohya[f"{name}.lora_down.weight"].float(), kohya[f"{name}.lora_up.weight"].float()
        peft |= {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    known = {"tcd.steps": "4", "tcd.eta": "0.3", "tcd.cfg": "1.0", "tcd.shift": "3", "tcd.family": "SD15"}
    known |= {"tcd.target_time": "s", "tcd.base_loras": "a at 1", "modelspec.architecture": "tiny-sd/lora"}
    settings = {"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {"to_q": 4}, "unet.use_rslora": False}
    dora = {name: each for name, each in kohya.items() if "attn" in name}
    dora |= {f"{name.removesuffix('.alpha')}.dora_scale": torch.ones(4, 1) for name in dora if name.endswith(".alpha")}
    dora |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 32)}
    dora |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(128, 4)}
    return (
        Weights.of(kohya | embedding, known),
        Weights.of(kohya, known),
        Weights.of(peft, {PEFT_CONFIG_KEY: json.dumps(settings)}),
        Weights.of(dora, {"ss_base_model_version": "sd_v1"}),
    )


@cache
def _model() -> UNetModel:
    return UNetCheckpoint(BaseConfig(path="tiny")).load(F32, CPU)


def _new_weights(model: UNetModel) -> AdapterWeights:
    return model.new_weights(rank=4, alpha=2.0, seed=0, targets=("to_q", "conv1"), target_input="s")


def _write_lora(rng: Random, folder: Path) -> Path:
    path = folder / "lora.safetensors"
    path.write_bytes(damaged_weights(rng.choice(_loras()), rng))
    return path


def inspect_lora(rng: Random, folder: Path) -> None:
    """`tcd-train inspect`, and a LoRA on the base."""
    path = _write_lora(rng, folder)
    assert describe_file(path)
    MergedLoras([BaseLora(path=str(path))], "tiny")


def export_lora(rng: Random, folder: Path) -> None:
    """`tcd-train export`: what it writes can be read, and what it refuses is not there."""
    path, target = _write_lora(rng, folder), folder / "new.safetensors"
    try:
        if rng.random() < 0.1:
            merge(path, TINY_PATH, target, strength=rng.choice((1.0, 0.0, -1e30)))
            UNetCheckpoint(BaseConfig(path=str(target))).load(F32, CPU)
        else:
            naming = rng.choice(("kohya", "peft"))
            convert(path, target, naming=naming, dtype=rng.choice((torch.float16, torch.bfloat16, torch.float32)))
            read_lora(target)
    except (UserError, RunError):
        assert not target.exists(), "it was refused, and is there"
        raise


def start_from_lora(rng: Random, folder: Path) -> None:
    """`adapter.start_from`, and the LoRA of `tcd-train sample`."""
    path = _write_lora(rng, folder)
    if rng.random() < 0.5:
        start_from(_model(), _new_weights(_model()), path)
        return
    with using_file(_model(), path):
        assert _model().adapter.state == FILE


def node_lora(rng: Random, folder: Path) -> None:
    """The header as TCDLoraLoader reads it, in ComfyUI."""
    path = _write_lora(rng, folder)
    lora_file = _nodes_module("lora_file")
    with said_by_nodes():
        try:  # as nodes/host/lora_files.py, which needs the host
            with safe_open(path, framework="pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise UserError(str(error)) from error
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        lora = lora_file.LoraFile("x.safetensors", lora_file.FileStamp("x", 0, 0), tensors, metadata)
        assert lora.base_model()
        settings = lora.recommended_settings()
        assert 1 <= settings.steps <= 50 and 0 <= settings.eta <= 1 and math.isfinite(settings.cfg)
        lora.differences("SD15", 3.0)
        to_kohya(lora.lora_tensors, lora.alpha)


@contextmanager
def said_by_nodes() -> Iterator[None]:
    """Take a ValueError of the nodes' own for a UserError; one of a library has another class."""
    try:
        yield
    except ValueError as error:
        raise (UserError(str(error)) if type(error) is ValueError else error) from error


@cache
def _nodes_module(name: str) -> ModuleType:
    """Import a module of nodes/ that needs no ComfyUI, without the package, which does."""
    package = ModuleType("trajectory_consistency.nodes")
    package.__path__ = [str(Path(trajectory_consistency.__file__).parent / "nodes")]
    with patch.dict(sys.modules, {package.__name__: package}):
        return import_module(f"{package.__name__}.{name}")


# ---- bases


@cache
def _base() -> Weights:
    with safe_open(TINY_PATH, "pt") as file:
        return Weights.of({name: file.get_tensor(name) for name in file.keys()}, {"modelspec.prediction_type": "eps"})  # noqa: SIM118


def _use_base(rng: Random, path: Path) -> None:
    checkpoint = open_checkpoint(BaseConfig(path=str(path), engine="diffusers"))
    checkpoint.check_encoders()
    assert checkpoint.describe() and checkpoint.fingerprints()
    if rng.random() < 0.5:
        checkpoint.load(F32, CPU)
        checkpoint.load_text_encoder(CPU)
        checkpoint.load_autoencoder(CPU)


def base_file(rng: Random, folder: Path) -> None:
    """A single-file checkpoint, opened and perhaps loaded."""
    path = folder / "base.safetensors"
    path.write_bytes(damaged_weights(_base(), rng))
    _use_base(rng, path)


@cache
def _folder_of_base() -> Path:
    """The tiny base as a diffusers folder."""
    folder = _shared_folder()
    checkpoint = UNetCheckpoint(BaseConfig(path="tiny"))
    source: Any = checkpoint._source
    source.unet(F32).save_pretrained(folder / "unet")
    source.vae("tiny").save_pretrained(folder / "vae")
    next(source.text_encoder().models()).save_pretrained(folder / "text_encoder")
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085}
    scheduler |= {"beta_end": 0.012, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def base_folder(rng: Random, folder: Path) -> None:
    """A diffusers folder, one of whose files is damaged."""
    path = folder / "base"
    shutil.copytree(_folder_of_base(), path, copy_function=os.link)
    file = rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    content = file.read_bytes()
    file.unlink()  # a link to the file that all share
    if rng.random() < 0.1:
        return _use_base(rng, path)
    is_json = file.suffix == ".json"
    file.write_bytes(damaged_json(json.loads(content), rng) if is_json else damaged(content, rng))
    return _use_base(rng, path)


# ---- configurations


@cache
def _settings() -> dict[str, Any]:
    values = config.from_mapping(
        {
            "base": {"path": "tiny", "loras": [{"path": "a.safetensors"}]},
            "data": {"sources": [{"path": "pictures", "weight": 1.0}, {"path": "s/*.tar", "weight": 2.0}]},
            "preview": {"prompts": ["a fox"]},
            "output": {"folder": "out"},
        }
    )
    return asdict(values)


def configuration(rng: Random, folder: Path) -> None:
    """A TOML file with overrides; one that is valid comes back equal from its own text."""
    path = folder / "config.toml"
    if rng.random() < 0.1:
        path.write_text(f"[data]\nfolder = {'[' * DEEP}", encoding="utf-8")
    else:
        path.write_bytes(_toml(damaged_tree(_settings(), rng), rng))
    keys = ("training.steps", "data", "base.path", "a.b.c.d", "method.phases", "", "output.folder", "data.sources")
    overrides = [f"{rng.choice(keys)}={odd_value(rng)}" for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    read = config.load(path, overrides)
    again = folder / "again.toml"
    again.write_text(read.to_toml(), encoding="utf-8")
    assert config.load(again) == read


def _toml(values: dict[str, Any], rng: Random) -> bytes:
    try:
        text = tomli_w.dumps(values).encode()
    except (TypeError, ValueError, AttributeError):  # it has no TOML
        text = tomli_w.dumps(_settings()).encode()
    return damaged(text, rng) if rng.random() < 0.4 else text


def paths(rng: Random, folder: Path) -> None:
    """Paths in a valid configuration that no file system has, or that name something of another kind."""
    (folder / "file.txt").write_text("a fox\n")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "bad.tar").symlink_to(folder / "gone")
    odd = ("a\0b", "x" * 5000, "~nobody-here/x", str(folder), "[", "**", "\ud800", "", " ", "/dev/null", "/dev/zero")
    inside = ("file.txt", "empty", "pipe.txt", "loop", "bad.tar", "file.txt/x", "*.tar", "[a.tar", "{0..99999999}.tar")

    def path() -> str:
        return rng.choice(odd) if rng.random() < 0.5 else str(folder / rng.choice(inside))

    values = {
        "base": {"path": path(), "engine": "diffusers", **({"vae": path()} if rng.random() < 0.5 else {})},
        "data": {rng.choice(("folder", "prompts")): path()},
        "adapter": {"start_from": path()},
        "output": {"folder": str(folder / "out")},
    }
    if rng.random() < 0.7:
        values["base"]["path"] = "tiny"
    read = config.from_mapping(values)
    open_checkpoint(read.base)
    survey(read)
    preflight.output_conflict(read)


# ---- data


@cache
def _pictures() -> dict[str, bytes]:
    rng = Random(0)
    found = {}
    modes = {"PNG": ("RGB", "RGBA", "P", "I;16", "1", "LA"), "JPEG": ("RGB", "CMYK", "L"), "WEBP": ("RGB", "RGBA")}
    modes |= {"GIF": ("P",), "BMP": ("RGB",), "TIFF": ("RGB", "F", "I;16"), "AVIF": ("RGB",)}
    for kind, each in modes.items():
        for number, mode in enumerate(each):
            deep = Image.frombytes("I;16", (72, 96), rng.randbytes(72 * 96 * 2))
            image = (
                deep if mode == "I;16" else Image.frombytes("RGB", deep.size, rng.randbytes(72 * 96 * 3)).convert(mode)
            )
            out = io.BytesIO()
            image.save(out, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0") if kind == "JPEG" else image.save(out, kind)
            found[f"{number}{mode[0]}.{kind.lower()}"] = out.getvalue()
    return found


def picture(rng: Random, folder: Path) -> None:
    """An image file."""
    data = _pictures()[rng.choice(list(_pictures()))]
    try:
        image = pictures.decode(damaged(data, rng))
    except pictures.BrokenPictureError as error:
        raise UserError(str(error) or "broken") from error
    assert image.mode == "RGB" and min(image.size) > 0


def _survey(rng: Random, folder: Path, source: Path | str) -> None:
    values = {
        "base": {"path": "tiny"},
        "data": {"folder": str(source), "resolution": 64, "skip_bad": rng.random() < 0.7},
        "output": {"folder": str(folder / "out")},
    }
    read = config.from_mapping(values)
    found = survey(read)
    assert data_report(found, read) and found.pictures <= found.seen
    checkpoint = open_checkpoint(read.base)
    assert cache_paths(read, checkpoint, F32).index_file(read)
    if found.pictures and rng.random() < 0.03:
        load_or_encode(read, CPU, F32).batch(0, 2, seed=0, caption_dropout=0.0)


def data_folder(rng: Random, folder: Path) -> None:
    """A folder of pictures, captions and perhaps a list of them, of which some are damaged."""
    data = folder / "data"
    data.mkdir()
    lines = []
    for name in rng.sample(list(_pictures()), 3):
        picture_file = data / name
        picture_file.write_bytes(damaged(_pictures()[name], rng) if rng.random() < 0.3 else _pictures()[name])
        caption = odd_caption(rng) if rng.random() < 0.5 else b"a fox"
        if rng.random() < 0.9:
            picture_file.with_suffix(".txt").write_bytes(caption)
        lines.append({"file_name": name, "text": caption.decode("utf-8", "replace")})
    odd = os.fsencode(data) + b"/" + rng.choice((b"\xff", b"new\nline", b"a\x1b[2J", b"back\\slash", b"%s{}"))
    if rng.random() < 0.3:
        Path(os.fsdecode(odd + b".png")).write_bytes(_pictures()["0R.png"])
        Path(os.fsdecode(odd + b".txt")).write_bytes(b"a fox")
    if rng.random() < 0.2:
        (data / "loop.png").symlink_to(data / "loop.png")
        (data / "sub.png").mkdir()
    if rng.random() < 0.4:
        entries = b"\n".join(json.dumps(line).encode() for line in lines)
        odd_lines = b"\n".join(damaged_json(line, rng) for line in lines)
        (data / "metadata.jsonl").write_bytes(rng.choice((odd_lines, odd_lines, damaged(entries, rng))))
    _survey(rng, folder, data)


def prompts(rng: Random, folder: Path) -> None:
    """A file of prompts."""
    path = folder / "prompts.txt"
    lines = b"\n".join(odd_caption(rng) if rng.random() < 0.5 else b"a fox" for _ in range(3))
    path.write_bytes(damaged(lines, rng) if rng.random() < 0.5 else lines)
    _survey(rng, folder, path)


def shard(rng: Random, folder: Path) -> None:
    """A tar file of pictures and captions."""
    members = {}
    for name in rng.sample(list(_pictures()), 3):
        members[name] = _pictures()[name]
        members[f"{name.partition('.')[0]}.txt"] = odd_caption(rng) if rng.random() < 0.3 else b"a fox"
    path = folder / rng.choice(("00000.tar", "[a].tar", "x.tar.gz", "0.tar"))
    path.write_bytes(damaged_tar(members, rng))
    _survey(rng, folder, rng.choice((path, folder / "*.tar")))


# ---- what a run leaves behind


@cache
def _inputs() -> dict[str, Any]:
    folder = _shared_folder()
    values = write_inputs(folder, pictures=4)
    load_or_encode(config.from_mapping(values), CPU, F32)
    return values


def cached_rows(rng: Random, folder: Path) -> None:
    """A cache, one of whose files is damaged: it is whole, or is filled again."""
    values = _inputs()
    values = {**values, "data": {**values["data"], "cache": str(folder / "cache")}}
    shutil.copytree(_inputs()["data"]["cache"], folder / "cache")
    files = sorted((folder / "cache").rglob("*.safetensors"))
    index = [file for file in files if file.name.startswith("index")]
    path = rng.choice([*files, *index])
    whole = _weights_in(path)
    path.unlink()
    path.write_bytes(damaged_weights(whole, rng))
    read = config.from_mapping(values)
    for rows in sorted(folder.glob("cache/*-*/")):
        Store(rows, verify=rng.random() < 0.3)
    cached = open_cached(read, F32)
    input_fingerprints(read, F32)
    if cached is None:
        if rng.random() < 0.9:
            raise UserError("it is filled again")
        dataset = load_or_encode(read, CPU, F32)
    else:
        dataset = cached.dataset
    for step in range(4):
        batch = dataset.batch(step, 2, seed=0, caption_dropout=0.3)
        assert batch.latents.shape == (2, 4, 8, 8)


@cache
def _training() -> tuple[Training, Weights]:
    model = UNetCheckpoint(BaseConfig(path="tiny")).load(F32, CPU)
    with_adapter(model, rank=1, alpha=1.0, targets=("to_q",), target_input="s")
    method = {"ema_decay": 0.5, "target_time": True}
    settings = config.from_mapping(
        {**_inputs(), "method": method, "training": {"steps": 9, "batch": 2, "device": "cpu"}}
    )
    training = Training(model, random_dataset(), settings)
    training.train_step()
    path = Path(_inputs()["output"]["folder"]).with_name("checkpoint.safetensors")
    save_checked({name: each.detach().clone() for name, each in training.state_dict().items()}, path, {"the base": "x"})
    return training, _weights_in(path)


def _weights_in(path: Path) -> Weights:
    with safe_open(path, "pt") as file:
        return Weights.of({name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata())  # noqa: SIM118


def training_checkpoint(rng: Random, folder: Path) -> None:
    """A checkpoint of a run: it is resumed, passed over or refused."""
    training, whole = _training()
    for step in (1, 2):
        data = damaged_weights(whole, rng) if step == 2 else whole.to_bytes()
        (folder / f"step-{step:08d}.safetensors").write_bytes(data)
    checkpoints = Checkpoints(folder, 1, 2, {"the base": "x"})
    checkpoints.check_fingerprints()
    _resume(training, checkpoints, ALONE)
    assert len(training.losses) == 1, "both checkpoints are after one step, and the first is whole"
    if rng.random() < 0.05:
        training.train_step()


def run_folder(rng: Random, folder: Path) -> None:
    """The folder of a run, whose configuration, log, LoRA or a preview is damaged."""
    values = {**_inputs(), "output": {"folder": str(folder)}, "preview": {"prompts": ["a fox"], "every": 1}}
    read = config.from_mapping(values)
    log = "step,loss,lr,norm,images_per_second\n" + "".join(f"{i},0.5,0.001,1,{i}.5\n" for i in range(1, 9))
    by_time = "step,t,gap,num_times,pictures,loss\n" + "".join(f"{i},900,100,1000,2,0.5\n" for i in range(1, 9))
    files = {"config.toml": read.to_toml().encode(), "log.csv": log.encode(), "loss_by_time.csv": by_time.encode()}
    files["tcd-lora.safetensors"] = _loras()[0].to_bytes()
    files["previews/step-00000000/a-fox-seed0-1steps.jpg"] = _pictures()["0R.jpeg"]
    files["previews/step-x.jpg"] = _pictures()["0R.jpeg"]
    broken = rng.choice(list(files))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(damaged(content, rng) if name == broken else content)
    assert isinstance(preflight.output_conflict(read), str)
    preflight.is_finished(read)
    write_report(folder)


KINDS: dict[str, tuple[Callable[[Random, Path], None], int]] = {
    "a LoRA, inspected": (inspect_lora, 15),
    "a LoRA, exported": (export_lora, 10),
    "a LoRA to start from": (start_from_lora, 10),
    "a LoRA, in the nodes": (node_lora, 15),
    "a checkpoint": (base_file, 4),
    "a diffusers folder": (base_folder, 4),
    "a configuration": (configuration, 15),
    "paths": (paths, 4),
    "a picture": (picture, 15),
    "a folder of pictures": (data_folder, 10),
    "prompts": (prompts, 4),
    "a shard": (shard, 10),
    "a cache": (cached_rows, 10),
    "a training checkpoint": (training_checkpoint, 8),
    "the folder of a run": (run_folder, 8),
}
"""For each kind its function, and how many of a hundred and some cases are of it."""
