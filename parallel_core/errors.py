"""The errors users meet. Each message says which key, which value, which rule, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable


class ParallelCoreError(Exception):
    """Base of every error this package raises on purpose; the launcher prints it without a traceback."""


class ConfigError(ParallelCoreError, ValueError):
    """The user's configuration is wrong. Raised before any communicator exists, the same on every rank."""


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
