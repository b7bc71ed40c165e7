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
from methods import EMA_DECAY, FRESH_NOISE, GAMMAS, HUBER_C, METHODS, PLAIN, SEEDS, STEPS, VARIATIONS

from trajectory_consistency.trainer.demo.classifier import NUM_FEATURES
from trajectory_consistency.trainer.demo.methods import TEACHER_GUIDANCE

HERE = Path(__file__).parent
DOCS = HERE.parents[2] / "docs"


class Results(NamedTuple):
    """The results of one world."""

    tries: Mapping[str, Mapping[float, float]]
    """Score by method and learning rate."""
    lr: Mapping[str, float]
    """Chosen learning rate by method."""
    runs: Mapping[str, Sequence[Any]]
    """Results by method, one for each seed."""
    references: Sequence[Mapping[str, Mapping[str, float]]]
    """For each seed: results of the teacher's samplers and of fresh data, by name."""


ALL = METHODS | PLAIN | VARIATIONS


class Measure(NamedTuple):
    """How the table of a measured quantity is written."""

    title: str
    scale: float
    form: str
    note: str = ""


class About(NamedTuple):
    """What is measured in a world: the distance, and other quantities by their names in the results."""

    distance_is: str
    others: Mapping[str, Measure]
    goals: Mapping[str, str]
    """The quantities that have goals, and their names in the text."""


ABOUT = {
    checkerboard.NAME: About(
        f"Energy distance to the data, times 1000, of {checkerboard.POINTS} points. For fresh data it is {{fresh}}.",
        {
            "covered": Measure("Squares with at least half of their points, in %", 100, "{:.0f}"),
            "strays": Measure("Points on no square, in %", 100, "{:.1f}"),
        },
        {"distance": "distance to the data"},
    ),
    shapes.NAME: About(
        f"Energy distance to the world's own pictures, times 1000, in {NUM_FEATURES} features of a classifier, each of "
        f"unit variance. {shapes.PICTURES} pictures, one for each caption, are compared with {shapes.REFERENCES} "
        "reference pictures for each caption; pairs of the same caption are left out. For fresh pictures of the world "
        "it is {fresh}.",
        {
            "from_teacher": Measure(
                "Energy distance to the teacher's pictures with 50 steps, times 1000",
                1e3,
                "{:.1f}",
                f"As above, but the references are {shapes.TEACHERS} pictures for each caption that the teacher draws "
                "from other noise. This shows how much the distillation lost.",
            ),
            "covered": Measure(
                "Coverage, in %",
                100,
                "{:.0f}",
                "The share of the world's pictures that have a drawn picture at least as near as their fifth nearest "
                "neighbor in the world. It shows whether all variants that a caption allows are drawn.",
            ),
            "right": Measure("Pictures that show all four parts of their caption, in %", 100, "{:.0f}"),
            "detail": Measure(
                "Fine detail, in %",
                100,
                "{:.2f}",
                "The share of the pictures' power above half of the Nyquist frequency. Fresh pictures have "
                "{fresh}. More than that is noise, less is blur.",
            ),
            "edges": Measure(
                "Edges",
                1,
                "{:.2f}",
                "The mean absolute difference between neighboring pixels, of values from 0 to 255. Fresh pictures of "
                "the world have {fresh}.",
            ),
        },
        {"distance": "distance to the world", "from_teacher": "distance to the teacher"},
    ),
}


def page(found: Mapping[str, Results]) -> str:
    """Return the text of docs/quality.md, or if there is only one world, the tables of that world."""
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
        shapes_size=f"{shapes.ITERATIONS} iterations of {shapes.BATCH} pictures; "
        f"{len(shapes.LEARNING_RATES)} learning rates tried, with {shapes.TRY_ITERATIONS} iterations each.",
        guidance=f"{TEACHER_GUIDANCE:g}",
        torch=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}",
        **parts,
    )


def part(name: str, results: Results) -> str:
    """Return the tables of one world."""
    about = ABOUT[name]
    return (
        Template((HERE / "world.md").read_text(encoding="utf-8"))
        .substitute(
            name=name,
            distance_is=about.distance_is.format(fresh=_reference(results, "fresh data", "distance", 1e3, "{:.1f}")),
            distances=_table(results, results.lr, "distance", 1e3, "{:.1f}"),
            by_gamma="\n\n".join(
                f"{title.capitalize()}:\n\n{_by_gamma(results, measure)}" for measure, title in about.goals.items()
            ),
            goals="\n".join(f"* {line}" for line in _goals(results, about.goals)),
            trajectories=_trajectories(results),
            others="\n\n".join(_other(results, key, measure) for key, measure in about.others.items()),
            variations=_variations(results, about.goals),
            tries=_tries(results),
        )
        .strip()
    )


def _other(results: Results, key: str, measure: Measure) -> str:
    """Return the section of a measured quantity other than the distance."""
    table = _table(results, results.lr, key, measure.scale, measure.form)
    fresh = _reference(results, "fresh data", key, measure.scale, measure.form)
    return "\n\n".join(filter(None, (f"### {measure.title}", measure.note.format(fresh=fresh), table)))


def write(found: Mapping[str, Results], made: Path) -> None:
    """Write the page, its plots, and pictures drawn by the students in the folder `made`."""
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


def _distances(results: Results, name: str, gamma: float, measure: str = "distance") -> list[float]:
    """Return the mean over seeds, times 1000, by steps; NaN if it was not measured."""
    runs, own = results.runs[name], ALL[name].gamma

    def mean(steps: int, gamma: float) -> float:
        if any(f"{steps} {gamma:g}" not in run["samples"] for run in runs):
            return math.nan
        return statistics.mean(1e3 * _sample(run, steps, gamma)[measure] for run in runs)

    return [mean(steps, own if steps == 1 else gamma) for steps in STEPS]


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return form.format(*values)
    return f"{form} ({form})".format(statistics.mean(values), statistics.stdev(values))


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(results: Results, names: Iterable[str], measure: str, scale: float, form: str) -> str:
    """Return the table by steps, of methods with their own gammas and of the teacher's solvers."""

    def cell(name: str, steps: int) -> str:
        return _spread([scale * _sample(run, steps, ALL[name].gamma)[measure] for run in results.runs[name]], form)

    rows = [[name, *(cell(name, steps) for steps in STEPS)] for name in names]
    for solver in ("DDIM", "DPM-Solver++(2M)", *(f"TCD, γ {gamma:g}" for gamma in FRESH_NOISE)):
        by_steps = (_reference(results, f"{solver} {steps}", measure, scale, form) for steps in STEPS)
        rows.append([f"teacher, {solver}", *by_steps])
    best = _reference(results, "DDIM 50", measure, scale, form)
    rows.append(["teacher, DDIM, 50 steps", *[""] * (len(STEPS) - 1), best])
    return _rows(["steps", *map(str, STEPS)], rows)


def _variations(results: Results, measures: Mapping[str, str]) -> str:
    """Return the tables of the variations, together with the methods that they vary."""
    others = [name for name in results.runs if name not in results.lr]
    names = [*dict.fromkeys(ALL[name].of for name in others), *others]
    tables = (
        f"{title.capitalize()}:\n\n{_table(results, names, measure, 1e3, '{:.1f}')}"
        for measure, title in measures.items()
    )
    return "\n\n".join(["### Variations", *tables]) + "\n"


def _reference(results: Results, name: str, measure: str, scale: float, form: str) -> str:
    found = [scale * each[name][measure] for each in results.references if name in each]
    return _spread(found, form) if found else ""


def _by_gamma(results: Results, measure: str) -> str:
    rows = [
        [name, f"{gamma:g}", *(f"{each:.1f}".replace("nan", "") for each in found)]
        for name in results.lr
        for gamma in GAMMAS
        for found in [_distances(results, name, gamma, measure)]
    ]
    return _rows(["", "γ", *map(str, STEPS)], rows)


def _errors(results: Results, name: str) -> dict[str, float]:
    """Return the mean error over seeds, by "t → s", of a method's jumps or of the teacher's own."""
    teacher = [each["DDIM"] for each in results.references]
    runs = [run["trajectory"] for run in results.runs[name]] if name in results.runs else teacher
    return {pair.replace(" ", " → "): statistics.mean(run[pair] for run in runs) for pair in runs[0]}


def _trajectories(results: Results) -> str:
    names = [*results.lr, "teacher, DDIM"]
    rows = [[name, *(f"{error:.3f}" for error in _errors(results, name).values())] for name in names]
    return _rows(["t → s", *_errors(results, next(iter(results.lr)))], rows)


def _tries(results: Results) -> str:
    rates = list(next(iter(results.tries.values())))
    rows = [
        [name, *(f"{1e3 * results.tries[name][lr]:.1f}" for lr in rates), f"{results.lr[name]:g}"]
        for name in results.lr
    ]
    return _rows(["1000 × mean distance, by learning rate", *(f"{lr:g}" for lr in rates), "chosen"], rows)


def _goals(results: Results, measures: Mapping[str, str]) -> list[str]:
    """Return one line for each goal, with the result and whether it is met."""
    kinds = [kind for kind in ("", ", plain", ", weighting x0") if f"TCD S+{kind}" in results.runs]
    found = [_goals_of(results, kind, *each) for each in measures.items() for kind in kinds]
    found.append(_goals_of_diagonal(results, measures))
    return [f"{text}: **{'met' if met else 'not met'}**" for goals in found for text, met in goals]


def _goals_of(results: Results, kind: str, measure: str, called: str) -> list[tuple[str, bool]]:
    """Return the goals of TCD and TCD S+ of one kind, such as ", plain", compared with LCM (of that kind if run)."""
    baseline = f"LCM{kind}" if f"LCM{kind}" in results.runs else "LCM"
    lcm, tcd, s_plus = (
        _distances(results, name, ALL[name].gamma, measure) for name in (baseline, f"TCD{kind}", f"TCD S+{kind}")
    )
    best = min(lcm)
    goals = [
        (
            f"TCD{kind}, {called}: {tcd[2]:.1f} with 4 steps and {tcd[5]:.1f} with 32 "
            f"(goal: not worse with 32; LCM: {lcm[2]:.1f} and {lcm[5]:.1f})",
            tcd[5] <= tcd[2],
        ),
        (
            f"TCD S+{kind}, {called} with 2 steps: {s_plus[1]:.1f} (goal: at most LCM's best, {best:.1f})",
            s_plus[1] <= best,
        ),
        (
            f"TCD S+{kind}, {called} with 4 steps: {s_plus[2]:.1f} "
            f"(goal: at most 0.6 times LCM's best, {0.6 * best:.1f})",
            s_plus[2] <= 0.6 * best,
        ),
    ]
    if measure == "distance":
        limit = 1.5 * statistics.mean(1e3 * each["DDIM 50"]["distance"] for each in results.references)
        text = (
            f"TCD S+{kind}, {called} with 8 steps: {s_plus[3]:.1f} "
            f"(goal: at most 1.5 times the teacher's with 50 steps, {limit:.1f})"
        )
        goals.append((text, s_plus[3] <= limit))
    return goals


def _goals_of_diagonal(results: Results, measures: Mapping[str, str]) -> list[tuple[str, bool]]:
    """Return the goals of TCD S+ with a share of s = t_next: few steps and many alike good."""
    name, goals = "TCD S+, diagonal", []
    noise = statistics.stdev(1e3 * each["fresh data"]["distance"] for each in results.references)
    teacher = statistics.mean(1e3 * each["DDIM 50"]["distance"] for each in results.references)
    found = {measure: _distances(results, name, ALL[name].gamma, measure) for measure in measures}
    lcm = {measure: _distances(results, "LCM", ALL["LCM"].gamma, measure) for measure in measures}
    world, most = found["distance"], max(found["distance"][1:])
    limit = min(world[2] + 2 * noise, teacher)
    text = f"{name}, {measures['distance']} from 2 to 32 steps: at most {most:.1f}"
    goals.append((f"{text} (goal: at most {limit:.1f}, by 4 steps and by the teacher's 50)", most <= limit))
    if "from_teacher" in measures:
        away, best = found["from_teacher"], min(lcm["from_teacher"])
        text = f"{name}, {measures['from_teacher']}"
        goals += [
            (f"{text} from 2 to 32 steps: at most {max(away[1:]):.1f} (goal: 0.5)", max(away[1:]) <= 0.5),
            (
                f"{text} with 1 step: {away[0]:.1f} (goal: half of LCM's, {lcm['from_teacher'][0] / 2:.1f})",
                away[0] <= lcm["from_teacher"][0] / 2,
            ),
            (f"{text} with 2 steps: {away[1]:.1f} (goal: 0.7 of LCM's best, {0.7 * best:.1f})", away[1] <= 0.7 * best),
        ]
    errors, before = _errors(results, name), _errors(results, "TCD S+")
    ratio = max(errors[pair] / before[pair] for pair in errors)
    goals.append((f"{name}, errors of the jumps: at most {ratio:.2f} of TCD S+'s (goal: 0.7)", ratio <= 0.7))
    return goals


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
