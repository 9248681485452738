"""Tests that run on several ranks: how to write one, and what it gets.

In `tests/ranks/cases_<area>.py`:

    from tests.helpers.cases import CaseContext, case

    @case(world_size=(1, 2), variants=[{"sequence_parallel": False}, {"sequence_parallel": True}])
    def test_column_parallel(ctx: CaseContext, sequence_parallel: bool) -> None:
        ...                       # the same on every rank; np.testing.assert_allclose says what differs

pytest shows `test_column_parallel[2 ranks, sequence_parallel=True]` and so on. All selected cases of one world size
run in one job, in file order; with one rank a case runs in the pytest process. Communication is initialised once per
job (`session.py`); groups have global names, so ask for the same group by the same name. Before each case both
NumPy's and MindSpore's generators are seeded with 0.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.helpers.session import session_module

CaseFunction = Callable[..., None]


@dataclass(frozen=True)
class CaseContext:
    """What a case knows about where it runs."""

    rank: int
    world_size: int
    tmp_path: Path
    """An empty directory of this case, shared by its ranks."""


@dataclass(frozen=True)
class CaseDefinition:
    """What the decorator was told."""

    world_sizes: tuple[int, ...]
    variants: tuple[Mapping[str, object], ...]
    timeout_s: float
    slow: bool


@dataclass(frozen=True)
class Case:
    """One case of one world size and variant."""

    path: Path
    function: str
    variant: int
    world_size: int
    timeout_s: float = 120.0
    label: str = ""
    slow: bool = False


def case(
    *,
    world_size: int | Sequence[int],
    variants: Sequence[Mapping[str, object]] = ({},),
    timeout_s: float = 120.0,
    slow: bool = False,
) -> Callable[[CaseFunction], CaseFunction]:
    """Mark a function of a `cases_*.py` module as a test that runs on `world_size` ranks.

    Args:
        world_size: the number of ranks, or several, each a test of its own; 1 runs in the pytest process.
        variants: keyword arguments, one test for each.
        timeout_s: when to give up, show where every rank stands, and end the job.
        slow: whether the test is left out by `-m "not slow"`.
    """
    sizes = (world_size,) if isinstance(world_size, int) else tuple(world_size)

    def mark(function: CaseFunction) -> CaseFunction:
        function.case_definition = CaseDefinition(sizes, tuple(variants), timeout_s, slow)  # type: ignore[attr-defined]
        return function

    return mark


def load_module(path: Path) -> ModuleType:
    """Import the case module at `path`; each is imported once per process."""
    name = "rank_cases_" + "_".join(path.with_suffix("").parts[-3:])
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def cases_of(path: Path) -> list[Case]:
    """Return the cases of a module, in file order."""
    found = []
    for name, function in vars(load_module(path)).items():
        definition = getattr(function, "case_definition", None)
        if definition is None or not name.startswith("test_"):
            continue
        for size in definition.world_sizes:
            for number, arguments in enumerate(definition.variants):
                words = [
                    f"{size} rank{'s' if size > 1 else ''}",
                    *(f"{key}={value}" for key, value in arguments.items()),
                ]
                label = ", ".join(words)
                found.append(Case(path, name, number, size, definition.timeout_s, label, definition.slow))
    return found


def run_case(one: Case, context: CaseContext) -> None:
    """Run a case as this rank, from freshly seeded generators."""
    session_module().before_case()
    function = getattr(load_module(one.path), one.function)
    function(context, **function.case_definition.variants[one.variant])
