"""The tables and the plots of docs/quality.md, from the results of all runs."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import checkerboard
import shapes
import torch
from methods import EMA_DECAY, GAMMAS, HUBER_C, METHODS, PLAIN, SEEDS, STEPS, VARIATIONS, cells

from trainer.demo.methods import TEACHER_GUIDANCE

HERE = Path(__file__).parent
DOCS = HERE.parents[2] / "docs"


class Results(NamedTuple):
    """Of one world, by method where it says so."""

    tries: Mapping[str, Mapping[float, float]]
    """Score by learning rate."""
    lr: Mapping[str, float]
    runs: Mapping[str, Sequence[Any]]
    references: Sequence[Mapping[str, Mapping[str, float]]]
    """Of each seed, by name."""


ALL = METHODS | PLAIN | VARIATIONS


class About(NamedTuple):
    """What a world measures besides the distance: a title, and how its numbers are written."""

    distance_is: str
    others: Mapping[str, tuple[str, float, str]]


ABOUT = {
    checkerboard.NAME: About(
        f"Energy distance to the data, times 1000, of {checkerboard.POINTS} points. Fresh data have {{fresh}}.",
        {
            "covered": ("Squares with at least half of their points, in %", 100, "{:.0f}"),
            "strays": ("Points on no square, in %", 100, "{:.1f}"),
        },
    ),
    shapes.NAME: About(
        f"Energy distance to the world's own pictures, times 1000, of {shapes.PICTURES} pictures, in 64 features of a "
        "classifier, each of unit variance. Fresh pictures have {fresh}.",
        {
            "from_teacher": ("Energy distance to the teacher's pictures in 50 steps, times 1000", 1e3, "{:.1f}"),
            "covered": (
                "Coverage: of the world's pictures, those with a drawn one among their five nearest, in %",
                100,
                "{:.0f}",
            ),
            "right": ("Captions that are right in all four parts, in %", 100, "{:.0f}"),
        },
    ),
}


def page(found: Mapping[str, Results]) -> str:
    """The text of docs/quality.md, or of one world where there is one."""
    parts = {name: part(name, results) for name, results in found.items()}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return Template((HERE / "page.md").read_text(encoding="utf-8")).substitute(
        huber_c=HUBER_C,
        ema_decay=EMA_DECAY,
        seeds=len(SEEDS),
        methods="\n".join(f"| {each.name} | {each.about} | {each.gamma:g} |" for each in METHODS.values()),
        checkerboard_size=f"{checkerboard.ITERATIONS} iterations of {checkerboard.BATCH} points, "
        f"{len(checkerboard.LEARNING_RATES)} learning rates tried.",
        shapes_size=f"{shapes.ITERATIONS} iterations of {shapes.BATCH} pictures, "
        f"{len(shapes.LEARNING_RATES)} learning rates tried.",
        guidance=f"{TEACHER_GUIDANCE:g}",
        torch=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}",
        **parts,
    )


def part(name: str, results: Results) -> str:
    """The tables of one world."""
    about = ABOUT[name]
    return (
        Template((HERE / "world.md").read_text(encoding="utf-8"))
        .substitute(
            name=name,
            distance_is=about.distance_is.format(fresh=_reference(results, "fresh data")),
            distances=_table(results, results.lr, "distance", 1e3, "{:.1f}"),
            teachers=_teachers(results),
            by_gamma=_by_gamma(results),
            goals="\n".join(f"* {line}" for line in _goals(results)),
            trajectories=_trajectories(results),
            others="\n\n".join(
                f"### {title}\n\n{_table(results, results.lr, key, scale, form)}"
                for key, (title, scale, form) in about.others.items()
            ),
            variations=_variations(results),
            tries=_tries(results),
        )
        .strip()
    )


def write(found: Mapping[str, Results], made: Path) -> None:
    """Write the page, its plots, and pictures by the students that are in `made`."""
    folder = DOCS / "quality"
    folder.mkdir(exist_ok=True)
    for world in (checkerboard, shapes):
        world.draw(found[world.NAME].lr, made / world.NAME, folder / f"{world.NAME}-pictures.png")
    for name, results in found.items():
        _plot_distances(results, folder / f"{name}-distance.png")
        _plot_trajectories(results, folder / f"{name}-trajectory.png")
    (DOCS / "quality.md").write_text(page(found), encoding="utf-8")


def _sample(run: Mapping[str, Any], steps: int, gamma: float) -> Mapping[str, float]:
    sample: Mapping[str, float] = run["samples"][f"{steps} {gamma:g}"]
    return sample


def _distances(results: Results, name: str, gamma: float) -> list[float]:
    """Mean over seeds, times 1000, by steps; NaN where it was not measured."""
    measured, runs = cells(ALL[name]), results.runs[name]
    return [
        statistics.mean(1e3 * _sample(run, steps, gamma)["distance"] for run in runs)
        if (steps, gamma) in measured
        else math.nan
        for steps in STEPS
    ]


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return form.format(*values)
    return f"{form} ({form})".format(statistics.mean(values), statistics.stdev(values))


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(results: Results, names: Iterable[str], measure: str, scale: float, form: str) -> str:
    def cell(name: str, steps: int) -> str:
        return _spread([scale * _sample(run, steps, ALL[name].gamma)[measure] for run in results.runs[name]], form)

    return _rows(["steps", *map(str, STEPS)], [[name, *(cell(name, steps) for steps in STEPS)] for name in names])


def _variations(results: Results) -> str:
    """What came of each variation that was run, distances as in the first table."""
    names = [name for name in results.runs if name not in results.lr]
    return f"### Variations\n\n{_table(results, names, 'distance', 1e3, '{:.1f}')}\n" if names else ""


def _reference(results: Results, name: str) -> str:
    return _spread([1e3 * each[name]["distance"] for each in results.references], "{:.1f}")


def _teachers(results: Results) -> str:
    """Rows of the teacher, to stand under those of the methods."""

    def cell(name: str) -> str:
        return _reference(results, name) if name in results.references[0] else ""

    lines = [
        [f"teacher, {name}", *(cell(f"{name} {steps}") for steps in STEPS)] for name in ("DDIM", "DPM-Solver++(2M)")
    ]
    lines.append(["teacher, DDIM, 50 steps", *[""] * (len(STEPS) - 1), _reference(results, "DDIM 50")])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_gamma(results: Results) -> str:
    rows = [
        [name, f"{gamma:g}", *(f"{each:.1f}".replace("nan", "") for each in _distances(results, name, gamma))]
        for name in results.lr
        for gamma in GAMMAS
    ]
    return _rows(["", "γ", *map(str, STEPS)], rows)


def _errors(results: Results, name: str) -> dict[str, float]:
    """Mean over seeds, by "t → s"."""
    runs = [run["trajectory"] for run in results.runs[name]]
    return {pair.replace(" ", " → "): statistics.mean(run[pair] for run in runs) for pair in runs[0]}


def _trajectories(results: Results) -> str:
    rows = [[name, *(f"{error:.3f}" for error in _errors(results, name).values())] for name in results.lr]
    return _rows(["t → s", *_errors(results, next(iter(results.lr)))], rows)


def _tries(results: Results) -> str:
    rates = list(next(iter(results.tries.values())))
    rows = [
        [name, *(f"{1e3 * results.tries[name][lr]:.1f}" for lr in rates), f"{results.lr[name]:g}"]
        for name in results.lr
    ]
    return _rows(["1000 × mean distance of the try", *(f"{lr:g}" for lr in rates), "taken"], rows)


def _goals(results: Results) -> list[str]:
    """What the methods were to reach, what they reached, and whether that is enough."""
    ddim = statistics.mean(1e3 * each["DDIM 50"]["distance"] for each in results.references)
    lines = _goals_of(results, "", ddim)
    if "LCM, plain" in results.lr:
        lines += _goals_of(results, ", plain", ddim)
    return [f"{text}: **{'met' if met else 'not met'}**" for text, met in lines]


def _goals_of(results: Results, kind: str, ddim: float) -> list[tuple[str, bool]]:
    lcm = min(each for gamma in GAMMAS for each in _distances(results, f"LCM{kind}", gamma) if not math.isnan(each))
    by_lcm, tcd = _distances(results, f"LCM{kind}", 1.0), _distances(results, f"TCD{kind}", 0.3)
    told = _distances(results, f"TCD S+{kind}", 0.3)
    return [
        (
            f"TCD{kind} from 4 to 32 steps: {tcd[2]:.1f} to {tcd[5]:.1f} (LCM: {by_lcm[2]:.1f} to {by_lcm[5]:.1f})",
            tcd[5] <= tcd[2],
        ),
        (f"TCD S+{kind} at 2 steps, {told[1]:.1f}, at most LCM's best at any, {lcm:.1f}", told[1] <= lcm),
        (f"TCD S+{kind} at 4 steps, {told[2]:.1f}, at most 0.6 of that, {0.6 * lcm:.1f}", told[2] <= 0.6 * lcm),
        (
            f"TCD S+{kind} at 8 steps, {told[3]:.1f}, at most 1.5 of the teacher's at 50, {1.5 * ddim:.1f}",
            told[3] <= 1.5 * ddim,
        ),
    ]


def _plot_distances(results: Results, path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(GAMMAS), figsize=(12, 4), sharey=True, layout="constrained")
    teacher = statistics.mean(1e3 * each["DDIM 50"]["distance"] for each in results.references)
    for panel, gamma in zip(panels, GAMMAS, strict=True):
        for name in results.lr:
            panel.plot(
                STEPS,
                [each if math.isnan(each) else max(each, 0.3) for each in _distances(results, name, gamma)],
                marker="o",
                label=name,
            )
        panel.axhline(max(teacher, 0.3), color="gray", linestyle=":", label="teacher, DDIM, 50 steps")
        panel.set(xscale="log", yscale="log", title=f"γ = {gamma:g}", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        panel.minorticks_off()
    panels[0].set_ylabel("energy distance × 1000")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_trajectories(results: Results, path: Path) -> None:
    from matplotlib import pyplot

    pairs = list(_errors(results, next(iter(results.lr))))
    figure, panel = pyplot.subplots(figsize=(12, 4), layout="constrained")
    width = 0.8 / len(results.lr)
    for k, name in enumerate(results.lr):
        heights = list(_errors(results, name).values())
        panel.bar([i + k * width for i in range(len(pairs))], heights, width, label=name)
    panel.set_xticks([i + 0.4 - width / 2 for i in range(len(pairs))], pairs)
    panel.set_ylabel("RMS error of the jump")
    panel.legend(fontsize="small", ncols=len(results.lr))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
