"""What the package calls of MindSpore, checked against a MindSpore: every name exists, every call fits its signature.

Run by any Python that has MindSpore, with nothing of this package imported: `python mindspore_calls.py PACKAGE_FOLDER`
prints one line for each call that does not fit, and ends with status 1 if there is one.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_ON_DEVICE_MEMORY = (
    "narrow view copy_ add_ mul_ sub_ zero_ index_add_ astype reshape contiguous swapaxes expand_as expand_dims stride "
    "asnumpy"
).split()
"""Methods of tensors that code for Ascend calls; which object is one, the text does not say."""


PROFILE = (
    "activities", "start_profile", "with_stack", "profile_memory", "data_process", "parallel_strategy", "hbm_ddr",
    "pcie", "on_trace_ready", "experimental_config",
)  # fmt: skip
"""What `mindspore.profiler.profile` is given as a dictionary, which the text of a call does not tell."""
MSRUN = (
    "worker_num", "local_worker_num", "master_addr", "master_port", "node_rank", "log_dir", "join", "cluster_time_out",
    "bind_core",
)  # fmt: skip
"""What msrun is started with."""


class Call(NamedTuple):
    """A call as it is written: MindSpore's name, then what is handed to it."""

    file: str
    line: int
    name: str
    on_instance: bool
    given: int
    keywords: tuple[str, ...]
    open_ended: bool


def calls_in(file: Path) -> Iterator[Call]:
    """Yield the calls of what a file imports from MindSpore, and of instances it makes of MindSpore's classes."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mindspore":
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mindspore":
                    known[alias.asname or "mindspore"] = alias.name if alias.asname else "mindspore"
    whole = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    inside = {id(inner) for function in whole for inner in ast.walk(function) if inner is not function}
    for scope in [tree, *(function for function in whole if id(function) not in inside)]:
        nodes = [node for node in ast.walk(scope) if scope is not tree or id(node) not in inside]
        made: dict[str, str] = {}
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and len(node.targets) == 1:
                name, target = _name(node.value.func, known), node.targets[0]
                if name and isinstance(target, ast.Name) and name.rpartition(".")[2][:1].isupper():
                    made[target.id] = name
        for node in nodes:
            if isinstance(node, ast.Call):
                yield from _call(file, node, known, made)


def _call(file: Path, node: ast.Call, known: dict[str, str], made: dict[str, str]) -> Iterator[Call]:
    name, on_instance = _name(node.func, known), False
    if isinstance(node.func, ast.Call):
        name, on_instance = _name(node.func.func, known), True
    elif isinstance(node.func, ast.Name) and node.func.id in made:
        name, on_instance = made[node.func.id], True
    if name:
        starred = any(isinstance(x, ast.Starred) for x in node.args) or any(k.arg is None for k in node.keywords)
        given = sum(not isinstance(x, ast.Starred) for x in node.args)
        keywords = tuple(k.arg for k in node.keywords if k.arg)
        yield Call(str(file), node.lineno, name, on_instance, given, keywords, starred)


def _name(node: ast.expr, known: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([known[node.id], *parts[::-1]]) if isinstance(node, ast.Name) and node.id in known else None


def resolve(name: str) -> Any:
    """Return what a dotted name stands for.

    Raises:
        AttributeError: nothing.
    """
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def misfit(call: Call) -> str:
    """Return why MindSpore does not take a call, or "" if it does, as far as signatures tell."""
    try:
        found = resolve(call.name)
    except AttributeError as error:
        return f"does not exist ({error})"
    if call.on_instance:
        found = found.__call__ if inspect.isclass(found) else None
    try:
        parameters = list(inspect.signature(found).parameters.values()) if found is not None else None
    except (ValueError, TypeError):
        return ""  # built in, without a signature
    if parameters is None:
        return ""
    if call.on_instance and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    kinds = {p.kind for p in parameters}
    names = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = set(call.keywords) - names
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        return f"has no argument {', '.join(sorted(unknown))}"
    if call.given > len(positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return f"takes {len(positional)} arguments, not {call.given}"
    filled = {p.name for p in positional[: call.given]} | set(call.keywords)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in filled and p.kind in (
        p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]  # fmt: skip
    return f"lacks {', '.join(missing)}" if missing and not call.open_ended else ""


def misfits(package: Path) -> list[str]:
    """Return a line for each call of the package that the present MindSpore does not take."""
    import mindspore

    found = [f"Tensor.{name} does not exist" for name in _ON_DEVICE_MEMORY if not hasattr(mindspore.Tensor, name)]
    profile = Call("", 0, "mindspore.profiler.profile", False, 0, PROFILE, False)
    found += [f"mindspore.profiler.profile {why}" for why in [misfit(profile)] if why]
    msrun = importlib.util.find_spec("mindspore.parallel.cluster.run")
    text = Path(msrun.origin).read_text(encoding="utf-8") if msrun is not None and msrun.origin else ""
    found += [f"msrun has no --{name}" for name in MSRUN if f'"--{name}"' not in text]
    for file in sorted(package.rglob("*.py")):
        for call in calls_in(file):
            why = misfit(call)
            if why:
                found.append(f"{Path(call.file).relative_to(package)}:{call.line}: {call.name} {why}")
    return found


if __name__ == "__main__":
    lines = misfits(Path(sys.argv[1]))
    print("\n".join(lines))
    sys.exit(1 if lines else 0)
