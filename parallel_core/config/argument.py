"""One row of the argument table: its name and spellings, how it is read, and what becomes of it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

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
    status: str,
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
    return Argument(status=status, name=name, kind=kind, default=default, flags=on, off_flags=off, **rest)  # type: ignore[arg-type]


def mapped(
    name: str, kind: str, default: object, fields: str, help_text: str, *, direct: bool = True, **rest: object
) -> Argument:
    """Return a row whose value reaches the config; `fields` are dotted paths separated by spaces."""
    return build(MAPPED, name, kind, default, fields=tuple(fields.split()), direct=direct, help=help_text, **rest)  # type: ignore[arg-type]


def parse_rows(text: str, status: str, **rest: object) -> tuple[Argument, ...]:
    """Return the rows of a block of lines `name [kind] [= default [| other default ...]] [--flag ...]`.

    The kind is `str` where none is written; defaults are Python literals, those after the first are what other
    Megatron versions take. Switches start off (`flag`) or on (`off`) unless a default is written.
    """
    rows = []
    for line in text.strip().splitlines():
        words = line.split()
        flags = tuple(word for word in words if word.startswith("--"))
        head, _, tail = " ".join(word for word in words if not word.startswith("--")).partition(" = ")
        name, _, kind = head.partition(" ")
        values = [ast.literal_eval(value) for value in tail.split(" | ")] if tail else [kind == "off"]
        default = values[0] if tail or kind in SWITCHES else None
        row = build(status, name, kind or "str", default, flags=flags, harmless=tuple(values[1:]), **rest)  # type: ignore[arg-type]
        rows.append(row)
    return tuple(rows)


def ignored_rows(reason: str, text: str, origin: str = "Megatron-LM") -> tuple[Argument, ...]:
    """Return rows that change nothing, for `reason`."""
    return parse_rows(text, IGNORED, reason=reason, origin=origin)


def refused_rows(feature: str, text: str, origin: str = "Megatron-LM") -> tuple[Argument, ...]:
    """Return rows that belong to `feature`, which is not built: any value that asks for it is an error."""
    return parse_rows(text, REFUSED, reason=feature, origin=origin)
