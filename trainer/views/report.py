"""Writes report.html: the numbers, previews and settings of a run, finished or not, in one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template

from PIL import Image

from ...tcd.files.atomic import atomic_write
from ..config import settings as config
from ..config.settings import Config
from ..data.pictures import BrokenPictureError, decode
from ..errors import UserError
from ..models import TINY_NAME
from .curves import color_map, curve
from .history import LogRow, read_log, read_loss_by_time
from .preview import PREVIEW_FOLDER, TEACHER_FOLDER, TEACHER_STEPS, picture_path, step_label, teacher_guidance
from .preview_prompts import picture_names

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_MAX_SIDE_PX = 256  # of an embedded picture
_MAX_COLUMNS = 8  # training steps shown for each prompt and seed


def write_report(folder: Path) -> Path:
    """Write the report of the run in `folder`, and return its path.

    Raises UserError if the folder does not belong to a run.
    """
    settings = folder / config.FILE_NAME
    if not settings.is_file():
        raise UserError(f"{folder} is not the folder of a run: there is no config.toml in it")
    run, rows = config.load(settings), read_log(folder)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(run.output.name),
        subtitle=escape(f"{run.base.file}, law {run.method.law}"),
        base=escape(_base_name(run)),
        facts=_facts(run, rows),
        pictures=_pictures(run, folder / PREVIEW_FOLDER),
        curves=_curves(rows),
        by_time=_by_time(folder, rows),
        file=escape(f"{run.output.name}.safetensors"),
        steps=run.output.steps,
        eta=f"{run.output.eta:g}",
        cfg=f"{run.output.cfg:g}",
        settings=escape(run.to_toml()),
    )
    path = folder / REPORT_NAME
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def _base_name(run: Config) -> str:
    """The name of the base model's file or folder."""
    return TINY_NAME if run.base.file == "tiny" else Path(run.base.file).name


def _facts(run: Config, rows: Sequence[LogRow]) -> str:
    last, skipped = [row for row in rows[-50:] if not row.skipped], sum(row.skipped for row in rows)
    done = rows[-1].step if rows else 0
    facts = {
        "steps": f"{done} of {run.training.steps}",
        "pictures seen": f"{done * run.training.batch:,}",
        **({"steps skipped, not finite": str(skipped)} if skipped else {}),
        "loss, mean of the last 50": f"{sum(row.loss for row in last) / len(last):.4g}" if last else "-",
        "images per second": f"{sorted(row.images_per_second for row in last)[len(last) // 2]:.3g}" if last else "-",
        "rank": str(run.adapter.rank),
        "sample with": f"{run.output.steps} steps, eta {run.output.eta:g}, cfg {run.output.cfg:g}",
    }
    return "".join(f'<div class="fact"><span>{name}</span><b>{escape(text)}</b></div>' for name, text in facts.items())


def _curves(rows: Sequence[LogRow]) -> str:
    steps, smooth = [row.step for row in rows], max(1, len(rows) // 50)
    losses, norms = [row.loss for row in rows], [row.norm for row in rows]
    return "".join(
        [
            curve("loss (logarithmic)", steps, losses, smooth=smooth, logarithmic=True),
            curve("norm of the gradient (logarithmic)", steps, norms, smooth=smooth, logarithmic=True),
            curve("learning rate", steps, [row.lr for row in rows]),
            curve("images per second", steps, [row.images_per_second for row in rows], smooth=smooth),
        ]
    )


def _by_time(folder: Path, rows: Sequence[LogRow]) -> str:
    """Draw the mean loss by t and t - s as a color map, and by each of the two alone as curves."""
    losses = read_loss_by_time(folder, since=rows[-1].step // 2 if rows else 0)
    if losses is None:
        return '<p class="empty">nothing yet</p>'
    loss, count, edges = losses
    labels = [f"{low}-{end - 1}" for low, end in pairwise(edges)]
    middles = [(low + end) / 2 for low, end in pairwise(edges)]
    total = loss.nan_to_num(0.0) * count
    curves = [
        curve(
            f"mean loss by {name} (logarithmic)",
            middles,
            (total.sum(dim) / count.sum(dim)).tolist(),
            x_label=f"{name}, in training times",
            logarithmic=True,
            dots=True,
        )
        for name, dim in (("t", 1), ("t - s", 0))
    ]
    return f"{color_map(loss.tolist(), labels, 't - s', 't')}<div>{''.join(curves)}</div>"


def _pictures(run: Config, folder: Path) -> str:
    """Return a table of pictures for each prompt and seed."""
    training_steps = sorted(int(path.stem[5:]) for path in folder.glob("step-*.jpg") if path.stem[5:].isdecimal())
    if not training_steps:
        return '<p class="sub">None were drawn: set preview.prompts for the next run.</p>'
    shown, preview = _evenly_spaced(training_steps, _MAX_COLUMNS), run.preview
    names = picture_names(preview.prompts, preview.seeds)
    prompts = [(prompt, seed) for prompt in preview.prompts for seed in preview.seeds]
    strips = [
        f'<div class="strip"><p>{escape(prompt)} <span class="faint">seed {seed}</span></p>'
        f"{_strip(run, folder, name, shown)}</div>"
        for name, (prompt, seed) in zip(names, prompts, strict=True)
    ]
    return (
        f'<p class="sub">Rows are numbers of sampling steps, with eta {preview.eta:g} and cfg {preview.cfg:g}; columns '
        f"are steps of training. The teacher is the base alone: {TEACHER_STEPS} steps, eta 0, cfg "
        f"{teacher_guidance(run):g}, one picture beside every row.</p>"
        f'<div class="strips" style="--columns: {len(shown) + 1}">{"".join(strips)}</div>'
    )


def _strip(run: Config, folder: Path, name: str, training_steps: Sequence[int]) -> str:
    """The table of one prompt and seed: a row for each number of sampling steps, a column for each training step."""
    teacher = _image(picture_path(folder, TEACHER_FOLDER, name, TEACHER_STEPS), "the teacher")
    heads = [*("start" if step == 0 else f"{step:,}" for step in training_steps), "teacher"]
    body = []
    for steps in run.preview.steps:
        sampled = f"{steps} step{'s' if steps > 1 else ''}"
        cells = [
            _image(picture_path(folder, step_label(step), name, steps), f"{sampled}, after {step} steps of training")
            for step in training_steps
        ]
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr><th>{sampled}</th>{columns}<td class="teacher">{teacher}</td></tr>')
    head = "".join(f"<th>{text}</th>" for text in ["", *heads])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _evenly_spaced(values: Sequence[int], count: int) -> list[int]:
    """Choose at most `count` values as evenly as possible, with the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]


def _image(path: Path, description: str) -> str:
    """Embed a picture in the page; empty if there is no such file because preview.prompts or steps were changed."""
    if not path.is_file():
        return ""
    try:
        small = decode(path.read_bytes())
    except BrokenPictureError as error:
        return f'<p class="empty">{escape(path.name)} does not decode: {escape(str(error))}</p>'
    small.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{description}" title="{description}" src="data:image/jpeg;base64,{data}">'
