"""The report: one page that needs no network, with every picture in it, and nothing of the settings lost."""

import math
import random
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from test_history import record

from tiny_base import small_config, write_inputs
from trajectory_consistency.trainer.cli import main
from trajectory_consistency.trainer.config.settings import Config
from trajectory_consistency.trainer.tiny import world
from trajectory_consistency.trainer.views.curves import Axis, color_map, curve
from trajectory_consistency.trainer.views.history import History
from trajectory_consistency.trainer.views.preview import (
    PREVIEW_FOLDER,
    TEACHER_FOLDER,
    TEACHER_STEPS,
    grid_path,
    picture_path,
    step_label,
)
from trajectory_consistency.trainer.views.preview_prompts import picture_names, save_picture
from trajectory_consistency.trainer.views.report import write_report

PROMPTS = ("a red <circle> & more", "\u00e0 gauche")
TIMES, STEPS = (0, 20, 40), (1, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run's folder, as its observers leave it."""
    values = write_inputs(tmp_path_factory.mktemp("report"))
    values["preview"] = {"prompts": PROMPTS, "steps": STEPS, "seeds": [5], "eta": 0.6, "cfg": 1.5}
    config = small_config(values, steps=40)
    config.output_folder.mkdir()
    (config.output_folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    history = History(config.output_folder)
    for step in range(1, 41):
        history(record(step, loss=1 / step))
    folder = config.output_folder / PREVIEW_FOLDER
    pictures = world.draw_pictures(world.random_scenes(20, 0), random.Random(0))
    for k, name in enumerate(picture_names(PROMPTS, [5])):
        save_picture(pictures[k], picture_path(folder, TEACHER_FOLDER, name, TEACHER_STEPS))
        for when in TIMES:
            for steps in STEPS:
                save_picture(pictures[when // 10 + steps + k], picture_path(folder, step_label(when), name, steps))
    for when in TIMES:
        grid_path(folder, when).write_bytes(b"")
    return config


def test_the_page_holds_its_pictures_and_its_settings_and_asks_for_nothing(run: Config) -> None:
    page = write_report(run.output_folder).read_text(encoding="utf-8")
    own_words = re.sub(r"data:image/jpeg;base64,[^\"]+", "", page.replace(run.to_toml(), ""))
    assert not re.search(r"(https?:)?//(?!www\.w3\.org)[a-z]", own_words)
    sources = re.findall(r'<img[^>]* src="([^"]+)"', page)
    assert len(sources) == len(PROMPTS) * (len(TIMES) + 1) * len(STEPS)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources) and "<script" not in page
    settings = re.search(r"<pre>(.*)</pre>", page, re.DOTALL)
    assert settings is not None and unescape(settings[1]) == run.to_toml()
    assert page.count("a red &lt;circle&gt; &amp; more") == 2 and "<circle>" not in page
    assert "40 of 40" in page and "tcd-lora.safetensors" in page


def test_the_teacher_stands_beside_every_row_and_how_all_were_drawn_is_said(run: Config) -> None:
    page = write_report(run.output_folder).read_text(encoding="utf-8")
    strips = page.split('class="strip"')[1:]
    assert len(strips) == len(PROMPTS)
    teachers = set()
    for strip in strips:
        rows = re.findall(r"<tr><th>(\d) steps?</th>(.*?)</tr>", strip)
        assert [int(steps) for steps, _ in rows] == list(STEPS)
        for _, row in rows:
            cells = re.findall(r"<td.*?</td>", row)
            after = [re.findall(r'alt="[^"]*after (\d+) steps', cell) for cell in cells[:-1]]
            assert after == [[str(when)] for when in TIMES]
            teachers.add(re.findall(r'<td class="teacher"><img alt="the teacher"[^>]* src="([^"]+)"', cells[-1])[0])
    assert len(teachers) == len(PROMPTS)
    assert "with eta 0.6 and cfg 1.5" in page and "50 steps, eta 0, cfg 5" in page
    assert f"the checkpoint <code>{Path(run.base.path).name}</code>" in page and "your checkpoint" not in page


def test_a_run_without_a_step_or_a_picture_has_a_page_too(run: Config, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(run.to_toml(), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "0 of 40" in page and page.count("nothing yet") == 5 and "None were drawn" in page


def test_a_picture_that_does_not_decode_is_named_and_other_files_are_left_alone(run: Config) -> None:
    folder = run.output_folder / PREVIEW_FOLDER
    path = picture_path(folder, step_label(20), picture_names(PROMPTS, [5])[0], 4)
    content = path.read_bytes()
    path.write_bytes(content[:300])
    (folder / "step-mine.jpg").write_bytes(b"")
    try:
        page = write_report(run.output_folder).read_text(encoding="utf-8")
    finally:
        path.write_bytes(content)
        (folder / "step-mine.jpg").unlink()
    assert page.count(f"{path.name} does not decode: ") == 1
    assert page.count("<img ") == len(PROMPTS) * (len(TIMES) + 1) * len(STEPS) - 1


def test_a_folder_of_something_else_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_steps_that_were_skipped_are_counted_and_change_no_number(run: Config, tmp_path: Path) -> None:
    folder = shutil.copytree(run.output_folder, tmp_path / "run")
    facts = [write_report(folder).read_text(encoding="utf-8").split("<h2")[0]]
    for step, loss, norm in ((41, math.nan, 1.0), (42, 1e9, math.inf)):
        History(folder)(record(step, loss=loss)._replace(norm=norm))
    facts.append(write_report(folder).read_text(encoding="utf-8").split("<h2")[0])
    mean = f"{sum(1 / step for step in range(1, 41)) / 40:.4g}"
    assert all(f"<b>{mean}</b>" in each for each in facts)
    assert "steps skipped" not in facts[0] and "<span>steps skipped, not finite</span><b>2</b>" in facts[1]


def heights(svg: str, kind: str) -> list[float]:
    line = re.search(f'<polyline class="{kind}" points="([^"]+)"', svg)
    assert line is not None
    return [float(point.split(",")[1]) for point in line[1].split()]


def test_a_curve_falls_where_its_numbers_do_and_skips_what_is_no_number() -> None:
    svg = curve("loss", [1, 2, 3, 4, 5], [1.0, 0.1, float("nan"), 0.01, 0.0], logarithmic=True)
    first, middle, last = heights(svg, "strong")[:3]
    assert first < middle < last and middle - first == pytest.approx(last - middle, abs=0.2)
    assert len(set(heights(curve("rate", [1, 2], [5.0, 5.0]), "strong"))) == 1
    smooth = curve("loss", [1, 2, 3, 4], [0.0, 8.0, 8.0, 8.0], smooth=2)
    low, high = heights(smooth, "faint")[:2]
    assert heights(smooth, "strong")[:4] == pytest.approx([low, (low + high) / 2, high, high], abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.021, 0.0385, [0.02, 0.025, 0.03, 0.035, 0.04]),  # too narrow for 1, 2, 5
        (0.012, 0.04, [0.01, 0.02, 0.05]),
        (0.011, 0.99, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        (1e-3, 1e2, [1e-3, 1e-2, 1e-1, 1, 10, 100]),
        (5.0, 5.0, [2, 5, 10]),
    ],
)
def test_a_logarithmic_axis_has_round_ticks(low: float, high: float, ticks: list[float]) -> None:
    axis = Axis([high, low], logarithmic=True)
    assert axis.ticks == pytest.approx(ticks) and (axis.low, axis.high) == pytest.approx((ticks[0], ticks[-1]))
    shares = [axis.fraction(tick) for tick in ticks]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
    assert axis.fraction((axis.low * axis.high) ** 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(50))
def test_ticks_are_few_and_round_and_none_is_outside(seed: int) -> None:
    draw = random.Random(seed)
    low = 10 ** draw.uniform(-8, 4)
    high = low * 10 ** draw.uniform(0.001, 9)
    for logarithmic in (True, False):
        for widen in (True, False):
            axis = Axis([low, high], logarithmic=logarithmic, widen=widen)
            assert 1 <= len(axis.ticks) <= 9 and axis.low <= low < high <= axis.high
            assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
            digits = {f"{tick:.6e}".split("e")[0].rstrip("0.") for tick in axis.ticks if tick}
            assert not (logarithmic and high / low > 3) or digits <= {"1", "2", "5"}


def test_the_axis_of_steps_has_several_round_numbers() -> None:
    svg = curve("loss", list(range(1, 2001)), [1.0] * 2000)
    assert [int(x) for x in re.findall(r'text-anchor="middle">(\d+)<', svg)] == [500, 1000, 1500, 2000]
    assert re.findall(r'text-anchor="middle">(\d+)<', curve("loss", [1, 2, 3], [1.0, 2.0, 3.0])) == ["1", "2", "3"]


def test_the_loss_by_t_and_by_the_gap_are_means_over_pictures(tmp_path: Path, run: Config) -> None:
    (tmp_path / "config.toml").write_text(run.to_toml(), encoding="utf-8")
    (tmp_path / "log.csv").write_text("step,loss,lr,norm,images_per_second\n1,1,1,1,1\n", encoding="utf-8")
    rows = "1,300,0,1000,1,1.0\n1,300,200,1000,3,5.0\n1,900,200,1000,2,0.5\n"
    (tmp_path / "loss_by_time.csv").write_text("step,t,gap,num_times,pictures,loss\n" + rows, encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    titles = re.findall(r"<title>(t|t - s), in training times (\d+): ([\d.]+)</title>", page)
    assert titles == [("t", "350", "4"), ("t", "950", "0.5"), ("t - s", "50", "1"), ("t - s", "250", "3.2")]
    assert "<title>t 300-399, t - s 200-299: 5</title>" in page


def test_the_legend_of_a_map_tells_its_numbers() -> None:
    svg = color_map([[0.011, 0.02], [0.3, 0.9]], ["0-99", "100-199"], "t - s", "t")
    assert 'fill="url(#shades)"' in svg and 'id="shades"' in svg
    legend = svg.split('fill="url(#shades)"')[1]
    assert re.findall(r">([\d.]+)</text>", legend) == ["0.02", "0.05", "0.1", "0.2", "0.5"]
    assert "shades" not in color_map([[1.0, 1.0]], ["0-99", "100-199"], "t - s", "t")


def test_a_color_map_is_darker_where_the_value_is_greater_and_empty_where_there_is_none() -> None:
    svg = color_map([[1.0, float("nan")], [10.0, 100.0]], ["0-99", "100-199"], "t - s", "t")
    shades = [float(shade) for shade in re.findall(r'fill-opacity="([^"]+)"', svg)]
    assert len(shades) == 3 and shades == sorted(shades) and shades[0] < 0.1 and shades[-1] == 1.0


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_an_error(run: Config, chromium: Path, scheme: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    page_path = write_report(run.output_folder)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1180, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        seen: list[str] = []
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url) if request.url.startswith("http") else None)
        page.goto(page_path.as_uri())
        whole = page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        count = page.evaluate("document.images.length")
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        page.screenshot(path=str(tmp_path / f"{scheme}.png"), full_page=True)
        browser.close()
    assert seen == [] and whole and count == 16 and wide == 0
