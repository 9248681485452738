"""Indices on disk under Megatron's names, used only while they are, to the bit, what was built for this very data.

Megatron's files say nothing of their own state, so a record lies beside them (`NAME-source.txt`): checksums of the
arrays and of what they were built from. Where it is missing (Megatron wrote the files), old or wrong, the indices are
built again; building is deterministic, so files that were right stay the same byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parallel_core.data.files import atomic_save_array, atomic_write, exclusive_lock, open_file, read_file
from parallel_core.errors import DataError

logger = logging.getLogger(__name__)
_MAX_RECORD_BYTES = 1 << 16

Arrays = Mapping[str, np.ndarray]


class Described(ABC):
    """What is known by what it was made from, which names its cached indices as Megatron names them."""

    @property
    @abstractmethod
    def unique_identifiers(self) -> dict[str, Any]:
        """What identifies the cached indices, with Megatron's keys in Megatron's order."""

    @property
    def unique_description(self) -> str:
        """`unique_identifiers` as indented JSON: the content of the cache's description file."""
        return json.dumps(self.unique_identifiers, indent=4)

    @property
    def unique_description_hash(self) -> str:
        """MD5 of `unique_description`, the first part of the cached files' names."""
        return hashlib.md5(self.unique_description.encode("utf-8"), usedforsecurity=False).hexdigest()


class IndexCache:
    """The cached arrays of one dataset.

    Args:
        base: Path that all names begin with.
        description: What identifies the dataset; Megatron stores it as `BASE-description.txt`.
        source: A checksum of the data the indices are built from, which the description does not hold.
        names: The arrays; each is `BASE-NAME.npy`.
    """

    def __init__(self, base: str, description: str, source: str, names: tuple[str, ...]) -> None:
        self._base = base
        self._description = description
        self._source = source
        self._names = names

    def get(self, build: Callable[[], Arrays]) -> tuple[Arrays, bool]:
        """Return the arrays, mapped from the cache or built and stored, and whether they were built.

        Any number of processes may ask at once: one builds, the others wait for it.
        """
        cached = self._load()
        if cached is not None:
            return cached, False
        try:
            with exclusive_lock(self._base + ".lock"):
                cached = self._load()
                if cached is not None:
                    return cached, False
                built = build()
                self._save(built)
                return built, True
        except OSError as error:
            logger.warning(
                "indices are built in memory by every process, because the cache folder %s cannot be written (%s); "
                "give --data-cache-path a folder that can",
                os.path.dirname(self._base),
                error,
            )
            return build(), True

    def _load(self) -> Arrays | None:
        if not os.path.lexists(f"{self._base}-description.txt"):
            return None
        try:
            if read_file(f"{self._base}-description.txt") != self._description.encode("utf-8"):
                raise DataError("their description is another.")
            if read_file(f"{self._base}-source.txt", _MAX_RECORD_BYTES) != self._record():
                raise DataError("they are damaged, or the data is not what it was.")
            return {name: np.load(self._path(name), mmap_mode="r", allow_pickle=False) for name in self._names}
        except (DataError, OSError, ValueError, EOFError) as error:
            logger.warning("cached indices %s-* are built again: %s", self._base, error)
            return None

    def _path(self, name: str) -> str:
        return f"{self._base}-{name}.npy"

    def _record(self) -> bytes:
        """Return the record of the arrays' files as they are now."""
        lines = [f"{self._source} source", f"{hashlib.sha256(self._description.encode()).hexdigest()} description.txt"]
        lines += [f"{_checksum_of_file(self._path(name))} {name}.npy" for name in self._names]
        return ("\n".join(lines) + "\n").encode("ascii")

    def _save(self, arrays: Arrays) -> None:
        # the description goes last: its presence says that the arrays are whole
        for suffix in ("description.txt", "source.txt"):
            if os.path.lexists(f"{self._base}-{suffix}"):
                os.unlink(f"{self._base}-{suffix}")
        for name in self._names:
            atomic_save_array(self._path(name), arrays[name])
        atomic_write(f"{self._base}-source.txt", self._record())
        atomic_write(f"{self._base}-description.txt", self._description.encode("utf-8"))


def _checksum_of_file(path: str) -> str:
    digest = hashlib.sha256()
    with os.fdopen(open_file(path), "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
