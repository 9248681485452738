"""Values from outside, checked where bytes become values: JSON without traps, and mappings read by type and range."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from parallel_core.errors import ParallelCoreError, printable

MAX_DEPTH = 64
"""Levels of nesting that a value from outside may have; far from where recursion ends."""
MAX_INTEGER = (1 << 63) - 1
_REQUIRED: Any = object()


class _Brief(reprlib.Repr):
    """A `repr` that stays short and quick whatever it is given, shared structure and huge numbers included."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxstring, self.maxother = 2, 3, 60, 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x) if x is None or isinstance(x, (bool, float)) else f"<{type(x).__name__}>"


def show(value: Any) -> str:
    """Return a value from outside in a few words, for a message."""
    return printable(_Brief().repr(value))


def repeated_key(pairs: list[tuple[str, Any]]) -> str | None:
    """Return the first key of a JSON object that comes again, of which a dict would keep the last value only."""
    if len(dict(pairs)) == len(pairs):
        return None
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def parse_json(data: bytes | str, where: str, error: type[ParallelCoreError]) -> Any:
    """Return what a JSON text says.

    Args:
        data: the text, UTF-8.
        where: the file, for messages.
        error: raised for whatever is wrong.

    Raises:
        ParallelCoreError: of the kind `error`: it is no JSON, a key is there twice (which would count?), or it holds
            what `check_tree` refuses.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (twice := repeated_key(pairs)) is not None:
            raise ValueError(f"the key {show(twice)} is there twice")
        return dict(pairs)

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise error(f"{where} is damaged: nested too deeply") from None
    except ValueError as problem:
        raise error(f"{where} is damaged: {problem}") from None
    check_tree(value, where, error)
    return value


def check_tree(value: Any, where: str, error: type[ParallelCoreError]) -> None:
    """Check that a value is a JSON tree that every reader can handle.

    Raises:
        ParallelCoreError: of the kind `error`: nesting beyond `MAX_DEPTH`, a number beyond 64 bits, text that cannot
            be encoded, a key that is no text, or a value JSON does not have.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        following: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                _check_texts(item, where, error)
                following += item.values()
            elif isinstance(item, (list, tuple)):
                following += item
            elif isinstance(item, str):
                _check_texts((item,), where, error)
            elif isinstance(item, int):
                if not -MAX_INTEGER <= item <= 2 * MAX_INTEGER + 1:
                    raise error(f"{where} is damaged: it holds {show(item)}, beyond 64 bits")
            elif item is not None and not isinstance(item, float):
                raise error(f"{where} is damaged: it holds {show(item)}, which JSON does not have")
        if not following:
            return
        level = following
    raise error(f"{where} is damaged: values nested more than {MAX_DEPTH} deep")


def _check_texts(texts: Iterable[Any], where: str, error: type[ParallelCoreError]) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise error(f"{where} is damaged: the key {show(text)} is no text")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise error(f"{where} is damaged: {show(text)} is no text that can be written") from None


class Record:
    """A mapping from outside, read key by key; a complaint says where, which key, what was found, what belongs there.

    A key that is absent, or null, is an error unless a default is given.
    """

    def __init__(self, value: Any, where: str, error: type[ParallelCoreError]) -> None:
        """Take a mapping.

        Args:
            value: the mapping, or whatever stands in its place.
            where: the file and the place in it, for messages.
            error: raised for whatever is wrong.

        Raises:
            ParallelCoreError: of the kind `error`: it is no mapping.
        """
        self.where, self._error = where, error
        if not isinstance(value, Mapping):
            raise error(f"{where} is damaged: {show(value)} where a mapping belongs")
        self.values: Mapping[Any, Any] = value

    def integer(
        self, key: str, default: int | None = _REQUIRED, *, minimum: int = 0, maximum: int = MAX_INTEGER
    ) -> Any:
        """Return an integer of a range."""
        value: Any = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not int or not minimum <= value <= maximum:
            self.refuse(key, f"an integer {_between(minimum, maximum)}")
        return value

    def number(
        self, key: str, default: float | None = _REQUIRED, *, minimum: float = -math.inf, maximum: float = math.inf
    ) -> Any:
        """Return a finite number of a range."""
        value: Any = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not minimum <= value <= maximum:
            self.refuse(key, "a finite number" + ("" if minimum == -math.inf else f" of at least {minimum:g}"))
        return value

    def flag(self, key: str, default: bool | None = _REQUIRED) -> Any:
        """Return true or false; 0 and 1 count."""
        value: Any = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if value not in (0, 1) or not isinstance(value, int):
            self.refuse(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str | None = _REQUIRED) -> Any:
        """Return a text of one line without control characters."""
        value: Any = self.values.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, str) or not value.isprintable():
            self.refuse(key, "a line of text")
        return value

    def integers(self, key: str, *, minimum: int = 0, maximum: int = MAX_INTEGER) -> tuple[int, ...]:
        """Return a list of integers of a range."""
        value: Any = self.values.get(key)
        if not isinstance(value, (list, tuple)) or not all(type(n) is int and minimum <= n <= maximum for n in value):
            self.refuse(key, f"a list of integers {_between(minimum, maximum)}")
        return tuple(value)

    def sequence(self, key: str) -> list[Any]:
        """Return a list."""
        value: Any = self.values.get(key)
        if not isinstance(value, (list, tuple)):
            self.refuse(key, "a list")
        return [*value]

    def record(self, key: str, default: Mapping[str, Any] | None = None) -> Record:
        """Return an inner mapping."""
        value = self.values.get(key, default)
        return self.inner(key, default if value is None and default is not None else value)

    def records(self, key: str) -> list[Record]:
        """Return a list of mappings."""
        return [self.inner(f"{key}[{i}]", item) for i, item in enumerate(self.sequence(key))]

    def items(self) -> Iterator[tuple[str, Record]]:
        """Yield name and mapping of a mapping of mappings; names are lines of text without control characters."""
        for key, value in self.values.items():
            if not isinstance(key, str) or not key.isprintable():
                raise self._error(f"{self.where} is damaged: {show(key)} cannot be a name")
            yield key, self.inner(key, value)

    def inner(self, key: str, value: Any) -> Record:
        """Return `value`, which stands under `key`, as a record."""
        return Record(value, f"{self.where}: {key}", self._error)

    def refuse(self, key: str, wanted: str) -> None:
        """Raise for the value under `key`.

        Raises:
            ParallelCoreError: always, of this record's kind.
        """
        found = show(self.values[key]) if key in self.values else "nothing"
        raise self._error(f"{self.where} is damaged: {key} is {found}, where {wanted} belongs")


def _between(minimum: int, maximum: int) -> str:
    return f"of at least {minimum}" if maximum == MAX_INTEGER else f"from {minimum} to {maximum}"
