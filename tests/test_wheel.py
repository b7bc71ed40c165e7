"""What is installed by those who have no clone: one package with every file of it, and a command that works."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from trajectory_consistency.trainer.commands import COMMANDS
from trajectory_consistency.trainer.demo.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "trajectory_consistency"
PARTS = ("nodes", "tcd", "trainer")
# The help pages are read by the host alone, from the pack's folder, as are locales/ and workflows/: no import needs
# them, and a wheel is not a way to install the nodes.
OF_THE_HOST = PurePosixPath("nodes/web")
HOST_PACK = PurePosixPath("trainer/demo/tiny_pack")  # a pack of the host's, which loads its folder: data, not a package
STAYS_OUTSIDE = ("nodes", "tcd", "trainer", "tests", "workflows")  # `nodes` is a module of the host's
# As few steps as show that every part of the demo runs; .github/workflows/test.yml runs the same.
SHORT_DEMO = ("--out", "demo-out", "--steps", "2", "--samples", "8")
KINDS = {".html", ".json", ".py", ".safetensors", ".toml", ".txt", ".typed", ".yaml"}


def files_of_the_project() -> list[PurePosixPath]:
    """Every file that is under version control, or new and not ignored, and is there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [PurePosixPath(name) for name in sorted(set(listed)) if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the whole project, as building writes into the folder that it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in files_of_the_project():
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "copy" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "../out", "."]
    done = subprocess.run(command, cwd=folder / "copy", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "out").iterdir()
    return built


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and an empty folder to work in."""

    programs: Path
    packages: Path
    work: Path

    def run(self, program: str, *arguments: str) -> str:
        """Run a program of the environment in the empty folder, with nothing else on its path; return what it says.

        It finds no ComfyUI, whether this machine has one or not.
        """
        ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COMFYUI_PYTHON"}
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment["COMFYUI_PATH"] = str(self.work / "no-comfyui")
        command = [str(self.programs / program), *arguments]
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own.

    It sees the other packages of the running one by a line with their folder, which does not process the .pth files in
    there: a project that is installed editable stays out of sight.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv, work = folder / "venv", folder / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    programs = venv / ("Scripts" if os.name == "nt" else "bin")
    command = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    subprocess.run([*command, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    others = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (packages / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    return Installed(programs, packages, work)


def draw_pictures(folder: Path) -> None:
    """Two captioned pictures of 64 px."""
    folder.mkdir()
    for color in ("red", "blue"):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=color)
        picture.save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} circle", encoding="utf-8")


def test_a_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    wanted = {
        name
        for name in files_of_the_project()
        if name.parts[0] in PARTS and OF_THE_HOST not in name.parents or str(name) == "__init__.py"
    }
    assert {name.suffix for name in wanted} == KINDS, "a file of a new kind: does it belong into the wheel?"
    with zipfile.ZipFile(wheel) as archive:
        found = {PurePosixPath(name) for name in archive.namelist()}
    description = {name for name in found if name.parts[0].endswith(".dist-info")}
    assert {name.relative_to(PACKAGE) for name in found - description} == wanted


def test_a_wheel_brings_one_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        lines = archive.read(points).decode().split("\n")
    assert [line for line in lines if line] == ["[console_scripts]", f"tcd-train = {PACKAGE}.trainer.cli:main"]


def test_what_is_installed_is_the_one_package(installed: Installed) -> None:
    program = f"""
import importlib.util, {PACKAGE}
print([name for name in {STAYS_OUTSIDE} if importlib.util.find_spec(name)], {PACKAGE}.__file__)
"""
    found, _, place = installed.run("python", "-c", program).strip().partition(" ")
    assert found == "[]"
    assert Path(place).is_relative_to(installed.packages)


def test_what_is_installed_tells_its_commands(installed: Installed) -> None:
    for printed in (
        installed.run("tcd-train", "--help"),
        installed.run("python", "-m", f"{PACKAGE}.trainer", "--help"),
    ):
        assert "usage: tcd-train" in printed
        assert all(f"\n    {command} " in printed for command in COMMANDS)


def test_what_is_installed_trains_the_embedded_model_by_a_recipe(installed: Installed) -> None:
    draw_pictures(installed.work / "pictures")
    settings = (
        *("base.path=tiny", "data.folder=pictures", "data.resolution=64", "output.folder=run", "adapter.rank=4"),
        *("training.steps=1", "training.warmup_steps=0", "training.batch=2", "training.accumulate=1"),
        "preview.prompts=[]",
    )
    installed.run("tcd-train", "run", "sd15", *settings)
    made = installed.work / "run"
    with safe_open(made / "tcd-lora.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["tcd.target_time"] == "s", "as in the recipe"
    assert "1 of 1" in (made / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_is_installed_runs_the_demo(installed: Installed) -> None:
    installed.run("python", "-m", f"{PACKAGE}.trainer.demo", *SHORT_DEMO)
    made = installed.work / "demo-out"
    metrics = json.loads((made / "metrics.json").read_text(encoding="utf-8"))
    assert metrics.keys() == {"Fresh data", *(method.label for method in METHODS)}
    with Image.open(made / "grid.png") as grid:
        assert grid.height > len(metrics) * 64, "a row of pictures for each"
    printed = installed.run("tcd-train", "inspect", "demo-out/tcd-lora.safetensors")
    assert "a LoRA for tiny" in printed and "2 of 2" in (made / "target-time" / "report.html").read_text(
        encoding="utf-8"
    )


def test_the_packages_that_are_named_are_the_folders_with_code() -> None:
    names = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    ours = [name for name in files_of_the_project() if name.parts[0] != "tests" and HOST_PACK not in name.parents]
    packages = {name.parent for name in ours if name.name == "__init__.py"}
    assert {name.parent for name in ours if name.suffix == ".py"} == packages, "a folder with code has an __init__.py"
    assert names == sorted(".".join([PACKAGE, *folder.parts]) for folder in packages)


def test_every_package_says_in_one_line_what_it_is() -> None:
    packages = [name for name in files_of_the_project() if name.name == "__init__.py" and name.parts[0] != "tests"]
    assert len(packages) > len(PARTS)
    for name in packages:
        text = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")), clean=False)
        first, *rest = (text or "none").splitlines()
        assert first.endswith(".") and not "".join(rest[:1]), f"{name} begins with {first!r}"
