"""One page that tells a run, without a network: numbers, pictures, settings, and how to use what came out.

Flows in: the folder of a run, finished or not.  Flows out: `report.html` in it, with all that it shows inside.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from ..atomic import atomic_write
from ..config import settings as config
from ..config.settings import Config
from ..errors import UserError
from ..models import TINY_NAME
from .curves import color_map, curve
from .history import BIN, BINS, LogRow, read_log, read_loss_by_time
from .preview import FOLDER, TEACHER, TEACHER_STEPS, picture_path, step_name, teacher_guidance
from .preview_prompts import picture_names

NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_LONGEST_PX = 256  # of an embedded picture
_COLUMNS = 8  # of moments in a strip


def write_report(folder: Path) -> Path:
    """Write the report of the run in `folder`, and return its path.

    Raises UserError when there is no run there.
    """
    settings = folder / config.FILE_NAME
    if not settings.is_file():
        raise UserError(f"{folder} is not the folder of a run: there is no config.toml in it")
    run, rows = config.load(settings), read_log(folder)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(run.output.name),
        subtitle=escape(f"{run.base.path}, law {run.method.law}"),
        base=escape(_base_name(run)),
        facts=_facts(run, rows),
        pictures=_pictures(run, folder / FOLDER),
        curves=_curves(rows),
        by_time=_by_time(folder, rows),
        file=escape(f"{run.output.name}.safetensors"),
        steps=run.output.steps,
        eta=f"{run.output.eta:g}",
        cfg=f"{run.output.cfg:g}",
        settings=escape(run.to_toml()),
    )
    path = folder / NAME
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def _base_name(run: Config) -> str:
    """The name of the base's file or folder."""
    return TINY_NAME if run.base.path == "tiny" else Path(run.base.path).name


def _facts(run: Config, rows: Sequence[LogRow]) -> str:
    last = rows[-50:]
    done = rows[-1].step if rows else 0
    facts = {
        "steps": f"{done} of {run.training.steps}",
        "pictures seen": f"{done * run.training.batch:,}",
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
    """A map of the loss over t and t - s, and a curve over each alone."""
    loss, count = read_loss_by_time(folder, since=rows[-1].step // 2 if rows else 0)
    if not count.sum():
        return '<p class="empty">nothing yet</p>'
    labels = [f"{k * BIN}-{k * BIN + BIN - 1}" for k in range(BINS)]
    middles = [(k + 0.5) * BIN for k in range(BINS)]
    total = loss.nan_to_num(0.0) * count
    curves = [
        curve(
            f"mean loss by {name} (logarithmic)",
            middles,
            (total.sum(other) / count.sum(other)).tolist(),
            across=f"{name}, in timesteps",
            logarithmic=True,
            dots=True,
        )
        for name, other in (("t", 1), ("t - s", 0))
    ]
    return f"{color_map(loss.tolist(), labels, 't - s', 't')}<div>{''.join(curves)}</div>"


def _pictures(run: Config, folder: Path) -> str:
    """A strip to each prompt and seed: a row to each number of steps, a column to each time, and the teacher's."""
    times = sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.jpg"))
    if not times:
        return '<p class="sub">None were drawn: set preview.prompts for the next run.</p>'
    shown, preview = _spread(times, _COLUMNS), run.preview
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


def _strip(run: Config, folder: Path, name: str, times: Sequence[int]) -> str:
    """The table of one prompt and seed."""
    teacher = _image(picture_path(folder, TEACHER, name, TEACHER_STEPS), "the teacher")
    heads = [*("start" if when == 0 else f"{when:,}" for when in times), "teacher"]
    body = []
    for steps in run.preview.steps:
        sampled = f"{steps} step{'s' if steps > 1 else ''}"
        cells = [
            _image(picture_path(folder, step_name(when), name, steps), f"{sampled}, after {when} steps of training")
            for when in times
        ]
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr><th>{sampled}</th>{columns}<td class="teacher">{teacher}</td></tr>')
    head = "".join(f"<th>{text}</th>" for text in ["", *heads])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _spread(times: Sequence[int], count: int) -> list[int]:
    """At most `count` of the times, the first and the last among them, as evenly as can be."""
    if len(times) <= count:
        return list(times)
    return [times[round(k * (len(times) - 1) / (count - 1))] for k in range(count)]


def _image(path: Path, what: str) -> str:
    """The picture of a file within the page; nothing when prompts or steps were other ones then."""
    if not path.is_file():
        return ""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return (
        f'<img alt="{what}" title="{what}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )
