"""What runs on GitHub: pinned, with the least rights and an end, and nothing is published that was not tested.

And the extras and constraints by which all of it is installed.
"""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from test_wheel import SHORT_DEMO, STAYS_OUTSIDE

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = {path.stem: path for path in sorted((GITHUB / "workflows").glob("*.yml"))}
ACTIONS = sorted((GITHUB / "actions").glob("*/action.yml"))
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NODES_PYTHON, TRAINER_PYTHONS = "3.10", ["3.11", "3.12", "3.13"]  # the oldest that ComfyUI runs on; the tested ones
TOKEN = "secrets.REGISTRY_ACCESS_TOKEN"

each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def read(path: Path) -> dict[str, Any]:
    """A file's YAML; `on`, which is true in YAML 1.1, under its own name."""
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in loaded.items()}


def jobs(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(WORKFLOWS[name])["jobs"]
    return found


def steps() -> Iterator[dict[str, Any]]:
    """Every step of every workflow and of every action of this repository."""
    for name in WORKFLOWS:
        for job in jobs(name).values():
            yield from job.get("steps", ())
    for path in ACTIONS:
        yield from read(path)["runs"]["steps"]


def test_there_are_the_three_workflows() -> None:
    assert set(WORKFLOWS) == {"audit", "publish_action", "test"} and ACTIONS
    assert read(WORKFLOWS["test"])["on"].keys() >= {"push", "pull_request"}
    assert read(WORKFLOWS["publish_action"])["on"]["push"] == {"branches": ["main"], "paths": ["pyproject.toml"]}


@pytest.mark.parametrize("path", [*WORKFLOWS.values(), *ACTIONS], ids=lambda path: path.parent.name + "-" + path.stem)
def test_every_action_of_others_is_pinned_by_its_commit(path: Path) -> None:
    used = re.findall(r"^\s*(?:- )?uses: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert used, "what runs here uses at least one"
    for action in used:
        if action.startswith("./"):
            assert (ROOT / action).exists(), f"there is no {action} here"
        else:
            assert PINNED.fullmatch(action), f"{action}: name a commit, and its version in a comment"


def test_no_checkout_leaves_its_key_behind() -> None:
    checkouts = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] is False for step in checkouts)


@each_workflow
def test_every_workflow_may_only_read_and_waits_for_itself(name: str) -> None:
    workflow = read(WORKFLOWS[name])
    assert workflow["permissions"] == {"contents": "read"}
    assert not [job for job in jobs(name).values() if "permissions" in job], "none has more"
    assert workflow["concurrency"]["group"] and "cancel-in-progress" in workflow["concurrency"]


@each_workflow
def test_every_job_ends_after_some_time(name: str) -> None:
    for job in jobs(name).values():
        if "uses" in job:  # GitHub has no limit for such a job itself: those of the workflow that it calls hold
            called = jobs(Path(job["uses"]).stem)
            assert all("uses" not in each for each in called.values())
        else:
            assert 1 <= job["timeout-minutes"] <= 120


def test_all_kinds_of_tests_run() -> None:
    lines = {
        name: [step["run"].strip() for step in job["steps"] if "run" in step] for name, job in jobs("test").items()
    }
    assert lines.keys() == {"lint", "quick", "host", "wheel"}
    assert lines["lint"] == ["make lint"] and lines["host"][-1] == "make test"
    assert jobs("test")["quick"]["strategy"]["matrix"] == {"python": TRAINER_PYTHONS}
    (quick,) = lines["quick"]
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert quick.removeprefix(".venv/bin/") in recipe, "the quick part is the one of make test"


def test_the_wheel_is_used_as_its_own_test_uses_it() -> None:
    *_, use, look = (step["run"] for step in jobs("test")["wheel"]["steps"] if "run" in step)
    assert "clean/bin/tcd-train --help\n" in use
    assert f"clean/bin/python -m trajectory_consistency.trainer.demo {' '.join(SHORT_DEMO)}\n" in use
    assert "clean/bin/tcd-train run sd15 base.path=tiny data.folder=pictures " in use
    assert f"for name in {' '.join(STAYS_OUTSIDE)}; do\n" in look


def test_the_tests_in_comfyui_are_not_skipped_for_want_of_one() -> None:
    host = jobs("test")["host"]
    assert re.fullmatch("[0-9a-f]{40}", host["env"]["COMFYUI_COMMIT"])
    assert host["env"]["CHROMIUM_PATH"], "a browser that is named and not there is an error"
    named = [
        step["run"] for step in host["steps"] if 'echo "COMFYUI_PATH=$comfy" >> "$GITHUB_ENV"' in step.get("run", "")
    ]
    assert len(named) == 1, "and so is a ComfyUI"


def test_nothing_is_published_before_all_tests_have_passed() -> None:
    assert "workflow_call" in read(WORKFLOWS["test"])["on"]
    must_pass = [*jobs("test").values(), *steps()]
    assert not [each for each in must_pass if "continue-on-error" in each or "if" in each], "each runs, and must pass"
    published = jobs("publish_action")
    tests = [name for name, job in published.items() if job.get("uses") == "./.github/workflows/test.yml"]
    assert len(tests) == 1
    for name, job in published.items():
        assert name in tests or job["needs"] == tests[0]
        assert job["if"].startswith("github.repository_owner == "), "it runs for the owner alone"
        assert "always()" not in job["if"] and "secrets" not in job


def test_only_the_last_step_has_the_key_of_the_registry() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*WORKFLOWS.values(), *ACTIONS)]
    assert "".join(texts).count("secrets.") == 1
    *before, last = jobs("publish_action")["publish"]["steps"]
    assert TOKEN in str(last["env"]) and TOKEN not in str(before) and "uses" not in last


@pytest.mark.parametrize(
    ("workflow", "job", "program"), [("publish_action", "publish", "comfy-cli"), ("audit", "packages", "pip-audit")]
)
def test_what_publishes_and_what_audits_are_pinned_to_the_file(workflow: str, job: str, program: str) -> None:
    (install,) = (step["run"] for step in jobs(workflow)[job]["steps"] if "pip install" in step.get("run", ""))
    assert "--no-deps --only-binary=:all: --require-hashes" in install
    named = ROOT / install.split("-r ")[1].strip()
    lines = [line for line in named.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert any(line.startswith(f"{program}==") for line in lines)
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_every_list_of_versions_is_audited_each_week_and_when_it_changes() -> None:
    """Without --strict, a package that the service does not know would pass; with an `if`, a finding could."""
    on, packages = read(WORKFLOWS["audit"])["on"], jobs("audit")["packages"]
    assert on["schedule"] and on["push"]["paths"] == on["pull_request"]["paths"] == ["constraints.txt", ".github/**"]
    assert packages["env"]["AUDIT"].startswith("pip-audit --strict ")
    lines = [step["run"] for step in packages["steps"] if step.get("run", "").startswith("$AUDIT ")]
    lists = ["constraints.txt", *(str(path.relative_to(ROOT)) for path in sorted(GITHUB.glob("*/requirements.txt")))]
    assert len(lists) == 3 and {f"$AUDIT -r {name}" for name in lists} <= set(lines)
    assert packages["steps"][-1]["with"]["path"] == lines[-1].split("--output ")[1], "the list of packages is kept"


def test_builds_take_the_tested_setuptools() -> None:
    """An isolated build ignores -c, and would take the newest."""
    assert read(WORKFLOWS["test"])["env"] == {"PIP_BUILD_CONSTRAINT": "constraints.txt"}


def test_the_package_names_the_pythons_on_which_it_is_tested_and_the_oldest_of_the_nodes() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert named == [NODES_PYTHON, *TRAINER_PYTHONS]
    assert PROJECT["requires-python"] == f">={NODES_PYTHON}"
    lint = PYPROJECT["tool"]["ruff"]
    assert lint["target-version"] == f"py{NODES_PYTHON.replace('.', '')}"
    assert lint["per-file-target-version"]["trainer/**"] == f"py{TRAINER_PYTHONS[0].replace('.', '')}"


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_says_from_which_version_on_and_never_up_to_which(extra: str) -> None:
    for text in EXTRAS[extra]:
        operators = [each.operator for each in Requirement(text).specifier]
        assert operators == [">="], f"{text}: the host, or the user, chooses which of the later ones"


def test_the_extras_are_sorted_and_ask_for_nothing_twice() -> None:
    assert EXTRAS.keys() >= {"bench", "bnb", "comfyui", "dev", "tensorboard", "trainer"}
    names = {extra: [canonicalize_name(Requirement(text).name) for text in texts] for extra, texts in EXTRAS.items()}
    assert all(found == sorted(set(found)) for found in names.values())
    assert not set(names["trainer"]) & set(names["dev"])
    assert set(names["comfyui"]) <= set(names["trainer"])
    bounds: dict[str, set[str]] = {}
    for texts in EXTRAS.values():
        for each in map(Requirement, texts):
            bounds.setdefault(canonicalize_name(each.name), set()).add(str(each.specifier))
    assert not {name: found for name, found in bounds.items() if len(found) > 1}, "one bound, wherever it is asked for"


def licence_rows() -> list[tuple[str, str, str]]:
    """Return (extra, package, licence) of each row of the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| extra | package | licence | why |\n")[1]
    rows, extra = [], ""
    for line in text.split("\n\n")[0].splitlines()[1:]:
        named, package, licence, _ = (cell.strip() for cell in line.strip("|").split("|"))
        extra = named.strip("`") or extra
        rows.append((extra, package, licence))
    return rows


def test_every_package_that_an_extra_asks_for_is_listed() -> None:
    asked = {(extra, Requirement(text).name) for extra, texts in EXTRAS.items() for text in texts}
    listed = [(extra, package) for extra, package, _ in licence_rows()]
    assert len(listed) == len(set(listed)) and set(listed) == asked


@pytest.mark.parametrize(("package", "licence"), sorted({row[1:] for row in licence_rows()}))
def test_the_licence_of_each_package_is_the_one_that_it_states(package: str, licence: str) -> None:
    """Older metadata have no SPDX expression but words, such as "Apache 2.0 License"."""
    try:
        metadata = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    expression = metadata.get_all("License-Expression", [])
    words = [word for word in metadata.get_all("Classifier", []) if word.startswith("License ::")]
    stated = " ".join(expression or metadata.get_all("License", []) + words)
    for part in re.split(" and | or ", licence):
        assert (part if expression else part.split("-")[0]) in stated


def test_the_versions_that_are_tested_together_are_of_all_that_the_extras_ask_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    by_name = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(by_name)
    for each in (Requirement(text) for texts in EXTRAS.values() for text in texts):
        assert each.specifier.contains(by_name[canonicalize_name(each.name)]), f"{each}, which is not what is tested"
