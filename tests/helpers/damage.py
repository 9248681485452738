"""Ways to damage a file, for tests of what reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


WAYS: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "a folder": _folder,
    "a pipe": _pipe,  # that nobody writes to: reading it would never end
}


def flip(file: Path, bit: int) -> None:
    """Change one bit of a file."""
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def damage(file: Path, way: str | int) -> None:
    """Damage a file in one of `WAYS`, or change the bit of that number."""
    WAYS[way](file) if isinstance(way, str) else flip(file, way)
