"""The rules that keep the project small: who imports whom, what an import costs, and how long a piece may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tcd", "trainer", "nodes")
HOST_PACK = ROOT / "trainer" / "demo" / "tiny_pack"  # lent to the host as a pack of its own, and run by it alone
ENGINE = Path("trainer", "models", "unet")
ENGINE_LIBRARIES = {"diffusers", "peft", "transformers"}
MADE_WITH_THE_ENGINE = (ENGINE, Path("trainer", "tiny"), Path("trainer", "demo"))
HOST_ENGINE = Path("trainer", "models", "comfy")  # the engine on the host, which trains by the code of nodes/
CHOOSES_THE_ENGINE = Path("trainer", "models", "__init__.py")
HOST_MODULES = {"comfy", "comfy_extras", "comfy_execution", "execution", "folder_paths", "latent_preview", "server"}
MODULES = [
    path.relative_to(ROOT)
    for part in PARTS
    for path in sorted((ROOT / part).rglob("*.py"))
    if HOST_PACK not in path.parents
]
FUNCTION_LINES, FILE_LINES, BLOCKS_DEEP = 60, 350, 3
BLOCKS = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match

# The rooms of trainer/, and the modules that stand in none; each may import those before it, and itself.
ROOMS = (
    *("errors", "lock", "log_file", "checked_file", "user_path", "format_bytes", "lora_file", "find_comfyui"),
    *("config", "models", "data", "files", "training", "views"),
    *("preflight", "run", "commands", "cli", "__main__", "tiny", "demo"),
)

each_module = pytest.mark.parametrize("module", MODULES, ids=str)


def imported(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the absolute name of every module that source imports anywhere; package is where source stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            stem = [*base, *(node.module or "").split(".")] if node.module else list(base)
            yield ".".join(stem)
            yield from (".".join([*stem, alias.name]) for alias in node.names)


def imports_of(module: Path) -> set[str]:
    return {name for name in imported((ROOT / module).read_text(encoding="utf-8"), module.parent.parts) if name}


def roots(module: Path) -> set[str]:
    """The top-level names that a module of this project imports, itself and the standard library aside."""
    return {name.split(".")[0] for name in imports_of(module)} - set(sys.stdlib_module_names) - {module.parts[0]}


def allowed(module: Path) -> set[str]:
    if module.parts[0] == "tcd":
        return {"torch", "safetensors"} if module.parts[1] == "files" else {"torch"}
    if module.parts[:2] == ("nodes", "host"):
        return {"einops", "safetensors", "torch", "tqdm", "tcd", "comfy_api"} | HOST_MODULES
    return {"torch", "tcd", "comfy_api"}


def room(parts: tuple[str, ...]) -> str | None:
    """The room of trainer/ in which a module stands, or the module itself where it stands in none."""
    return parts[1] if len(parts) > 1 and parts[0] == "trainer" else None


def nesting(node: ast.AST) -> int:
    """The number of blocks around the innermost statement of a function; an elif is as deep as its if."""

    def below(child: ast.AST) -> int:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            return 0  # a function by itself
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child.col_offset == node.col_offset
        return nesting(child) - is_elif

    return max(map(below, ast.iter_child_nodes(node)), default=0) + isinstance(node, BLOCKS)


def test_the_walk_sees_every_form_of_import() -> None:
    source = """
import a.b, c as d
from e import f
from . import g
from .h import i
from ..tcd import j
from .. import tcd
def late():
    import comfy.samplers
"""
    found = set(imported(source, ("nodes",)))
    assert {"a.b", "c", "e", "e.f", "nodes.g", "nodes.h", "tcd", "tcd.j", "comfy.samplers"} <= found
    assert MODULES, "no module was found"
    assert {module.parts[0] for module in MODULES} == set(PARTS)


@each_module
def test_imports_follow_the_dependency_rule(module: Path) -> None:
    if module.parts[0] == "trainer":
        # And nothing by the name under which pip installs it: ComfyUI loads the folder under a name of its own.
        forbidden = {"comfy_api", "trajectory_consistency"}
        if HOST_ENGINE not in module.parents:
            forbidden |= HOST_MODULES | {"nodes"}
        assert not roots(module) & forbidden
    else:
        assert roots(module) <= allowed(module)


@each_module
def test_rooms_of_the_trainer_import_only_those_before_them(module: Path) -> None:
    here = room(module.with_suffix("").parts)
    if here is None or here == "__init__":
        return
    used = {room(tuple(name.split("."))) for name in imports_of(module)} - {None}
    later = used - set(ROOMS[: ROOMS.index(here) + 1])
    assert not later, f"{here} comes before {', '.join(map(str, later))}"


@each_module
def test_only_an_engine_knows_its_networks(module: Path) -> None:
    """So that the rest of the trainer trains any `Model`, also where the libraries of this one are missing."""
    if any(folder in module.parents for folder in MADE_WITH_THE_ENGINE):
        return
    assert not roots(module) & ENGINE_LIBRARIES
    engine = ".".join(ENGINE.parts)
    if module != CHOOSES_THE_ENGINE:
        assert not {name for name in imports_of(module) if f"{name}.".startswith(f"{engine}.")}


def test_the_entry_point_imports_only_the_nodes() -> None:
    found = set(imported((ROOT / "__init__.py").read_text(encoding="utf-8"), ()))
    assert {name.split(".")[0] for name in found} <= {"logging", "typing", "nodes"}


def test_nesting_counts_the_blocks_of_one_function() -> None:
    source = """
def f():
    for x in y:
        if x:
            pass
        elif z:
            with x:
                pass
        def g():
            while x:
                pass
"""
    assert nesting(ast.parse(source).body[0]) == 3
    assert nesting(ast.parse("def f():\n    return 1").body[0]) == 0


@each_module
def test_nothing_is_too_long_to_read(module: Path) -> None:
    source = (ROOT / module).read_text(encoding="utf-8")
    beyond = sorted({character for character in source if not character.isascii()})
    assert not beyond
    assert len(source.splitlines()) <= FILE_LINES
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [
        f"{f.name}: {f.end_lineno - f.lineno + 1} lines" for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES
    ]
    assert not long
    assert not [f.name for f in functions if nesting(f) > BLOCKS_DEEP]


def test_importing_the_core_loads_torch_and_nothing_heavier() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import trajectory_consistency.tcd
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(loaded - set(sys.stdlib_module_names)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.stdout.strip() == "['trajectory_consistency']", run.stderr


def test_nothing_but_the_one_package_becomes_importable(tmp_path: Path) -> None:
    program = """
import importlib.util, trajectory_consistency.trainer
print([name for name in ("nodes", "tcd", "trainer") if importlib.util.find_spec(name)])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "[]", run.stderr
