"""A session without communication, for tests of the harness itself: its jobs start without importing MindSpore."""

from __future__ import annotations


def set_up(rank: int, world_size: int) -> None:
    """Do nothing."""


def before_case() -> None:
    """Seed nothing."""
