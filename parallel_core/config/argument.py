"""One row of the argument table: its name and spellings, how it is read, and what becomes of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from parallel_core.config.schema import DEFAULTS, NOTHING

MAPPED = "mapped"
IGNORED = "ignored"
REFUSED = "refused"

SWITCHES = ("flag", "off", "toggle")
"""Kinds whose value is a boolean. `flag`: Megatron's flag turns it on; `off`: it turns it off; `toggle`: both exist."""
LISTS = ("ints", "floats", "strs", "layers")  # "pattern" is one word: a number, or a list for every layer
"""Kinds whose value is a list; on the command line they take all words up to the next flag."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """What the program knows about one argument.

    `name` is Megatron's destination name where Megatron has the argument. A mapped argument with `direct` holds the
    value of its one field; other mapped arguments reach the fields through the rule that reads them.
    """

    name: str
    status: str
    kind: str = "str"
    default: object = None
    """What Megatron-LM (core 0.12) takes when nothing is given; for arguments of this project, what it takes itself."""
    flags: tuple[str, ...] = ()
    """Flags that set the value (or turn the switch on)."""
    off_flags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    """Other names of the same value, as keys and as flags."""
    choices: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    """(written, meant) pairs: other spellings of values."""
    fields: tuple[str, ...] = ()
    direct: bool = False
    origin: str = "Megatron-LM"
    group: str = ""
    help: str = ""
    """Mapped: the effect."""
    reason: str = ""
    """Ignored: why nothing changes. Refused: the feature that is missing."""
    harmless: tuple[object, ...] = ()
    """Refused: values that ask for nothing, such as the defaults of other Megatron versions."""

    @property
    def is_switch(self) -> bool:
        """Whether the value is a boolean."""
        return self.kind in SWITCHES

    @property
    def value_when_absent(self) -> object:
        """The default in the words the config uses."""
        return dict(self.renamed).get(self.default, self.default) if isinstance(self.default, str) else self.default

    @property
    def flag(self) -> str:
        """The usual spelling on the command line, the one that departs from the default."""
        if self.is_switch and self.default is True and self.off_flags:
            return self.off_flags[0]
        return self.flags[0]


def dashed(name: str) -> str:
    """Return `name` as a flag: two dashes in front and dashes for underscores."""
    return "--" + name.replace("_", "-")


def build(
    name: str,
    kind: str = "str",
    default: object = None,
    *,
    flags: Iterable[str] = (),
    older_off_flags: Iterable[str] = (),
    **rest: object,
) -> Argument:
    """Return a row with its flags: Megatron's where given, else the name with dashes, and `--no-` for switches."""
    given = tuple(flags)
    on: tuple[str, ...] = (dashed(name),)
    off: tuple[str, ...] = ()
    if kind == "off":
        off = given or (dashed("no_" + name),)
    elif kind in ("flag", "toggle"):
        on = given or on
        off = () if name.startswith("no_") else (dashed("no_" + name),)
    else:
        on = given or on
    if dashed(name) not in on and kind != "off":
        on = (*on, dashed(name))
    off = (*off, *older_off_flags)
    return Argument(name=name, kind=kind, default=default, flags=on, off_flags=off, **rest)  # type: ignore[arg-type]


_HEADER = re.compile(r"\[(.+?)(?: from ([\w-]+))?(?:: (.*))?\]")
_HOLDS, _REACHES = " -> ", " ~> "


def parse_rows(text: str) -> tuple[Argument, ...]:
    """Return the rows of a table written as text.

    A header `[ignored: reason]`, `[refused: feature]` or `[title]` (of mapped rows, a group of the documentation)
    stands over the rows it is about; `from PROJECT` before its colon or bracket names where they come from, Megatron-LM
    if nothing does. A row is one line

        name [kind] [(PROJECT)] [= default [| other default ...]] [--flag ...] [-> field ... : effect]

    with indented lines after it for what few rows have: `also` (other names), `values` (the choices), `means` (words of
    the form written=meant) and `older_off` (further flags that turn a switch off). `->` names the field that holds the
    value, `~>` the fields that a rule fills from it. The kind is `str` where none is written. Defaults are Python
    literals, those after the first are what other Megatron versions take; a row without one has its field's default,
    and without a field None, or for switches off (`flag`) and on (`off`).
    """
    rows: list[Argument] = []
    about: dict[str, object] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        header = _HEADER.fullmatch(line)
        if header:
            about = _about(header[1], header[2] or "Megatron-LM", header[3] or "")
        elif line.startswith(" "):
            rows[-1] = _with_detail(rows[-1], *line.split())
        else:
            rows.append(_row(line, about))
    return tuple(rows)


def _about(title: str, origin: str, reason: str) -> dict[str, object]:
    """Return what a header says about the rows below it."""
    status = title if title in (IGNORED, REFUSED) else MAPPED
    group = title if status == MAPPED else ""
    return {"status": status, "group": group, "origin": origin, "reason": reason}


def _row(line: str, about: dict[str, object]) -> Argument:
    direct = _HOLDS in line
    line, _, effect = line.partition(_HOLDS if direct else _REACHES)
    targets, _, help_text = effect.partition(": ")
    fields = tuple(targets.split())
    words = line.split()
    flags = [word for word in words if word.startswith("--")]
    origin = [word[1:-1] for word in words if re.fullmatch(r"\([\w-]+\)", word)]
    head, _, tail = " ".join(w for w in words if w not in flags and w[1:-1] not in origin).partition(" = ")
    name, _, kind = head.partition(" ")
    kind = kind or "str"
    values = [ast.literal_eval(value) for value in tail.split(" | ")] if tail else [_default(kind, fields, direct)]
    rest = {**about, "help": help_text, **({"origin": origin[0]} if origin else {})}
    return build(
        name, kind, values[0], flags=flags, harmless=tuple(values[1:]), fields=fields, direct=direct,
        **rest,  # type: ignore[arg-type]
    )


def _default(kind: str, fields: tuple[str, ...], direct: bool) -> object:
    """Return what a row takes that states no default: its field's, where one is "derive it" or "none", None."""
    if not direct:
        return kind == "off" if kind in SWITCHES else None
    value = DEFAULTS.get(fields[0])
    return None if not isinstance(value, bool) and value in NOTHING else value


def _with_detail(row: Argument, word: str, *rest: str) -> Argument:
    """Return `row` with one of its indented lines taken in."""
    if word == "also":
        return replace(row, aliases=rest)
    if word == "values":
        return replace(row, choices=rest)
    if word == "means":
        pairs = tuple((written, meant) for written, _, meant in (pair.partition("=") for pair in rest))
        return replace(row, renamed=row.renamed + pairs)
    if word == "older_off":
        return replace(row, off_flags=(*row.off_flags, *rest))
    raise ValueError(f"{row.name}: {word}: a line under a row starts with also, values, means or older_off")
