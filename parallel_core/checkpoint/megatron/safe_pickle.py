"""Unpickling data written by torch and Megatron without running anything it asks for.

A pickle is a program. This reader lets it name only the classes in a short list, each by its exact name, and gives it
an inert stand-in of our own for every one of them: nothing is imported, no foreign callable is ever reached.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parallel_core.checkpoint.source import Blob
from parallel_core.errors import CheckpointError

STORAGE_DTYPES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_TORCH_SYMBOLS = frozenset(
    ["bfloat16", "float16", "half", "float32", "float", "float64", "double", "int64", "long", "int32", "int", "int16"]
    + ["short", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"]
    + ["strided", "contiguous_format", "preserve_format"]
)
_DCP = "torch.distributed.checkpoint"
_ENUMS = ("AttnBackend", "AttnMaskType", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")
_METADATA = ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
_PLANNER = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
INERT_CLASSES = frozenset(
    [f"megatron.core.transformer.enums.{name}" for name in _ENUMS]
    + [f"megatron.core.enums.{name}" for name in ("ModelType", "Fp8Recipe", "Fp4Recipe")]
    + [f"megatron.core.rerun_state_machine.{name}" for name in ("RerunMode", "RerunState", "RerunDiagnostic")]
    + ["megatron.model.enums.ModelType", "megatron.core.optimizer.optimizer_config.OptimizerConfig"]
    + ["megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan", "signal.Signals", "pathlib.PosixPath"]
    + [f"{_DCP}.metadata.{name}" for name in (*_METADATA, "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")]
    + [f"{_DCP}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")]
    + [f"{_DCP}.planner.{name}" for name in _PLANNER]
)
_FORBIDDEN_OPCODES = frozenset(
    ["EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"]
)

MAX_DEPTH = 200


class Symbol(str):
    """The name of something torch has, such as `torch.bfloat16`; compares and prints as that name."""


@dataclass
class TorchTensor:
    """A tensor of a torch file: where its elements are, not read yet."""

    blob: Blob

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.blob.shape

    @property
    def dtype(self) -> str:
        """Dtype tag of the tensor."""
        return self.blob.dtype


@dataclass
class Storage:
    """A run of equal elements in a file."""

    blob: Blob

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.blob.shape[0]


class Inert:
    """What a pickle said about an object of a known class, as data: its constructor's arguments and its state."""

    class_name = ""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update((str(name), value) for name, value in state.items())
        else:
            self.state = state

    def __hash__(self) -> int:
        return hash(repr(sorted(self.__dict__.items(), key=lambda item: item[0])))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        return f"<{self.class_name} {self.__dict__}>"


def _inert_class(name: str) -> type[Inert]:
    return type(name.rpartition(".")[2], (Inert,), {"class_name": name})


@dataclass
class _ArrayShell:
    """A NumPy array being rebuilt from its pickled state; only plain numbers, only as many as there are bytes."""

    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        kind = np.dtype(dtype.name)
        if math.prod(shape) * kind.itemsize != len(raw) or any(n < 0 for n in shape):
            raise pickle.UnpicklingError(f"NumPy array of shape {shape} and dtype {kind} with {len(raw)} bytes")
        self.value = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")


@dataclass
class _DtypeShell:
    name: str
    rest: tuple[Any, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.name not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "b1"):
            raise pickle.UnpicklingError(f"NumPy dtype {self.name!r}")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            raise pickle.UnpicklingError("a big-endian NumPy array")


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _natural(*numbers: Any) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> TorchTensor:
    size, stride = tuple(size), tuple(stride)
    if not isinstance(storage, Storage) or not _natural(offset, *size, *stride) or len(size) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of shape {size}, stride {stride}, offset {offset}")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if count else offset - 1
    if last >= storage.numel or count > storage.numel:
        raise pickle.UnpicklingError(f"a tensor of shape {list(size)} in a storage of {storage.numel} elements")
    blob = storage.blob
    return TorchTensor(Blob(blob.path, blob.offset + offset * blob.itemsize, blob.dtype, size, stride))


def _rebuild_typed(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if function not in (_rebuild_tensor, _rebuild_parameter):
        raise pickle.UnpicklingError("_rebuild_from_type_v2 of something that is not a tensor")
    return function(*args)


def _rebuild_parameter(data: Any, *ignored: Any) -> Any:
    return data


def _bytes_io(*ignored: Any) -> _BytesShell:
    return _BytesShell()


class _BytesShell:
    """An `io.BytesIO`, such as TransformerEngine's extra state; its content is kept as bytes and never unpickled."""

    value = b""

    def __setstate__(self, state: Any) -> None:
        self.value = state[0] if isinstance(state, tuple) and state else b""


_CALLABLES: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "argparse.Namespace": types.SimpleNamespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "_codecs.encode": _latin1_bytes,
    "io.BytesIO": _bytes_io,
    "_io.BytesIO": _bytes_io,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
    "torch.Size": lambda dims=(): tuple(dims),
    "torch.device": lambda *args: Symbol("torch.device"),
    "torch.serialization._get_layout": lambda name: Symbol(name),
    "numpy.core.multiarray._reconstruct": lambda *args: _ArrayShell(),
    "numpy._core.multiarray._reconstruct": lambda *args: _ArrayShell(),
    "numpy.ndarray": Symbol("numpy.ndarray"),
    "numpy.dtype": lambda name, *rest: _DtypeShell(name, rest),
    "numpy.dtypes.UInt32DType": lambda *args: _DtypeShell("u4"),
    "torch.Tensor": Symbol("torch.Tensor"),
    "torch.nn.parameter.Parameter": Symbol("torch.nn.parameter.Parameter"),
}


class _SafeUnpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, where: str, storage: Callable[[str, str, int], Storage], allow_inert: Iterable[str]
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._where, self._storage = where, storage
        self._inert = {name: _inert_class(name) for name in (*INERT_CLASSES, *allow_inert)}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _CALLABLES:
            return _CALLABLES[full]
        if full in self._inert:
            return self._inert[full]
        if module == "torch" and name in STORAGE_DTYPES:
            return Symbol(name)
        if full == "torch.storage.UntypedStorage":
            return Symbol("UntypedStorage")
        if module == "torch" and name in _TORCH_SYMBOLS:
            return Symbol(full)
        raise CheckpointError(
            f"{self._where} refers to {full!r}, which is not among the classes a checkpoint may contain; nothing was "
            f"run. If you trust the file's origin and {full} only holds data, --allow-inert {full} reads it as data"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_class, key, _, numel = pid
        if kind != "storage" or storage_class not in STORAGE_DTYPES or not isinstance(key, str) or not _natural(numel):
            raise pickle.UnpicklingError(f"a storage reference {pid!r:.100}")
        return self._storage(STORAGE_DTYPES[storage_class], key, numel)


def safe_loads(
    data: bytes,
    where: str,
    storage: Callable[[str, str, int], Storage] | None = None,
    allow_inert: Iterable[str] = (),
) -> Any:
    """Return what a pickle describes, with tensors unread and unknown kinds of objects refused.

    Args:
        data: the whole pickle.
        where: the file, for messages.
        storage: gives the storage for (dtype tag, key, number of elements); None when there are none.
        allow_inert: further class names to read as inert data.

    Raises:
        CheckpointError: the pickle names a class that is not on the list, or is damaged.
    """

    def no_storage(tag: str, key: str, numel: int) -> Storage:
        raise pickle.UnpicklingError("a tensor where none belongs")

    try:
        _check_opcodes(data)
        value = _SafeUnpickler(data, where, storage or no_storage, allow_inert).load()
        return _settle(value)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{where}: the pickle is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle can fail in any way, and all mean the same
        raise CheckpointError(f"{where}: the pickle cannot be read ({type(error).__name__}: {error})") from None


def _check_opcodes(data: bytes) -> None:
    """Refuse, before anything is built, what would make the C unpickler or Python itself misbehave.

    Those are instructions torch never writes, memo numbers that allocate without limit, and nesting so deep that
    hashing the result would overflow the C stack. Depths follow the stack as `pickletools` describes it.
    """
    stack: list[int | None] = []  # depth of each value; None is a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _FORBIDDEN_OPCODES:
            raise pickle.UnpicklingError(f"instruction {name}")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if number > len(data):
                raise pickle.UnpicklingError(f"memo number {number}")
            memo[number] = stack[-1] or 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif opcode.stack_before or opcode.stack_after:
            _follow(opcode, stack)


def _follow(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """Do to the stack of depths what an instruction does to the stack of values."""
    if opcode.name == "MARK":
        stack.append(None)
        return
    taken: list[int] = []
    if pickletools.markobject in opcode.stack_before:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        above = 0 if opcode.stack_before[0] is pickletools.markobject else 1
    else:
        taken = [stack.pop() or 0 for _ in opcode.stack_before]
        above = 1 if opcode.name in ("APPEND", "SETITEM") else 0
        if above:
            stack.append(taken.pop())
    inner = max(taken, default=-1) + 1
    if above:  # something is put into a container, which stays where it is
        inner = max(inner, stack.pop() or 0)
    if inner > MAX_DEPTH:
        raise pickle.UnpicklingError(f"values nested more than {MAX_DEPTH} deep")
    stack.extend(inner for _ in opcode.stack_after)


def _settle(value: Any) -> Any:
    """Replace the shells that rebuild arrays and byte streams by what they hold."""
    if isinstance(value, (_ArrayShell, _BytesShell)):
        return value.value
    if isinstance(value, dict):
        for key in value:
            value[key] = _settle(value[key])
    elif isinstance(value, types.SimpleNamespace):
        _settle(vars(value))
    elif isinstance(value, list):
        value[:] = [_settle(item) for item in value]
    elif type(value) is tuple:
        return tuple(_settle(item) for item in value)
    return value
