"""Shared set-up of all tests: the collector of multi-rank cases."""

from __future__ import annotations

from tests.helpers.collect_cases import (  # noqa: F401
    pytest_collect_file,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_pycollect_makemodule,
    pytest_sessionfinish,
)
