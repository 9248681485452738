"""One row of the argument table: its name and spellings, how it is read, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAPPED = "mapped"
IGNORED = "ignored"
REFUSED = "refused"

SWITCHES = ("flag", "off", "toggle")
"""Kinds whose value is a boolean. `flag`: Megatron's flag turns it on; `off`: it turns it off; `toggle`: both exist."""
LISTS = ("ints", "floats", "strs", "layers")
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
    **rest: object,
) -> Argument:
    """Return a row with its flags filled in: Megatron's where given, else the name with dashes, and `--no-` for switches."""
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
    return Argument(status=status, name=name, kind=kind, default=default, flags=on, off_flags=off, **rest)  # type: ignore[arg-type]
