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

from trainer import config
from trainer.atomic import whole_file
from trainer.config import Config
from trainer.curves import color_map, curve
from trainer.errors import UserError
from trainer.history import BIN, BINS, LogRow, read_log, read_loss_by_time
from trainer.preview import FOLDER, TEACHER, TEACHER_STEPS, picture_path, step_name
from trainer.scenes import scene_names

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
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


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
    return "".join(
        [
            curve("loss (logarithmic)", steps, [row.loss for row in rows], smooth=smooth, logarithmic=True),
            curve(
                "norm of the gradient (logarithmic)", steps, [row.norm for row in rows], smooth=smooth, logarithmic=True
            ),
            curve("learning rate", steps, [row.lr for row in rows]),
            curve("images per second", steps, [row.images_per_second for row in rows], smooth=smooth),
        ]
    )


def _by_time(folder: Path, rows: Sequence[LogRow]) -> str:
    loss, count = read_loss_by_time(folder, since=rows[-1].step // 2 if rows else 0)
    if not count.sum():
        return '<p class="empty">nothing yet</p>'
    labels = [f"{k * BIN:03}-{k * BIN + BIN - 1}" for k in range(BINS)]
    return color_map(loss.tolist(), labels, "t - s", "t")


def _pictures(run: Config, folder: Path) -> str:
    """A strip to each prompt and seed: a row to each number of steps, a column to each time, and the teacher's."""
    times = sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.jpg"))
    if not times:
        return '<p class="sub">None were drawn: set preview.prompts for the next run.</p>'
    shown = _spread(times, _COLUMNS)
    names = scene_names(run.preview.prompts, run.preview.seeds)
    prompts = [(prompt, seed) for prompt in run.preview.prompts for seed in run.preview.seeds]
    strips = []
    for name, (prompt, seed) in zip(names, prompts, strict=True):
        heads = ["", *("start" if step == 0 else f"step {step}" for step in shown), f"teacher, {TEACHER_STEPS} steps"]
        teacher = _image(picture_path(folder, TEACHER, name, TEACHER_STEPS))
        body = []
        for k, steps in enumerate(run.preview.steps):
            cells = [_image(picture_path(folder, step_name(step), name, steps)) for step in shown]
            columns = "".join(f"<td>{cell}</td>" for cell in cells)
            if k == 0:  # it has its own number of steps, and stands beside all rows
                columns += f'<td class="teacher" rowspan="{len(run.preview.steps)}">{teacher}</td>'
            body.append(f"<tr><th>{steps} step{'s' if steps > 1 else ''}</th>{columns}</tr>")
        head = "".join(f"<th>{text}</th>" for text in heads)
        strips.append(
            f'<div class="strip"><p>{escape(prompt)} <span class="sub">seed {seed}</span></p>'
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )
    return "".join(strips)


def _spread(times: Sequence[int], count: int) -> list[int]:
    """At most `count` of the times, the first and the last among them, as evenly as can be."""
    if len(times) <= count:
        return list(times)
    return [times[round(k * (len(times) - 1) / (count - 1))] for k in range(count)]


def _image(path: Path) -> str:
    """The picture of a file within the page; nothing when prompts or steps were other ones then."""
    if not path.is_file():
        return ""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
