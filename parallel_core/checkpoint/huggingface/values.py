"""JSON files of a Hugging Face directory, and their values in the types the keys ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parallel_core.errors import CheckpointError
from parallel_core.records import repeated_key

MAX_JSON_BYTES = 64_000_000
"""The index of the largest models known has a tenth of this."""
_LARGEST = 2**31 - 1
_MOST_LAYERS = 10_000


class Wrong(ValueError):
    """A value is not what its key takes, or stands for what is not built; the text says which."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: it is no regular file, too large, no JSON object, or names a key twice.
    """
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is not a file")
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, more than {MAX_JSON_BYTES}")
        found = json.loads(file.read_bytes(), object_pairs_hook=_unique, parse_constant=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds {type(found).__name__}, not a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise ValueError(f"the key {twice!r} stands twice")
    return dict(pairs)


def _finite(word: str) -> float:
    raise ValueError(f"{word} is no number that a setting can have")


def count(value: Any) -> int:
    """Return a whole number above zero."""
    if type(value) is int and 0 < value <= _LARGEST:
        return value
    raise Wrong(f"takes a whole number from 1 to {_LARGEST}")


def layers(value: Any) -> int:
    """Return a number of layers; what is done for each of them must end."""
    if count(value) <= _MOST_LAYERS:
        return int(value)
    raise Wrong(f"takes at most {_MOST_LAYERS}")


def number(value: Any) -> float:
    """Return a finite number above zero."""
    if type(value) in (int, float) and 0 < value <= 1e30 and math.isfinite(value):
        return float(value)
    raise Wrong("takes a number above zero")


def flag(value: Any) -> bool:
    """Return true or false."""
    if isinstance(value, bool):
        return value
    raise Wrong("takes true or false")


def one_of(words: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return a reader of words, each with what it stands for."""

    def read(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return words[value]
        raise Wrong(f"is not built; {', '.join(words)} are")

    return read


def word_for(words: Mapping[str, Any]) -> Callable[[Any], str]:
    """Return a writer: the first of `words` that stands for a value."""

    def write(value: Any) -> str:
        for word, meaning in words.items():
            if meaning == value:
                return word
        raise Wrong("has no word there")

    return write
