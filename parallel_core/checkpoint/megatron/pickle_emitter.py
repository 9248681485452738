"""Writing the zip files of `torch.save` without torch: a pickle by hand, tensors streamed behind it."""

from __future__ import annotations

import math
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from parallel_core.checkpoint.megatron.safe_pickle import STORAGE_DTYPES
from parallel_core.checkpoint.safetensors_file import StreamTensor
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import c_strides

_STORAGE_CLASSES = {tag: name for name, tag in reversed(STORAGE_DTYPES.items()) if name != "UntypedStorage"}
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class GlobalName:
    """A class or function to be written by name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """The result of calling a function with arguments."""

    function: GlobalName
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Instance:
    """An object of a class, made without calling it, with a state given to it."""

    cls: GlobalName
    state: Any


def torch_dtype(tag: str) -> GlobalName:
    """Return the torch dtype of a tag."""
    return GlobalName("torch", tag)


class PickleEmitter:
    """Turns a value into a pickle of protocol 2, collecting the tensors met on the way.

    Values: None, bool, int, float, str, dict, OrderedDict, list, tuple, SimpleNamespace (an `argparse.Namespace`),
    `GlobalName`, `Call`, `Instance`, and `StreamTensor` (a torch tensor).
    """

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self.storages: list[StreamTensor] = []

    def dumps(self, value: Any) -> bytes:
        """Return the complete pickle of `value`."""
        self._emit(value)
        return bytes(self._out + b".")

    def _emit(self, value: Any) -> None:
        out = self._out
        if value is None:
            out += b"N"
        elif isinstance(value, bool):
            out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._emit_int(value)
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            out += b"X" + struct.pack("<I", len(text)) + text
        elif isinstance(value, (list, tuple)):
            out += b"](" if isinstance(value, list) else b"("
            for item in value:
                self._emit(item)
            out += b"e" if isinstance(value, list) else b"t"
        elif isinstance(value, Mapping):
            self._emit_dict(value)
        else:
            self._emit_object(value)

    def _emit_int(self, value: int) -> None:
        if -(2**31) <= value < 2**31:
            self._out += b"J" + struct.pack("<i", value)
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        self._out += b"\x8a" + bytes([len(data)]) + data

    def _emit_dict(self, value: Mapping[Any, Any]) -> None:
        if isinstance(value, OrderedDict):
            self._emit(GlobalName("collections", "OrderedDict"))
            self._out += b")R("
        else:
            self._out += b"}("
        for key, item in value.items():
            self._emit(key)
            self._emit(item)
        self._out += b"u"

    def _emit_object(self, value: Any) -> None:
        if isinstance(value, GlobalName):
            self._out += f"c{value.module}\n{value.name}\n".encode()
        elif isinstance(value, Call):
            self._emit(value.function)
            self._emit(value.args)
            self._out += b"R"
        elif isinstance(value, Instance):
            self._emit(value.cls)
            self._out += b")\x81"
            self._emit(value.state)
            self._out += b"b"
        elif isinstance(value, SimpleNamespace):
            self._emit(Instance(GlobalName("argparse", "Namespace"), dict(vars(value))))
        elif isinstance(value, StreamTensor):
            self._emit_tensor(value)
        else:
            raise CheckpointError(f"a {type(value).__name__} cannot be written into a Megatron checkpoint")

    def _emit_tensor(self, tensor: StreamTensor) -> None:
        if tensor.dtype not in _STORAGE_CLASSES:
            raise CheckpointError(f"torch has no storage for dtype {tensor.dtype}")
        numel = math.prod(tensor.shape)
        self._emit(GlobalName("torch._utils", "_rebuild_tensor_v2"))
        self._out += b"("
        self._emit(
            ("storage", GlobalName("torch", _STORAGE_CLASSES[tensor.dtype]), str(len(self.storages)), "cpu", numel)
        )
        self._out += b"Q"
        self.storages.append(tensor)
        rest: tuple[Any, ...] = (0, tuple(tensor.shape), c_strides(tensor.shape), False, OrderedDict())
        for item in rest:
            self._emit(item)
        self._out += b"tR"


class _Section:
    """The rest of a file from its current position on, with positions counted from there."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self._base = handle, handle.tell()

    def tell(self) -> int:
        return self._handle.tell() - self._base

    def seek(self, position: int, whence: int = 0) -> int:
        return self._handle.seek(position + (self._base if whence == 0 else 0), whence) - self._base

    def write(self, data: Any) -> int:
        return self._handle.write(data)

    def flush(self) -> None:
        self._handle.flush()

    def seekable(self) -> bool:
        return True


def write_torch_zip(handle: BinaryIO, value: Any, root: str = "archive") -> int:
    """Write what `torch.load` reads, at the handle's position, and return how many bytes that took.

    Args:
        handle: a seekable file open for writing.
        value: see `PickleEmitter`.
        root: name of the folder inside the zip.
    """
    start = handle.tell()
    emitter = PickleEmitter()
    pickle = emitter.dumps(value)
    section: Any = _Section(handle)
    with zipfile.ZipFile(section, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_entry(archive, f"{root}/data.pkl", pickle)
        _write_entry(archive, f"{root}/byteorder", b"little")
        for i, tensor in enumerate(emitter.storages):
            with archive.open(zipfile.ZipInfo(f"{root}/data/{i}"), "w", force_zip64=tensor.nbytes > 1 << 30) as entry:

                def write_array(array: np.ndarray, entry: Any = entry) -> None:
                    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    for begin in range(0, flat.size, _BLOCK_BYTES):
                        entry.write(flat[begin : begin + _BLOCK_BYTES].data)

                tensor.write_to(f"{root}/data/{i}", write_array)
        _write_entry(archive, f"{root}/version", b"3\n")
    handle.seek(0, 2)
    return handle.tell() - start


def _write_entry(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo without a date: equal content gives equal files
