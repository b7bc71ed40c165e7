"""What is installed by those who have no clone: every file of the two packages, and the command."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_every_file_of_the_packages_and_none_of_the_nodes(tmp_path: Path) -> None:
    for package in ("tcd", "trainer"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nodes", tmp_path / "nodes")
    wanted = {
        path.relative_to(tmp_path).as_posix()
        for package in ("tcd", "trainer")
        for path in (tmp_path / package).rglob("*")
        if path.is_file()
    }
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "tcd-train = trajectory_consistency.trainer.cli:main" in archive.read(points).decode()
    assert found == wanted and any(name.endswith("sdxl-16gb.toml") for name in found)
