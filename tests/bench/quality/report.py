"""The tables and the plots of docs/quality.md, from the results of all runs."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import checkerboard
import shapes
import torch
from methods import FRESH_NOISE, GAMMAS, METHODS, PLAIN, SEEDS, STEPS, VARIATIONS

from trajectory_consistency.trainer.demo.classifier import NUM_FEATURES
from trajectory_consistency.trainer.demo.distill import EMA_DECAY, HUBER_C, TEACHER_GUIDANCE

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
    seconds: float
    """What all runs took."""


ALL = METHODS | PLAIN | VARIATIONS
S_PLUS, BEFORE = "TCD S+, diagonal", "TCD S+"
"""The method that the goals are for, and the same without the shares of the diagonal and of s = 0."""
MAIN = ("LCM", "TCD", BEFORE, S_PLUS)
"""The methods of the page's first tables."""


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
        f"unit variance. {shapes.PROMPTS} pictures, one for each of as many complete captions, are compared with "
        f"{shapes.REFERENCES} pictures of each by the world; pairs of the same caption are left out. For fresh "
        "pictures of the world it is {fresh}.",
        {
            "from_teacher": Measure(
                "Distance to the teacher",
                1e3,
                "{:.1f}",
                f"As above, but the references are {shapes.TEACHERS} pictures for each caption that the teacher draws "
                "in 50 steps from other noise. This shows how much the distillation lost.",
            ),
            "open_distance": Measure(
                "Partial captions: distance to the world",
                1e3,
                "{:.1f}",
                f"The same for {shapes.PROMPTS} captions that leave something open. What they leave open is drawn at "
                "random, so the measure is less exact: for fresh pictures of the world it is {fresh}.",
            ),
            "open_from_teacher": Measure("Partial captions: distance to the teacher", 1e3, "{:.1f}"),
            "covered": Measure(
                "Coverage, in %",
                100,
                "{:.0f}",
                "The share of the world's pictures that have a drawn picture at least as near as their fifth nearest "
                "neighbor in the world. It shows whether all variants that a caption allows are drawn. Fresh pictures "
                "have {fresh}.",
            ),
            "right": Measure("Pictures that show all five parts of their caption, in %", 100, "{:.0f}"),
            "open_right": Measure("Partial captions: pictures that show what is mentioned, in %", 100, "{:.0f}"),
        },
        {"distance": "distance to the world", "from_teacher": "distance to the teacher"},
    ),
}
DETAIL = {
    "detail": Measure(
        "Fine detail, in %",
        100,
        "{:.2f}",
        "The share of the pictures' power above half of the Nyquist frequency. Fresh pictures have {fresh}.",
    ),
    "edges": Measure(
        "Edges",
        1,
        "{:.2f}",
        "The mean absolute difference between neighboring pixels, of values from 0 to 255. Fresh pictures have "
        "{fresh}.",
    ),
}
"""What is measured of the shapes at every gamma, and of which neither more nor less is better."""


def page(found: Mapping[str, Results]) -> str:
    """Return the text of docs/quality.md, or if there is only one world, the tables of that world."""
    parts = {name: part(name, results) for name, results in found.items()}
    if len(parts) == 1:
        return next(iter(parts.values()))
    board, pictures = found[checkerboard.NAME], found[shapes.NAME]
    return Template((HERE / "page.md").read_text(encoding="utf-8")).substitute(
        huber_c=HUBER_C,
        ema_decay=EMA_DECAY,
        seeds=len(SEEDS),
        methods="\n".join(f"| {each.name} | {each.about} | {each.gamma:g} |" for each in METHODS.values()),
        checkerboard_size=f"{checkerboard.ITERATIONS} iterations of {checkerboard.BATCH} points, "
        f"{len(checkerboard.LEARNING_RATES)} learning rates tried.",
        shapes_size=f"{shapes.ITERATIONS} iterations of {shapes.BATCH} pictures, {len(shapes.LEARNING_RATES)} learning "
        f"rates tried with {shapes.TRY_ITERATIONS} iterations each.",
        guidance=f"{TEACHER_GUIDANCE:g}",
        checkerboard_noise=_reference(board, "fresh data", "distance"),
        checkerboard_to_data=_table(board, MAIN, "distance"),
        unevenness=f"{100 * pictures.references[0]['teacher']['unevenness']:.1f}",
        shapes_noise=_reference(pictures, "fresh data", "distance"),
        shapes_noise_teacher=_reference(pictures, "DDIM 50", "from_teacher"),
        shapes_to_teacher=_table(pictures, MAIN, "from_teacher"),
        shapes_to_world=_table(pictures, MAIN, "distance"),
        open_noise_teacher=_reference(pictures, "DDIM 50", "open_from_teacher"),
        open_to_teacher=_table(pictures, MAIN, "open_from_teacher"),
        detail="\n\n".join(
            _section(pictures, key, measure, _by_gamma(pictures, key, measure, MAIN)) for key, measure in DETAIL.items()
        ),
        torch=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}",
        hours=f"{sum(results.seconds for results in found.values()) / 3600:.1f}",
        **parts,
    )


def part(name: str, results: Results) -> str:
    """Return the tables of one world."""
    about = ABOUT[name]
    return (
        Template((HERE / "world.md").read_text(encoding="utf-8"))
        .substitute(
            name=name,
            distance_is=about.distance_is.format(fresh=_reference(results, "fresh data", "distance")),
            distances=_table(results, results.lr, "distance"),
            by_gamma="\n\n".join(
                f"{title.capitalize()}:\n\n{_by_gamma(results, measure)}" for measure, title in about.goals.items()
            ),
            goals="\n".join(f"* {line}" for line in _goals(results, about.goals)),
            trajectories=_trajectories(results),
            others="\n\n".join(
                _section(results, key, measure, _table(results, results.lr, key, measure))
                for key, measure in about.others.items()
            ),
            method=S_PLUS,
            variations=_variations(results, about.goals),
            tries=_tries(results),
        )
        .strip()
    )


def _section(results: Results, key: str, measure: Measure, table: str) -> str:
    """Return the section of a measured quantity other than the distance."""
    fresh = _reference(results, "fresh data", key, measure)
    return "\n\n".join(filter(None, (f"### {measure.title}", measure.note.format(fresh=fresh), table)))


def write(found: Mapping[str, Results], made: Path) -> None:
    """Write the page, its plots, and pictures drawn by the students in the folder `made`."""
    folder = DOCS / "quality"
    folder.mkdir(exist_ok=True)
    for world in (checkerboard, shapes):
        results = found[world.NAME]
        gamma = {name: best_gamma(results, name) for name in results.lr}
        world.draw(results.lr, gamma, made / world.NAME, folder / f"{world.NAME}-pictures.png")
    for name, results in found.items():
        _plot_distances(results, folder / f"{name}-distance.png")
        _plot_trajectories(results, folder / f"{name}-trajectory.png")
    (DOCS / "quality.md").write_text(page(found), encoding="utf-8")


def _values(results: Results, name: str, steps: int, gamma: float, measure: str) -> list[float]:
    """Return what each seed's run measured."""
    key = f"{steps} {gamma if steps > 1 else 0:g}"
    return [run["samples"][key][measure] for run in results.runs[name]]


def _means(results: Results, name: str, measure: str = "distance", gamma: float | None = None) -> list[float]:
    """Return the mean over seeds, times 1000, by steps, with the method's best gamma if no other is given."""
    gamma = best_gamma(results, name) if gamma is None else gamma
    return [1e3 * statistics.mean(_values(results, name, steps, gamma, measure)) for steps in STEPS]


def best_gamma(results: Results, name: str) -> float:
    """Return the gamma of the smallest distance, by the geometric mean over 2 and more steps."""

    def score(gamma: float) -> float:
        return math.prod(max(mean, 0.1) for mean in _means(results, name, gamma=gamma)[1:])

    return min(GAMMAS, key=score)


def _teacher(results: Results, measure: str = "distance") -> float:
    """Return the mean, times 1000, of what the teacher draws in 50 steps of DDIM."""
    return statistics.mean(1e3 * each["DDIM 50"][measure] for each in results.references)


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return form.format(*values)
    return f"{form} ({form})".format(statistics.mean(values), statistics.stdev(values))


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


DISTANCE = Measure("", 1e3, "{:.1f}")


def _table(results: Results, names: Iterable[str], key: str, measure: Measure = DISTANCE) -> str:
    """Return the table by steps, of methods with their best gammas and of the teacher's solvers."""

    def cells(name: str, gamma: float) -> Iterator[str]:
        for steps in STEPS:
            yield _spread([measure.scale * each for each in _values(results, name, steps, gamma, key)], measure.form)

    rows = [[f"{name}, γ {gamma:g}", *cells(name, gamma)] for name in names for gamma in [best_gamma(results, name)]]
    for solver in ("DDIM", "DPM-Solver++(2M)", *(f"TCD, γ {gamma:g}" for gamma in FRESH_NOISE)):
        by_steps = (_reference(results, f"{solver} {steps}", key, measure) for steps in STEPS)
        rows.append([f"teacher, {solver}", *by_steps])
    best = _reference(results, "DDIM 50", key, measure)
    rows.append(["teacher, DDIM, 50 steps", *[""] * (len(STEPS) - 1), best])
    return _rows(["steps", *map(str, STEPS)], rows)


def _variations(results: Results, measures: Mapping[str, str]) -> str:
    """Return the tables of the variations, together with the methods that they vary."""
    others = [name for name in results.runs if name not in results.lr]
    if not others:
        return ""
    names = [*dict.fromkeys(ALL[name].of for name in others), *others]
    tables = (f"{title.capitalize()}:\n\n{_table(results, names, measure)}" for measure, title in measures.items())
    return "\n\n".join(["### Variations", *tables]) + "\n"


def _reference(results: Results, name: str, key: str, measure: Measure = DISTANCE) -> str:
    found = [measure.scale * each[name][key] for each in results.references if name in each]
    return _spread(found, measure.form) if found else ""


def _by_gamma(results: Results, key: str, measure: Measure = DISTANCE, names: Iterable[str] = ()) -> str:
    """Return the means at every gamma, of methods (all without `names`) and of the teacher by the TCD sampler."""
    rows = []
    for name in names or results.lr:
        for gamma in GAMMAS:
            means = (measure.scale / 1e3 * each for each in _means(results, name, key, gamma))
            rows.append([name, f"{gamma:g}", *map(measure.form.format, means)])
    for gamma in GAMMAS:
        solver = f"TCD, γ {gamma:g}" if gamma else "DDIM"
        names = [f"{solver} {steps}" for steps in STEPS]
        found = [[each[name][key] for each in results.references if name in each] for name in names]
        means = (measure.scale * statistics.mean(values) for values in found)
        rows.append(["teacher", f"{gamma:g}", *map(measure.form.format, means)])
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
    """Return one line for each goal of S+, with the result and whether it is met."""
    goals = [*_goals_of_distances(results, measures), _goal_of_jumps(results)]
    if "open_distance" in results.references[0]["fresh data"]:
        for captions, key in {"complete": "distance", "partial": "open_distance"}.items():
            lcm, found = (_means(results, name, key)[2] for name in ("LCM", S_PLUS))
            what = f"distance to the world, {captions} captions, with 4 steps"
            goals.append(_goal(what, found, 0.7 * lcm, "0.7 of LCM's"))
    return [f"{text}: **{'met' if met else 'not met'}**" for text, met in goals]


def _goal(what: str, found: float, limit: float, limit_is: str) -> tuple[str, bool]:
    return f"{what}: {found:.2f} (goal: at most {limit:.2f}, {limit_is})", found <= limit


def _goals_of_distances(results: Results, measures: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    noise = statistics.stdev(1e3 * each["fresh data"]["distance"] for each in results.references)
    world, called = _means(results, S_PLUS), measures["distance"]
    most = max(world[1:])
    yield _goal(f"{called} with 2 to 32 steps", most, world[2] + 2 * noise, "its own with 4 steps and twice the noise")
    yield _goal(f"{called} with 2 to 32 steps", most, _teacher(results), "the teacher's with 50 steps")
    nearest = "from_teacher" if "from_teacher" in measures else "distance"
    found, lcm, called = _means(results, S_PLUS, nearest), _means(results, "LCM", nearest), measures[nearest]
    if nearest == "from_teacher":
        yield _goal(f"{called} with 2 to 32 steps", max(found[1:]), 0.5, "about the noise")
    yield _goal(f"{called} with 1 step", found[0], 0.5 * lcm[0], "half of LCM's")
    yield _goal(f"{called} with 2 steps", found[1], 0.7 * min(lcm), "0.7 of LCM's best")


def _goal_of_jumps(results: Results) -> tuple[str, bool]:
    found, before = (_errors(results, name) for name in (S_PLUS, BEFORE))
    ratio = max(found[pair] / before[pair] for pair in found)
    return _goal(f"errors of the jumps, relative to {BEFORE}, at most", ratio, 0.7, "for every t and s")


def _plot_distances(results: Results, path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(GAMMAS), figsize=(12, 4), sharey=True, layout="constrained")
    for panel, gamma in zip(panels, GAMMAS, strict=True):
        for name in results.lr:
            means = [max(each, 0.3) for each in _means(results, name, gamma=gamma)]
            panel.plot(STEPS, means, marker="o", label=name)
        panel.axhline(max(_teacher(results), 0.3), color="gray", linestyle=":", label="teacher, DDIM, 50 steps")
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
