"""The errors users meet. Each message says which key, which value, which rule, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str) -> str:
    """Return `text` on one line, with everything a terminal would act on (escapes, controls, bidi marks) spelled out.

    For whatever comes from a file or another process: names, keys, values, lines of a log.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """Return `text` with its line breaks, each line `printable`; lines after the first are indented.

    So no part of a message, wherever it comes from, can pass for a line of its own ("INFO - ...").
    """
    first, *rest = text.split("\n")
    lines = [line if line.startswith(" ") or not line else f"  {line}" for line in rest]
    return "\n".join(map(printable, [first, *lines]))


class ParallelCoreError(Exception):
    """Base of every error this package raises on purpose; the launcher prints it without a traceback.

    Its message is made printable (`printable_lines`), whatever names of files and tensors went into it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable_lines(str(message)))


class ConfigError(ParallelCoreError, ValueError):
    """The user's configuration is wrong. Raised before any communicator exists, the same on every rank."""


class ResultError(ParallelCoreError, ArithmeticError):
    """A loss or a gradient that cannot be right, as one that is not finite. Every rank raises it before the update."""

    exit_status = 1
    """What the process ends with."""


class CommError(ParallelCoreError, RuntimeError):
    """A transfer failed or timed out. The message names the group, its ranks, the operation, shape and dtype."""


class CheckpointError(ParallelCoreError, RuntimeError):
    """A checkpoint cannot be read or written: missing, damaged, unexpected or wrong-shaped content, by name."""


class DataError(ParallelCoreError, ValueError):
    """Training data cannot be read: a missing, truncated or inconsistent file, or tokens outside the vocabulary."""


def bullet_list(items: Iterable[str], limit: int = 10) -> str:
    """Return `items` one to a line, cut after `limit` with a count of the rest."""
    items = list(items)
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)
