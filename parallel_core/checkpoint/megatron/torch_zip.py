"""Reading the zip files of `torch.save`: the pickle at once, the tensors only when asked for."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.megatron.safe_pickle import Storage, safe_loads
from parallel_core.checkpoint.source import Blob
from parallel_core.errors import CheckpointError
from parallel_core.files import open_regular
from parallel_core.records import show

_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # 0x1950a86a20f9469cfc6c as the pickled integer stores it
MAX_PICKLE_BYTES = 2 << 30


class _Window(io.RawIOBase):
    """The part `[offset, offset + length)` of a file, as a file."""

    def __init__(self, handle: BinaryIO, offset: int, length: int) -> None:
        self._handle, self._offset, self._length, self._at = handle, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self._at = position + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._handle.seek(self._offset + self._at)
        data = self._handle.read(size)
        self._at += len(data)
        return data


def load_torch_zip(path: Path, offset: int = 0, length: int | None = None, allow_inert: Iterable[str] = ()) -> Any:
    """Return what `torch.save` put into a file, with every tensor as an unread `TorchTensor`.

    Args:
        path: the file.
        offset: where in it the zip starts (a `.distcp` file holds many).
        length: how many bytes the zip has; the rest of the file when None.
        allow_inert: further class names to read as inert data.

    Raises:
        CheckpointError: the file is missing or no such zip, has compressed, encrypted, duplicate or overlapping
            entries, or its pickle is refused by `safe_loads`.
    """
    with _opened(path, offset, length) as (archive, handle, end):
        return _load(path, archive, handle, offset, end, allow_inert)


def damaged_entries(path: Path, offset: int = 0, length: int | None = None) -> list[str]:
    """Return the names of the entries whose bytes do not have the checksum that the zip's directory gives them.

    torch can be told to write no checksums (`torch.serialization.set_crc32_options(False)`): where all of them are
    zero, none was written.

    Args:
        path: the file.
        offset: where in it the zip starts.
        length: how many bytes the zip has; the rest of the file when None.

    Raises:
        CheckpointError: the file is missing or no such zip.
    """
    with _opened(path, offset, length) as (archive, handle, end):
        places = _places(path, archive, handle, offset, end)
        stored = {entry.filename: entry.CRC for entry in archive.infolist()}
        if not any(stored[name] for name, (_, size) in places.items() if size):
            return []
        return [name for name, place in places.items() if _crc32(handle, *place) != stored[name]]


def _crc32(handle: BinaryIO, start: int, length: int) -> int:
    crc = 0
    handle.seek(start)
    while length and (block := handle.read(min(length, 1 << 20))):
        crc, length = zlib.crc32(block, crc), length - len(block)
    return crc


@contextmanager
def _opened(path: Path, offset: int, length: int | None) -> Iterator[tuple[zipfile.ZipFile, BinaryIO, int]]:
    """Open the zip at `offset`; gives it, the file, and where in the file the zip ends."""
    try:
        with open_regular(path) as handle:
            size = handle.seek(0, 2)
            length = size - offset if length is None else length
            if offset < 0 or length < 0 or offset + length > size:
                raise CheckpointError(f"{path} is truncated: {size} bytes, a part at {offset} needs {length}")
            handle.seek(offset)
            if _LEGACY_MAGIC in handle.read(64):
                raise CheckpointError(f"{path} was written by torch before 1.6; save it again with a newer torch")
            window = _Window(handle, offset, length)
            with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
                yield archive, handle, offset + length
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no zip file of torch.save, or is damaged ({error})") from None


def _load(
    path: Path, archive: zipfile.ZipFile, handle: BinaryIO, base: int, end: int, allow_inert: Iterable[str]
) -> Any:
    places = _places(path, archive, handle, base, end)
    pickles = [name for name in places if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is no zip file of torch.save: it holds {len(pickles)} data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in places and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine")
    if places[pickles[0]][1] > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: its data.pkl has {places[pickles[0]][1]} bytes")

    def storage(tag: str, key: str, numel: int) -> Storage:
        place = places.get(f"{root}data/{key}")
        if place is None:
            raise CheckpointError(f"{path}: storage {show(key)} is missing")
        if place[1] != numel * storage_dtype(tag).itemsize:
            raise CheckpointError(f"{path}: storage {show(key)} has {place[1]} bytes, not {numel} elements of {tag}")
        return Storage(Blob.contiguous(path, place[0], tag, (numel,)))

    return safe_loads(archive.read(pickles[0]), str(path), storage, allow_inert)


def _places(path: Path, archive: zipfile.ZipFile, handle: BinaryIO, base: int, end: int) -> dict[str, tuple[int, int]]:
    """Return where in the file each entry's bytes are, by name: (position, length)."""
    places: dict[str, tuple[int, int]] = {}
    previous = base
    for entry in sorted(archive.infolist(), key=lambda item: item.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{path}: entry {show(entry.filename)} is compressed, which torch.save never does")
        if entry.flag_bits & 1 or entry.filename in places:
            raise CheckpointError(f"{path}: entry {show(entry.filename)} is encrypted or there twice")
        handle.seek(base + entry.header_offset)
        header = handle.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{path}: entry {show(entry.filename)} has no header where the directory says")
        start = base + entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if base + entry.header_offset < previous or start + entry.file_size > end:
            raise CheckpointError(f"{path}: entry {show(entry.filename)} overlaps another or leaves the file")
        previous = start + entry.file_size
        places[entry.filename] = (start, entry.file_size)
    return places
