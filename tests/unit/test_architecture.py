"""Arrows point one way, from nodes down to what a strategy is, and files stay short. Read off the source."""

import ast
import importlib.util
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted(path for path in (ROOT / "cache_core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))
DEMO, ADAPTERS = ROOT / "cache_core" / "demo", ROOT / "cache_core" / "adapters"
INNER = [path for path in CORE if not path.is_relative_to(DEMO) and not path.is_relative_to(ADAPTERS)]
DEMO_FILES = [path for path in CORE if path.is_relative_to(DEMO)]
COMFYUI = [path for path in CORE if path.is_relative_to(ADAPTERS / "comfyui")]
DIFFUSERS = [path for path in CORE if path.is_relative_to(ADAPTERS / "diffusers")]


def named(path):
    return str(path.relative_to(ROOT))


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path, top_level_only=False):
    """Absolute dotted names of what a file imports; relative imports are resolved against the repository."""
    nodes = tree_of(path).body if top_level_only else list(ast.walk(tree_of(path)))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join((*package, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" if module else alias.name for alias in node.names)


def packages(path, **choice):
    return {name.split(".")[0] for name in imported(path, **choice)}


def is_inside(name, package):
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", INNER, ids=named)
def test_the_core_needs_torch_and_numpy_and_draws_with_pillow(path):
    drawing = {"PIL"} if path.name in ("sheet.py", "plot.py") else set()
    assert packages(path) - set(sys.stdlib_module_names) - drawing <= {
        "torch",
        "numpy",
        "einops",
        "safetensors",
        "cache_core",
    }


@pytest.mark.parametrize("path", INNER, ids=named)
def test_the_core_knows_no_adapter_and_no_demo(path):
    outward = ("cache_core.adapters", "cache_core.demo", "nodes")
    assert not [name for name in imported(path) if any(is_inside(name, package) for package in outward)]


@pytest.mark.parametrize("path", DEMO_FILES, ids=named)
def test_the_demo_knows_no_comfyui_and_no_adapter_of_it(path):
    names = list(imported(path))
    assert not [name for name in names if name.startswith("comfy") or is_inside(name, "nodes")]
    assert not [name for name in names if is_inside(name, "cache_core.adapters.comfyui")]


@pytest.mark.parametrize("path", COMFYUI, ids=named)
def test_the_comfyui_adapter_knows_no_nodes_and_no_diffusers(path):
    assert not packages(path) & {"nodes", "diffusers", "comfy_api"}


@pytest.mark.parametrize("path", DIFFUSERS, ids=named)
def test_the_diffusers_adapter_knows_no_comfyui(path):
    assert not [name for name in packages(path) if name.startswith("comfy") or name == "nodes"]


def test_importing_the_diffusers_adapter_does_not_import_diffusers():
    for name in ("__init__.py", "api.py"):
        assert "diffusers" not in packages(ADAPTERS / "diffusers" / name, top_level_only=True)


@pytest.mark.parametrize("path", NODES, ids=named)
def test_nodes_import_relatively_or_comfyui_torch_and_the_standard_library(path):
    ours = {"cache_core", "nodes"}
    assert packages(path) - set(sys.stdlib_module_names) - ours <= {
        "aiohttp",
        "comfy_api",
        "comfy_execution",
        "folder_paths",
        "torch",
    }
    absolute = [node.module for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not ours & {module.split(".")[0] for module in absolute}


def test_comfyui_loads_a_file_that_imports_only_what_python_has():
    assert set(imported(ROOT / "__init__.py", top_level_only=True)) <= {"sys", "pathlib", "pathlib.Path"}


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=named)
def test_no_file_has_global_state_or_a_reset(path):
    nodes = list(ast.walk(tree_of(path)))
    assert not [node.lineno for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal))]
    if path not in DIFFUSERS:  # diffusers tells its hooks that a run is over by resetting them
        assert not [node.lineno for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "reset"]


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=named)
def test_no_file_hides_errors(path):
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if handler.type is None]


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=named)
def test_no_file_prints_or_asserts(path):
    nodes = list(ast.walk(tree_of(path)))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]
    if not path.is_relative_to(DEMO):  # the demo's scripts speak to a terminal
        calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert not [call.lineno for call in calls if call.func.id == "print"]


def imports_among(files):
    """By file, which of the others it imports, at once or later."""
    by_name = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    found = {}
    for path in files:
        files_or_members = set(imported(path))
        names = {name if name in by_name else name.rpartition(".")[0] for name in files_or_members}
        found[path] = {by_name[name] for name in names & by_name.keys()} - {path}
    return found


def circle_in(files):
    """Files that import each other in a circle, from one of them back to it; nothing where there is none."""
    try:
        TopologicalSorter(imports_among(files)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("files", [NODES, CORE], ids=["nodes", "cache_core"])
def test_no_files_import_each_other_in_a_circle(files):
    assert not [named(path) for path in circle_in(files)]


@pytest.mark.parametrize(
    ("lines", "circle"),
    [
        (("from .b import x", "from . import c", "import torch"), ""),
        (("from .b import x", "from .c import y", "from . import a"), "abc"),
        (("from .b import x", "import pack.c", "def later():\n    from .b import y"), "bc"),
    ],
)
def test_the_walk_finds_such_a_circle(tmp_path, monkeypatch, lines, circle):
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    folder = tmp_path / "pack"
    folder.mkdir()
    files = [folder / f"{name}.py" for name in "abc"]
    for path, line in zip(files, lines):
        path.write_text(line, encoding="utf-8")
    assert {path.stem for path in circle_in(files)} == {*circle}


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=named)
def test_no_file_imports_for_annotations_only(path):
    words = {getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(tree_of(path))}
    assert "TYPE_CHECKING" not in words and "typing.TYPE_CHECKING" not in imported(path)


# What each folder of the core knows, besides itself.
KNOWS = {
    "strategy": set(),
    "strategies": {"strategy"},
    "model": {"strategy"},
    "report": {"strategy"},
    "run": {"strategy", "model", "report"},
    "compare": {"strategy"},
}


@pytest.mark.parametrize("path", [path for path in INNER if path.parent.name in KNOWS], ids=named)
def test_folders_know_only_what_is_below_them(path):
    core = {name.split(".")[1] for name in imported(path) if name.startswith("cache_core.")}
    assert core <= KNOWS[path.parent.name] | {path.parent.name}


# The files of run/ from bottom to top: what a run is, then what drives it. Those in one row don't know each other.
STOREYS = [
    {"solvers"},
    {"ranks", "path", "memory", "models", "telling", "beginning", "worth", "repair"},
    {"alike", "reading", "budget"},
    {"evaluation"},
    {"state"},
    {"cost"},
    {"visit", "going_on", "repairing"},
    {"stack", "sites", "guidance", "recording"},
    {"learning"},
    {"call"},
    {"run"},
]


@pytest.mark.parametrize("storey", range(len(STOREYS)), ids=lambda storey: "+".join(sorted(STOREYS[storey])))
def test_what_a_run_is_knows_nothing_of_what_drives_it(storey):
    below = set().union(*STOREYS[:storey])
    for name in STOREYS[storey]:
        path = ROOT / "cache_core" / "run" / f"{name}.py"
        assert {item.split(".")[2] for item in imported(path) if is_inside(item, "cache_core.run")} <= below, name


def test_every_file_of_a_run_has_its_storey():
    files = {path.stem for path in (ROOT / "cache_core" / "run").glob("*.py")} - {"__init__"}
    assert files == set().union(*STOREYS)


@pytest.mark.parametrize("path", [path for path in CORE if not path.is_relative_to(DEMO)], ids=named)
def test_files_and_functions_of_the_core_are_short(path):
    strict = path.is_relative_to(ADAPTERS / "diffusers" / "strict")  # as long as what it reproduces
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (250 if strict else 215)
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 40]


def test_a_reused_call_is_followed_through_few_files():
    walk = importlib.util.spec_from_file_location("walk", ROOT / "benchmarks" / "walk.py")
    module = importlib.util.module_from_spec(walk)
    walk.loader.exec_module(module)
    calls = module.walk(module.reused_call())
    assert ("strategies/first_block.py", "around") in calls
    assert module.changes(calls) <= 70


def test_the_rules_above_look_at_the_files_they_mean():
    assert len(INNER) >= 10
    assert COMFYUI
    assert DIFFUSERS
    assert NODES
    assert "cache_core.strategy.step.Step" in set(imported(ROOT / "cache_core" / "report" / "record.py"))


NEWER_THAN_3_10 = {"Self", "Never", "assert_never", "override", "Unpack", "Required", "NotRequired", "LiteralString"}


@pytest.mark.parametrize("folder", ["cache_core", "nodes", "training", "benchmarks", "examples"])
def test_nothing_is_imported_that_python_3_10_lacks(folder):
    lacks = {"tomllib", "datetime.UTC", "enum.StrEnum", *(f"typing.{name}" for name in NEWER_THAN_3_10)}
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files and {named(path): found for path in files if (found := lacks.intersection(imported(path)))} == {}
