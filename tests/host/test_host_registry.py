"""The project's metadata and files, as ComfyUI's registry and the host read them."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from trajectory_consistency.trainer.demo.comfy_server import PACK_NAME, PACK_PARTS, ComfyServer
from trajectory_consistency.trainer.find_comfyui import PACK, Host

FORBIDDEN = ("S102", "S307", "E702")  # ruff's codes for exec, eval, and statements separated by a semicolon
READ_BY_PEOPLE = {"CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md"}
PROGRAM = """
import json, sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, ".")
from comfy_config.config_parser import extract_node_configuration
print(json.dumps(extract_node_configuration(sys.argv[1]).model_dump()))
"""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.host
def test_the_hosts_own_parser_reads_all_metadata(comfy_host: Host, project: dict[str, Any]) -> None:
    command = [str(comfy_host.python), "-c", PROGRAM, str(PACK)]
    done = subprocess.run(command, cwd=comfy_host.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    stated, comfy = project["project"], project["tool"]["comfy"]
    for key in ("name", "version", "description"):
        assert found["project"][key] == stated[key]
    assert found["project"]["license"]["text"] == stated["license"]
    assert found["project"]["dependencies"] == []
    assert found["project"]["urls"] == {
        "homepage": "",
        "documentation": stated["urls"]["Documentation"],
        "repository": stated["urls"]["Repository"],
        "issues": stated["urls"]["Issues"],
    }
    assert found["project"]["supported_os"] == ["OS Independent"]
    assert found["project"]["supported_accelerators"] == ["GPU :: NVIDIA CUDA"], "an unknown value drops the list"
    assert found["project"]["supported_comfyui_version"] == ">=0.3.48"
    assert found["tool_comfy"]["publisher_id"] == comfy["PublisherId"]
    assert found["tool_comfy"]["display_name"] == comfy["DisplayName"]
    assert found["tool_comfy"]["icon"] == comfy["Icon"]
    assert found["tool_comfy"]["web"] is None, "the entry point names the web folder; named twice, it is served twice"


@pytest.mark.host
def test_the_host_logs_no_complaint_about_the_metadata(server: ComfyServer) -> None:
    assert "pyproject" not in server.log_text()


def test_the_name_equals_the_folders_and_is_valid_in_the_registry(project: dict[str, Any]) -> None:
    name = project["project"]["name"]
    assert name == PACK_NAME
    assert not name.startswith("comfy")
    assert "." not in name, "the host looks up help pages by the folder's name up to the first dot"


def test_the_icon_exists_and_is_small_enough(project: dict[str, Any]) -> None:
    place = project["tool"]["comfy"]["Icon"]
    assert place.startswith("https://")
    icon = ElementTree.parse(PACK / place.split("/main/")[1]).getroot()
    assert int(icon.attrib["width"]) <= 400
    assert int(icon.attrib["height"]) <= 400


def test_every_file_is_in_the_package_or_excluded_on_purpose() -> None:
    lines = Path(PACK, ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.strip("/") for line in lines if not line.startswith("#")}
    listed = subprocess.run(["git", "ls-files"], cwd=PACK, capture_output=True, text=True, check=True).stdout
    present = {line.split("/")[0] for line in listed.splitlines()}
    assert set(PACK_PARTS) | READ_BY_PEOPLE == present - left_out
    assert not left_out - present, "a listed name has no file"


def served() -> list[Path]:
    """Return the files of the package: those under version control that .comfyignore does not exclude."""

    def listed(*options: str) -> set[str]:
        command = ["git", "ls-files", "--cached", *options]
        return set(subprocess.run(command, cwd=PACK, capture_output=True, text=True, check=True).stdout.splitlines())

    return [PACK / name for name in sorted(listed() - listed("--ignored", "--exclude-from=.comfyignore"))]


def forbidden(files: list[Path]) -> list[str]:
    """Return the uses of what the registry forbids that ruff finds in Python files; noqa comments are ignored."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--ignore-noqa"]
    command += ["--output-format", "json", "--select", ",".join(FORBIDDEN), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return [finding["code"] for finding in json.loads(done.stdout)]


def test_the_package_uses_nothing_that_the_registry_forbids(tmp_path: Path) -> None:
    programs = [file for file in served() if file.suffix == ".py" and file.is_file()]
    assert {file.relative_to(PACK).parts[0] for file in programs} == {"__init__.py", "nodes", "tcd"}
    assert forbidden(programs) == []
    bad = tmp_path / "bad.py"
    bad.write_text('exec("1"); eval("2")  # noqa: S102, S307, E702\n', encoding="utf-8")
    assert sorted(forbidden([bad])) == sorted(FORBIDDEN), "the check works"


def test_only_the_owner_can_publish(project: dict[str, Any]) -> None:
    workflow = (PACK / ".github" / "workflows" / "publish_action.yml").read_text(encoding="utf-8")
    owner = project["project"]["urls"]["Repository"].split("/")[-2]
    assert f"if: github.repository_owner == '{owner}'" in workflow
    assert owner == project["tool"]["comfy"]["PublisherId"]
