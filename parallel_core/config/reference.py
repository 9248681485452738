"""`docs/arguments.md`, written from the argument table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from parallel_core.config import table
from parallel_core.config.argument import IGNORED, MAPPED, REFUSED
from parallel_core.config.checks import CHECKS
from parallel_core.config.derivations import DERIVATIONS
from parallel_core.config.explain import default_text, spellings

_HEAD = """# Arguments

This page is written by `python -m parallel_core.config docs` from the argument table.

Every argument of Megatron-LM (core 0.8 to August 2026) is mapped to the configuration, ignored for a stated reason, or
refused by name when it asks for something that is not built. Arguments can be flags, or keys of a YAML file with dashes
or underscores; `python -m parallel_core.config explain NAME` tells about one. Defaults are Megatron-LM's where the
argument is.

"""


def arguments_page() -> str:
    """Return the page."""
    return _HEAD + "\n".join([*_mapped(), *_rules(), *_listed(IGNORED), *_listed(REFUSED)]) + "\n"


def _mapped() -> Iterator[str]:
    yield "## Mapped"
    yield ""
    mapped = [row for row in table.TABLE if row.status == MAPPED]
    for title, rows in groupby(mapped, key=lambda row: row.group):
        yield f"### {title}"
        yield ""
        yield "| argument | flags | default | fields | effect |"
        yield "|---|---|---|---|---|"
        for row in rows:
            names = ", ".join(f"`{name}`" for name in (row.name, *row.aliases))
            flags = ", ".join(f"`{flag}`" for flag in spellings(row))
            fields = ", ".join(f"`{field}`" for field in row.fields)
            effect = _cell(row.help + (f" ({', '.join(row.choices)})" if row.choices else ""))
            source = "" if row.origin == "Megatron-LM" else f" [{row.origin}]"
            yield f"| {names}{source} | {flags} | {_cell(default_text(row))} | {fields} | {effect} |"
        yield ""


def _rules() -> Iterator[str]:
    for title, rules in (("Derived values", DERIVATIONS), ("What must hold", CHECKS)):
        yield f"## {title}"
        yield ""
        for name, rule in rules.items():
            yield f"- `{name}`: {' '.join((rule.__doc__ or '').split())}"
        yield ""


def _listed(status: str) -> Iterator[str]:
    yield "## Ignored" if status == IGNORED else "## Refused"
    yield ""
    if status == REFUSED:
        yield "Values that ask for nothing, such as the defaults, are accepted."
        yield ""
    reasons: dict[str, list[str]] = {}
    for row in table.TABLE:
        if row.status == status:
            reasons.setdefault(row.reason, []).append(f"`{row.name}`")
    for reason, names in reasons.items():
        yield f"- {reason[0].upper() + reason[1:]}: {', '.join(names)}."
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
