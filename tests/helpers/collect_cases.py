"""Shows the cases of `cases_*.py` files to pytest, each as a test of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.case_jobs import CaseFailed, CaseJobs
from tests.helpers.cases import Case, CaseContext, cases_of, run_case
from tests.helpers.session import session_module

JOBS = pytest.StashKey[CaseJobs]()


class CaseFile(pytest.File):
    """A file of multi-rank cases."""

    def collect(self) -> Iterator[CaseItem]:
        for one in cases_of(self.path):
            item = CaseItem.from_parent(self, name=f"{one.function}[{one.label}]", case=one)
            if one.slow:
                item.add_marker(pytest.mark.slow)
            yield item


class CaseItem(pytest.Item):
    """One case with its world size and variant."""

    def __init__(self, *, case: Case, **rest: object) -> None:
        super().__init__(**rest)
        self.case = case

    def runtest(self) -> None:
        if self.case.world_size > 1:
            self.config.stash[JOBS].run(self.case)
            return
        session_module().set_up(0, 1)
        directory = self.config.stash[SCRATCH] / f"one_rank_{time.monotonic_ns()}"
        directory.mkdir(parents=True)
        run_case(self.case, CaseContext(0, 1, directory))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> object:
        if isinstance(excinfo.value, CaseFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, "long")

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


SCRATCH = pytest.StashKey[Path]()


def _holds_cases(path: Path) -> bool:
    return path.suffix == ".py" and path.name.startswith("cases_")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> CaseFile | None:
    # A file named on the command line is collected as a Python module too: that one is answered below.
    if _holds_cases(file_path) and not parent.session.isinitpath(file_path):
        return CaseFile.from_parent(parent, path=file_path)
    return None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> CaseFile | None:
    return CaseFile.from_parent(parent, path=module_path) if _holds_cases(module_path) else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the cases last, by world size: one job at a time."""
    cases = sorted((item for item in items if isinstance(item, CaseItem)), key=lambda item: item.case.world_size)
    items[:] = [item for item in items if not isinstance(item, CaseItem)] + cases


def pytest_collection_finish(session: pytest.Session) -> None:
    cases = [item.case for item in session.items if isinstance(item, CaseItem)]
    if cases:
        scratch = session.config._tmp_path_factory.mktemp("cases")  # type: ignore[attr-defined]
        session.config.stash[SCRATCH] = scratch
        session.config.stash[JOBS] = CaseJobs(scratch)
        session.config.stash[JOBS].select(cases)


def pytest_sessionfinish(session: pytest.Session) -> None:
    jobs = session.config.stash.get(JOBS, None)
    if jobs is not None:
        jobs.end()
