"""The tables and the plots of docs/quality.md, from the results of all runs."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from checkerboard import BATCH, ITERATIONS, LEARNING_RATES, POINTS
from methods import GAMMAS, METHODS, SEEDS, STEPS

PAGE = Path(__file__).with_name("page.md")
DOCS = Path(__file__).resolve().parents[3] / "docs"
Found = Mapping[str, Mapping[str, Any]]
References = Sequence[Mapping[str, Mapping[str, float]]]
"""Of each seed, by name."""


def checkerboard(found: Found, references: References) -> str:
    """The text of the page."""
    own = {method.name: method.gamma for method in METHODS}

    def table(measure: str, scale: float, form: str, title: str) -> str:
        return _table(found, lambda run, steps, name: scale * _sample(run, steps, own[name])[measure], form, title)

    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        iterations=ITERATIONS,
        batch=BATCH,
        rates=len(LEARNING_RATES),
        seeds=len(SEEDS),
        points=POINTS,
        fresh=_reference(references, "fresh data"),
        distances=table("distance", 1e3, "{:.1f}", "steps"),
        teachers=_teachers(references),
        by_gamma=_by_gamma(found),
        goals="\n".join(f"* {line}" for line in _goals(found, references)),
        trajectories=_trajectories(found),
        covered=table("covered", 100, "{:.0f}", "squares"),
        strays=table("strays", 100, "{:.1f}", "on none"),
        tries=_tries(found),
        torch=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}",
    )


def write(text: str, found: Found, references: References) -> None:
    """Write the page and its plots."""
    folder = DOCS / "quality"
    folder.mkdir(exist_ok=True)
    _plot_distances(found, references, folder / "checkerboard-distance.png")
    _plot_trajectories(found, folder / "checkerboard-trajectory.png")
    (DOCS / "quality.md").write_text(text, encoding="utf-8")


def _sample(result: Mapping[str, Any], steps: int, gamma: float) -> Mapping[str, float]:
    sample: Mapping[str, float] = result["samples"][f"{steps} {gamma:g}"]
    return sample


def _distances(found: Found, name: str, gamma: float) -> list[float]:
    """Mean over seeds, times 1000, by steps."""
    runs = found[name]["runs"]
    return [statistics.mean(1e3 * _sample(run, steps, gamma)["distance"] for run in runs) for steps in STEPS]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form} ({form})".format(statistics.mean(values), statistics.stdev(values))


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table(found: Found, value: Callable[[Any, int, str], float], form: str, title: str) -> str:
    rows = [
        [name, *(_spread([value(run, steps, name) for run in result["runs"]], form) for steps in STEPS)]
        for name, result in found.items()
    ]
    return _rows([title, *map(str, STEPS)], rows)


def _reference(references: References, name: str) -> str:
    return _spread([1e3 * each[name]["distance"] for each in references], "{:.1f}")


def _teachers(references: References) -> str:
    """Rows of the teacher, to stand under those of the methods."""
    names = ("DDIM", "DPM-Solver++(2M)")
    lines = [[f"teacher, {name}", *(_reference(references, f"{name} {steps}") for steps in STEPS)] for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_gamma(found: Found) -> str:
    rows = [
        [name, f"{gamma:g}", *(f"{distance:.1f}" for distance in _distances(found, name, gamma))]
        for name in found
        for gamma in GAMMAS
    ]
    return _rows(["", "γ", *map(str, STEPS)], rows)


def _trajectories(found: Found) -> str:
    pairs = list(next(iter(found.values()))["runs"][0]["trajectory"])
    rows = [
        [name, *(f"{statistics.mean(run['trajectory'][pair] for run in result['runs']):.3f}" for pair in pairs)]
        for name, result in found.items()
    ]
    return _rows(["t → s", *(pair.replace(" ", " → ") for pair in pairs)], rows)


def _tries(found: Found) -> str:
    rates = list(next(iter(found.values()))["tries"])
    rows = [
        [name, *(f"{1e3 * result['tries'][lr]:.1f}" for lr in rates), f"{float(result['lr']):g}"]
        for name, result in found.items()
    ]
    return _rows(["1000 × mean distance of the try", *(f"{float(lr):g}" for lr in rates), "taken"], rows)


def _goals(found: Found, references: References) -> list[str]:
    """What the methods were to reach, what they reached, and whether that is enough."""
    lcm = min(min(_distances(found, "LCM", gamma)) for gamma in GAMMAS)
    tcd = _distances(found, "TCD", 0.3)
    told = _distances(found, "TCD S+", 0.3)
    ddim = statistics.mean(1e3 * each["DDIM 50"]["distance"] for each in references)
    by_lcm = _distances(found, "LCM", 1.0)
    lines = [
        (
            f"TCD from 4 to 32 steps: {tcd[2]:.1f} to {tcd[5]:.1f} (LCM: {by_lcm[2]:.1f} to {by_lcm[5]:.1f})",
            tcd[5] <= tcd[2],
        ),
        (f"TCD S+ at 2 steps, {told[1]:.1f}, at most LCM's best at any, {lcm:.1f}", told[1] <= lcm),
        (f"TCD S+ at 4 steps, {told[2]:.1f}, at most 0.6 of that, {0.6 * lcm:.1f}", told[2] <= 0.6 * lcm),
        (
            f"TCD S+ at 8 steps, {told[3]:.1f}, at most 1.5 of the teacher's at 50, {1.5 * ddim:.1f}",
            told[3] <= 1.5 * ddim,
        ),
    ]
    return [f"{text}: **{'met' if met else 'not met'}**" for text, met in lines]


def _plot_distances(found: Found, references: References, path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(GAMMAS), figsize=(12, 4), sharey=True, layout="constrained")
    floor = statistics.mean(1e3 * each["DDIM 50"]["distance"] for each in references)
    for panel, gamma in zip(panels, GAMMAS, strict=True):
        for name in found:
            panel.plot(STEPS, [max(each, 0.3) for each in _distances(found, name, gamma)], marker="o", label=name)
        panel.axhline(floor, color="gray", linestyle=":", label="teacher, DDIM, 50 steps")
        panel.set(xscale="log", yscale="log", title=f"γ = {gamma:g}", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        panel.minorticks_off()
    panels[0].set_ylabel("energy distance × 1000")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_trajectories(found: Found, path: Path) -> None:
    from matplotlib import pyplot

    pairs = list(next(iter(found.values()))["runs"][0]["trajectory"])
    figure, panel = pyplot.subplots(figsize=(12, 4), layout="constrained")
    width = 0.8 / len(found)
    for k, (name, result) in enumerate(found.items()):
        heights = [statistics.mean(run["trajectory"][pair] for run in result["runs"]) for pair in pairs]
        panel.bar([i + k * width for i in range(len(pairs))], heights, width, label=name)
    panel.set_xticks([i + 0.4 - width / 2 for i in range(len(pairs))], [pair.replace(" ", " → ") for pair in pairs])
    panel.set_ylabel("RMS error of the jump")
    panel.legend(fontsize="small", ncols=len(found))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
