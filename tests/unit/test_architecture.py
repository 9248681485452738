"""The package's shape, held by its imports: who may know of whom, and that what is public is typed and documented."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "parallel_core"

LAYERS: dict[str, int] = {
    "errors": 0,
    "layout": 0,
    "config": 0,
    "pipeline.schedule": 0,
    "comm": 1,
    "ops": 1,
    "autograd": 1,
    "context": 2,
    "tensor_parallel": 3,
    "pipeline": 3,
    "optimizer": 3,
    "transformer": 4,
    "training": 5,
}
"""What stands on what; a module imports only from lower layers, or from its own part."""

SIDES = ("tensor_parallel", "pipeline", "optimizer")
"""Parts of one layer that never import each other."""

PURE = (
    "errors",
    "layout",
    "config",
    "launch",
    "pipeline.schedule",
    "pipeline.check",
    "pipeline.executor",
    "report.simulate",
    "report.draw",
    "optimizer.schedules",
    "optimizer.loss_scaler",
    "transformer.recompute_plan",
    "tensor_parallel.random",
    "training.microbatches",
    "training.schedule",
)
"""Modules that import nothing of MindSpore, so that they are tested, and used by tools, without it."""


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
        assert LAYERS[below] < LAYERS[own] or LAYERS[own] == LAYERS[below] <= 1, f"{module} imports {other}"


@pytest.mark.parametrize("part", SIDES)
def test_tensor_parallel_pipeline_and_optimizer_do_not_know_each_other(part: str) -> None:
    for module in MODULES:
        if part_of(module, SIDES) == part:
            others = {part_of(other, SIDES) for other in own_imports(module)} - {part, None}
            assert not others, f"{module} imports from {others}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_of_mindspore(module: str) -> None:
    """Not even through others, when they are imported."""
    seen: set[str] = set()
    todo = [name for name in MODULES if part_of(name, (module,))]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        outside = [full for full in imports(TREES[name], at_run_time=True, at_import=True) if _is_mindspore(full)]
        assert not outside, f"{module} imports {outside[0]} through {name}"
        todo += own_imports(name, at_run_time=True, at_import=True)


def _is_mindspore(full: str) -> bool:
    return full.split(".")[0] == "mindspore"


def test_parallel_state_is_for_user_code() -> None:
    facades = ("compat", "parallel_state", "mindspeed_compat")
    for module in MODULES:
        if part_of(module, facades) is None:
            assert not {other for other in own_imports(module) if part_of(other, facades)}, module


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
