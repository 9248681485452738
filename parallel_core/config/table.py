"""The argument table: every row, and the ways to find one by what a user wrote."""

from __future__ import annotations

import difflib
from functools import lru_cache

from parallel_core.config.argument import MAPPED, Argument
from parallel_core.config.arguments import read_tables

TABLE: tuple[Argument, ...] = read_tables()
BY_NAME: dict[str, Argument] = {argument.name: argument for argument in TABLE}
DIRECT: dict[str, Argument] = {argument.fields[0]: argument for argument in TABLE if argument.direct}
"""The one argument that holds each field's value, by field path."""


def normal(written: str) -> str:
    """Return a key or flag in the form it is looked up by: no leading dashes, underscores for dashes."""
    return written.lstrip("-").replace("-", "_")


@lru_cache(maxsize=1)
def _spellings() -> dict[str, tuple[Argument, bool]]:
    """Return every known spelling -> (argument, whether it states the opposite of the argument's value)."""
    found: dict[str, tuple[Argument, bool]] = {}
    for argument in TABLE:  # Names first: a flag of one argument may be the name of another (disable_msc).
        found[argument.name] = (argument, False)
    for argument in TABLE:
        for spelling in (*argument.aliases, *map(normal, argument.flags)):
            found.setdefault(spelling, (argument, False))
        for flag in argument.off_flags:
            found.setdefault(normal(flag), (argument, True))
    for argument in TABLE:
        for spelling in (argument.name, *argument.aliases, *map(normal, argument.flags)) if argument.is_switch else ():
            found.setdefault("no_" + spelling, (argument, True))
            found.setdefault("disable_" + spelling, (argument, True))
    return found


def find(written: str) -> tuple[Argument, bool] | None:
    """Return the argument that a key or flag means and whether it negates it, or None for an unknown one."""
    return _spellings().get(normal(written))


_LONGEST = 100
"""No argument has a longer name, and comparing takes time that grows with it."""


def suggestion(written: str, extra: tuple[str, ...] = ()) -> str:
    """Return "; did you mean X?" for the nearest known spelling, or an empty string."""
    if len(written) > _LONGEST:
        return ""
    usable = [name for name, (argument, _) in _spellings().items() if argument.status == MAPPED]
    for candidates in ([*usable, *extra], list(_spellings())):
        near = difflib.get_close_matches(normal(written), candidates, n=1, cutoff=0.75)
        if near:
            name = near[0].replace("_", "-") if written.startswith("--") else near[0]
            return f"; did you mean {'--' if written.startswith('--') else ''}{name}?"
    return ""
