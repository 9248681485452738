"""The container of `torch_dist`: PyTorch's distributed checkpoint directory (`.metadata` and `.distcp` files)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.megatron.safe_pickle import Inert, TorchTensor, safe_loads
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.checkpoint.source import Blob, LazyBlob, check_shape
from parallel_core.errors import CheckpointError
from parallel_core.files import read_regular
from parallel_core.records import show

MAX_METADATA_BYTES = 2 << 30


@dataclass(frozen=True)
class StoredChunk:
    """One stored rectangle of one entry."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: LazyBlob


@dataclass(frozen=True)
class StoredTensor:
    """One tensor entry of a distributed checkpoint."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[StoredChunk, ...]


class DistributedCheckpoint:
    """A `.metadata` directory: tensors by key, unread, and small pickled objects by key."""

    def __init__(self, path: Path, allow_inert: Iterable[str] = ()) -> None:
        """Read `.metadata`.

        Raises:
            CheckpointError: it is missing, damaged or refused, or describes something impossible.
        """
        self.path = path
        self._allow_inert = tuple(allow_inert)
        file = path / ".metadata"
        try:
            metadata = safe_loads(read_regular(file, MAX_METADATA_BYTES), str(file), allow_inert=self._allow_inert)
        except OSError as error:
            raise CheckpointError(f"{file} is missing or unreadable ({error.strerror})") from None
        self.tensors: dict[str, StoredTensor] = {}
        self._places: dict[tuple[str, tuple[int, ...] | None], tuple[Path, int, int]] = {}
        self._sizes: dict[str, int] = {}
        self._read = lru_cache(maxsize=4096)(self._read_zip)
        try:
            self.original_shapes = _original_shapes(metadata)
            for index, info in metadata.storage_data.items():
                key = index.fqn, _dims(getattr(index, "offset", None))
                if key in self._places:
                    raise CheckpointError(f"{file} is damaged: the place of {show(key)} is there twice")
                self._places[key] = self._place(index.fqn, info)
            for key, entry in metadata.state_dict_metadata.items():
                if not isinstance(key, str):
                    raise CheckpointError(f"{file} is damaged: {show(key)} cannot be a tensor's name")
                if entry.class_name.endswith(".TensorStorageMetadata"):
                    self.tensors[key] = self._tensor(key, entry)
        except (AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"{file} is damaged: {error!r}") from None

    def objects(self) -> list[str]:
        """Return the keys of the pickled objects."""
        return sorted({key for key, _ in self._places if key not in self.tensors})

    def object(self, key: str) -> Any:
        """Return a pickled object, read by the safe unpickler; lists of one element are unwrapped.

        Raises:
            CheckpointError: there is none of this key, or it is refused.
        """
        place = self._places.get((key, None)) or self._places.get((key, (0,)))
        if place is None:
            raise CheckpointError(f"{self.path} holds no object {key!r}")
        value = load_torch_zip(*place, allow_inert=self._allow_inert)
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def _place(self, key: str, info: Inert) -> tuple[Path, int, int]:
        name, offset, length = info.relative_path, info.offset, info.length  # type: ignore[attr-defined]
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{self.path / '.metadata'} names a file outside its directory: {show(name)}")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{self.path}: {key} is stored compressed or encrypted, which cannot be read")
        if not all(type(n) is int and n >= 0 for n in (offset, length)):
            raise CheckpointError(f"{self.path / '.metadata'} is damaged: {key} is at {show((offset, length))}")
        size = self._sizes.get(name)
        if size is None:
            try:
                size = self._sizes[name] = (self.path / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.path / name} is missing or unreadable ({error.strerror})") from None
        if offset + length > size:
            raise CheckpointError(f"{self.path / name} is truncated: {size} bytes, a part at {offset} needs {length}")
        return self.path / name, offset, length

    def _tensor(self, key: str, entry: Any) -> StoredTensor:
        shape = _dims(entry.size) or ()
        dtype = _dtype(entry.properties)
        check_shape(key, shape, str(self.path))
        chunks = []
        for chunk in entry.chunks:
            offsets, sizes = _dims(chunk.offsets) or (), _dims(chunk.sizes) or ()
            same_dims = len(offsets) == len(sizes) == len(shape)
            if not same_dims or any(o + n > size for o, n, size in zip(offsets, sizes, shape)):
                raise CheckpointError(f"{self.path}: a chunk of {key} at {offsets} does not fit shape {list(shape)}")
            place = self._places.get((key, offsets))
            if place is None and len(entry.chunks) == 1:
                place = self._places.get((key, None))
            if place is None:
                raise CheckpointError(f"{self.path}: the chunk of {key} at {list(offsets)} is in no file")
            # The memory of a tensor is reserved before it is read: no chunk may promise more than its place holds.
            if math.prod(sizes) * storage_dtype(dtype).itemsize > place[2]:
                raise CheckpointError(f"{self.path}: a chunk of {key} of shape {list(sizes)} is in {place[2]} bytes")
            chunks.append(StoredChunk(offsets, sizes, self._lazy(key, place, sizes, dtype)))
        return StoredTensor(key, shape, dtype, tuple(chunks))

    def _lazy(self, key: str, place: tuple[Path, int, int], sizes: tuple[int, ...], dtype: str) -> LazyBlob:
        def resolve() -> Blob:
            tensor = self._read(*place)
            if not isinstance(tensor, TorchTensor) or tensor.dtype != dtype:
                raise CheckpointError(f"{place[0]}: what is stored for {key} is not a {dtype} tensor")
            return tensor.blob if tensor.shape == sizes else tensor.blob.reshape(sizes)

        return LazyBlob(resolve, sizes, dtype)

    def zips(self) -> list[tuple[Path, int, int]]:
        """Return where every stored zip is: (file, first byte, bytes)."""
        return sorted(set(self._places.values()))

    def _read_zip(self, path: Path, offset: int, length: int) -> Any:
        return load_torch_zip(path, offset, length, self._allow_inert)


def _dims(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    dims = tuple(value)
    if not all(type(n) is int and n >= 0 for n in dims):
        raise ValueError(f"dims {dims}")
    return dims


def _dtype(properties: Any) -> str:
    state = getattr(properties, "state", None)
    name = str(state[0] if isinstance(state, tuple) else properties.dtype).removeprefix("torch.")
    storage_dtype(name)
    return name


def _original_shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors that Megatron stored flattened."""
    extra = getattr(metadata, "mcore_data", None) or {}
    shapes = {}
    for key, value in extra.items():
        shape = value.get("nd_reformulated_orig_global_shape") if isinstance(value, dict) else None
        if shape is not None:
            shapes[str(key)] = _dims(shape) or ()
    return shapes
