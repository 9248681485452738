"""Scripts import these modules from other places than they live in: one module under both names."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from parallel_core.compat import mindspeed


def test_parallel_state_is_where_megatron_has_it() -> None:
    from parallel_core import parallel_state as short
    from parallel_core.compat import parallel_state

    assert short is parallel_state


@pytest.mark.parametrize("name", ["", *(f".{module.name}" for module in pkgutil.iter_modules(mindspeed.__path__))])
def test_every_mindspeed_module_has_its_short_path(name: str) -> None:
    short = importlib.import_module("parallel_core.mindspeed_compat" + name)
    assert short is importlib.import_module("parallel_core.compat.mindspeed" + name)
