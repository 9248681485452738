"""The package's shape, held by its imports: who may know of whom, and that what is public is typed and documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "parallel_core"

LAYERS: dict[str, float] = {
    "bundled": 0,
    "spans": 0,
    "startup": 0,
    "files": 0,
    "records": 1,
    "errors": 0,
    "environment": 0,
    "layout": 1,
    "pipeline.schedule": 2,
    "pipeline.zero_bubble": 2.2,
    "pipeline.figures": 2.5,
    "deferral": 2,
    "data": 2,
    "config": 3,
    "checkpoint": 4,
    "config.checkpoint_args": 5,
    "ops": 3,
    "tape": 4,
    "autograd": 2,
    "main_grad": 2.5,
    "comm": 4,
    "context": 5,
    "tensor_parallel": 6,
    "pipeline": 6,
    "optimizer": 6,
    "context_parallel": 7,
    "adapt": 8.5,
    "expert_parallel": 7,
    "transformer": 8,
    "tracking": 8,
    "diagnose": 8,
    "training": 9,
    "launch": 10,
    "report": 10,
    "compat": 10,
    "convert": 10,
    "planner": 11,
    "config.__main__": 12,
    "launch.__main__": 12,
    "doctor": 11,
    "prepare": 10,
    "versions": 9,
    "__main__": 11,
    "generate": 11,
    "evaluate": 12,
    "question_answering": 12,
    "api": 13,
    "serve": 12,
    "parallel_state": 11,
    "mindspeed_compat": 11,
}
"""What stands on what; a module imports from lower layers, or from its own part. Every module is in one."""

SIDES = ("tensor_parallel", "pipeline", "optimizer")
"""Parts of one layer that never import each other."""

WINGS = (
    "launch", "report", "compat", "convert", "prepare", "doctor", "generate", "evaluate", "serve",
    "question_answering", "api", "planner", "config.__main__", "launch.__main__",
    "parallel_state", "mindspeed_compat",
)  # fmt: skip
"""What stands on the core; the core never imports one, and no wing another except as listed in `SHARED_BY_WINGS`."""

SHARED_BY_WINGS = {
    ("parallel_state", "compat"), ("mindspeed_compat", "compat"), ("generate", "launch"), ("doctor", "launch"),
    ("evaluate", "generate"), ("evaluate", "launch"), ("serve", "generate"), ("serve", "launch"),
    ("planner", "report"), ("planner", "launch"), ("config.__main__", "planner"),
    ("launch.__main__", "launch"), ("launch.__main__", "planner"), ("launch", "launch.__main__"),
    ("api", "generate"), ("api", "question_answering"),
    ("question_answering", "generate"), ("question_answering", "launch"),
}  # fmt: skip

PURE = (
    "files",
    "records",
    "errors",
    "environment",
    "bundled",
    "spans",
    "startup",
    "tracking",
    "diagnose.results",
    "doctor",
    "versions",
    "convert",
    "prepare",
    "layout",
    "config",
    "data",
    "checkpoint",
    "launch",
    "pipeline.schedule",
    "pipeline.check",
    "pipeline.figures",
    "pipeline.zero_bubble",
    "pipeline.executor",
    "planner",
    "report.memory",
    "report.short_run",
    "report.simulate",
    "report.run_files",
    "report.step_time",
    "report.charts",
    "report.page",
    "report.draw",
    "report.pipeline",
    "optimizer.schedules",
    "optimizer.loss_scaler",
)
"""What works without MindSpore, so that it is tested, and used by tools, without it."""

MOST_CORE_LINES = 6_500
"""The core can be read in an afternoon: the files that docs/design.md names in reading order, together."""

MOST_UNNAMED_LINES = 1_000
"""A folder with more lines than this has a line of its own in the README."""


def modules() -> dict[str, Path]:
    """Return every module by its name inside the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def part_of(module: str, parts: tuple[str, ...] | dict[str, int]) -> str | None:
    """Return the longest of `parts` that holds `module`."""
    holding = [part for part in parts if module == part or module.startswith(part + ".")]
    return max(holding, key=len, default=None)


def imports(tree: ast.AST, *, at_run_time: bool = False, at_import: bool = False) -> Iterator[str]:
    """Yield the full names of imported modules, and of what is taken from them.

    Args:
        tree: a module.
        at_run_time: leave out imports for type checking.
        at_import: leave out those inside functions too.
    """
    for node in ast.iter_child_nodes(tree):
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, at_run_time=at_run_time, at_import=at_import)


def own_imports(module: str, **options: bool) -> set[str]:
    """Return the package's modules that `module` imports, by their names inside it."""
    names = set()
    for full in imports(TREES[module], **options):
        if full == "parallel_core" or not full.startswith("parallel_core."):
            continue
        name = full.removeprefix("parallel_core.")
        names.add(name if name in MODULES else name.rpartition(".")[0])
    return names - {""}


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 60 and {"layout.mesh", "optimizer.flat", "transformer.gpt_model"} <= MODULES.keys()
    assert "comm.interface" in own_imports("tensor_parallel.linear")
    unknown = {part for part in (*LAYERS, *PURE, *SIDES) if part not in MODULES}
    assert not unknown


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name, LAYERS)])
def test_modules_import_from_below_only(module: str) -> None:
    own = part_of(module, LAYERS)
    assert own is not None
    for other in own_imports(module, at_run_time=True):
        below = part_of(other, LAYERS)
        if below is None or below.split(".")[0] == own.split(".")[0]:
            continue
        assert LAYERS[below] < LAYERS[own], f"{module} imports {other}"


@pytest.mark.parametrize("part", SIDES)
def test_tensor_parallel_pipeline_and_optimizer_do_not_know_each_other(part: str) -> None:
    for module in MODULES:
        if part_of(module, SIDES) == part:
            others = {part_of(other, SIDES) for other in own_imports(module)} - {part, None}
            assert not others, f"{module} imports from {others}"


def test_every_module_is_in_a_layer() -> None:
    homeless = [name for name in MODULES if name and part_of(name, LAYERS) is None]
    assert not homeless


_IMPORT_WITHOUT_MINDSPORE = """
import importlib, importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mindspore":
            raise ImportError("MindSpore is blocked")
        return None

sys.meta_path.insert(0, Blocked())
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module("parallel_core." + name)
    except ImportError as error:
        failed[name] = str(error)
print(failed or "all imported")
"""


def test_pure_modules_import_without_mindspore() -> None:
    """Each with its packages' __init__, as a tool without MindSpore imports it."""
    names = [name for name in MODULES if part_of(name, PURE) and not name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_WITHOUT_MINDSPORE, *names], capture_output=True, text=True, cwd=REPO
    )
    assert len(names) > 60 and done.stdout.strip() == "all imported", done.stdout + done.stderr


def test_the_core_knows_no_wing_and_wings_leave_each_other_alone() -> None:
    for module in MODULES:
        own = part_of(module, WINGS)
        for other in own_imports(module):
            wing = part_of(other, WINGS)
            assert wing in (None, own) or (own, wing) in SHARED_BY_WINGS, f"{module} imports {other}"


def test_no_module_imports_itself_through_others() -> None:
    """Imports for type checking and inside functions count too."""
    graph = {name: own_imports(name) - {name} for name in MODULES}
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        todo: list[tuple[str, bool]] = [(start, False)]
        while todo:
            name, leaving = todo.pop()
            if leaving:
                path.pop()
                done.add(name)
            elif name in path:
                raise AssertionError(f"circle: {' -> '.join([*path[path.index(name) :], name])}")
            elif name not in done:
                path.append(name)
                todo += [(name, True), *((other, False) for other in graph[name])]


def core_files() -> list[str]:
    """Return the files that docs/design.md names as the core, in its order."""
    text = (REPO / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.split("## The core, in reading order", 1)[1].split("\n## ", 1)[0]
    names: list[str] = []
    for folder, files in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section, re.M):
        names += [f"{folder.rstrip('/')}/{file}.py" for file in re.findall(r"`([^`]+)`", files)]
    return names


def test_the_core_is_named_and_small() -> None:
    names = core_files()
    missing = [name for name in names if not (REPO / name).is_file()]
    assert len(names) > 35 and not missing and len(set(names)) == len(names)
    lines = {name: len((REPO / name).read_text(encoding="utf-8").splitlines()) for name in names}
    assert sum(lines.values()) <= MOST_CORE_LINES, f"the core has {sum(lines.values())} lines"
    wings = [name for name in names if part_of(name.removesuffix(".py").replace("/", ".")[14:], WINGS)]
    assert not wings


def test_every_large_room_is_in_the_readme() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    for folder in [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]:
        files = [*folder.rglob("*.py"), *folder.rglob("*.cpp"), *folder.rglob("*.h")]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        named = re.search(rf"`(parallel_core/)?{folder.name}`", readme)
        assert lines <= MOST_UNNAMED_LINES or named, f"{folder.name} has {lines} lines and none in the README"


def test_mindspores_private_function_is_imported_in_one_place() -> None:
    users = {name for name, tree in TREES.items() if any("_grad_function" in full for full in imports(tree))}
    assert users == {"autograd"}


def test_no_torch_and_no_megatron() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(REPO / "tools").rglob("*.py"), REPO / "pretrain_gpt.py"]:
        for full in imports(ast.parse(path.read_text(encoding="utf-8"))):
            assert full.split(".")[0] not in ("torch", "megatron", "transformer_engine"), path


# ---- public API -----------------------------------------------------------------------------------------------------
def public_definitions(module: str) -> Iterator[tuple[str, ast.AST, bool]]:
    """Yield (name, definition, whether it is a method) of everything public."""
    for node in TREES[module].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{module}.{node.name}", node, False
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{module}.{node.name}.{inner.name}", inner, True


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_is_documented_and_typed(module: str) -> None:
    if MODULES[module].read_text(encoding="utf-8").strip():
        assert ast.get_docstring(TREES[module]), f"{module} says nothing of itself"
    for name, node, is_method in public_definitions(module):
        assert ast.get_docstring(node), f"{name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{name} does not say what it returns"
            static = any("staticmethod" in ast.dump(decorator) for decorator in node.decorator_list)
            given = [*node.args.posonlyargs, *node.args.args][int(is_method and not static) :]
            for argument in [*given, *node.args.kwonlyargs]:
                assert argument.annotation is not None, f"{name}: {argument.arg} has no type"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_left_undone(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError", text)
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(TREES[module])), "asserts vanish under -O"
