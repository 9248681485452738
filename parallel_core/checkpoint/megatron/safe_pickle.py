"""Unpickling data written by torch and Megatron without running anything it asks for.

A pickle is a program. This reader lets it name only the classes in a short list, each by its exact name, and gives it
an inert stand-in of our own for every one of them: nothing is imported, no foreign callable is ever reached.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import shlex
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parallel_core.checkpoint.megatron.pickle_opcodes import MAX_KEY_NODES, check_opcodes
from parallel_core.checkpoint.source import Blob
from parallel_core.errors import CheckpointError
from parallel_core.records import show

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
NODES_PER_BYTE = 50
"""Values that a pickle may describe per byte, shared ones counted each time: what reads them may visit them all."""

class Symbol(str):
    """The name of something torch has, such as `torch.bfloat16`; compares and prints as that name."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"a state for {self!r}")


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
        if not isinstance(state, dict):
            self.state = state
        elif all(isinstance(name, str) for name in state):
            self.__dict__.update(state)
        else:
            raise pickle.UnpicklingError(f"a state of {self!r} whose names are no text")

    # Equality and hash are identity, and the text is short: the content may be shared so that to visit it never ends.
    def __repr__(self) -> str:
        return f"<{self.class_name}>"


def _inert_class(name: str) -> type[Inert]:
    return type(name.rpartition(".")[2], (Inert,), {"class_name": name})


@dataclass
class _ArrayShell:
    """A NumPy array being rebuilt from its pickled state; only plain numbers, only as many as there are bytes."""

    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _DtypeShell) or not isinstance(raw, bytes) or not _natural(*shape):
            raise pickle.UnpicklingError("a NumPy array of something else than numbers")
        kind = np.dtype(dtype.name)
        if math.prod(shape) * kind.itemsize != len(raw):
            raise pickle.UnpicklingError(f"NumPy array of shape {show(shape)} and dtype {kind} with {len(raw)} bytes")
        self.value = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")


@dataclass
class _DtypeShell:
    name: str
    rest: tuple[Any, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.name not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "b1"):
            raise pickle.UnpicklingError(f"NumPy dtype {show(self.name)}")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            raise pickle.UnpicklingError("a big-endian NumPy array")


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {show(encoding)}")
    return text.encode("latin1")


def _natural(*numbers: Any) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *ignored: Any) -> TorchTensor:
    size, stride = tuple(size), tuple(stride)
    if not isinstance(storage, Storage) or not _natural(offset, *size, *stride) or len(size) != len(stride):
        raise pickle.UnpicklingError(
            f"a tensor of shape {show(size)}, stride {show(stride)}, offset {show(offset)}"
        )
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if count else offset - 1
    if last >= storage.numel or count > storage.numel:
        raise pickle.UnpicklingError(f"a tensor of shape {show(size)} in a storage of {storage.numel} elements")
    blob = storage.blob
    return TorchTensor(Blob(blob.path, blob.offset + offset * blob.itemsize, blob.dtype, size, stride))


def _rebuild_typed(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(function, _Function) or function.run not in (_rebuild_tensor, _rebuild_parameter):
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
        if not isinstance(state, tuple) or not state or not isinstance(state[0], bytes):
            raise pickle.UnpicklingError("an io.BytesIO that holds no bytes")
        self.value = state[0]


def _ordered_dict(pairs: Any = ()) -> collections.OrderedDict[Any, Any]:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(key, (str, int)) for key, _ in pairs):
        raise pickle.UnpicklingError("an OrderedDict of something else than names and values")
    return collections.OrderedDict(pairs)


def _size(dims: Any = ()) -> tuple[int, ...]:
    if not _natural(*dims):
        raise pickle.UnpicklingError(f"a torch.Size of {show(dims)}")
    return tuple(dims)


def _layout(name: Any) -> Symbol:
    if not isinstance(name, str):
        raise pickle.UnpicklingError(f"a torch.layout called {show(name)}")
    return Symbol(name)


class _Function:
    """A function of this module as a pickle sees it: it may be called, and its attributes are out of reach."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


_CALLABLES: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "argparse.Namespace": types.SimpleNamespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "_codecs.encode": _latin1_bytes,
    "io.BytesIO": _bytes_io,
    "_io.BytesIO": _bytes_io,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
    "torch.Size": _size,
    "torch.device": lambda *args: Symbol("torch.device"),
    "torch.serialization._get_layout": _layout,
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
            known = _CALLABLES[full]
            return _Function(known) if isinstance(known, types.FunctionType) else known
        if full in self._inert:
            return self._inert[full]
        if module == "torch" and name in STORAGE_DTYPES:
            return Symbol(name)
        if full == "torch.storage.UntypedStorage":
            return Symbol("UntypedStorage")
        if module == "torch" and name in _TORCH_SYMBOLS:
            return Symbol(full)
        raise CheckpointError(
            f"{self._where} refers to {full[:200]!r}, which is not among the classes a checkpoint may contain; nothing "
            f"was run. If you trust the file's origin and {full[:200]} only holds data, --allow-inert "
            f"{shlex.quote(full[:200])} reads it as data"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_class, key, _, numel = pid
        words = all(isinstance(word, str) for word in (kind, storage_class, key))
        if not words or kind != "storage" or storage_class not in STORAGE_DTYPES or not _natural(numel):
            raise pickle.UnpicklingError(f"a storage reference {show(pid)}")
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
        check_opcodes(data)
        value = _SafeUnpickler(data, where, storage or no_storage, allow_inert).load()
        return _Settler(NODES_PER_BYTE * len(data) + 10_000).settle(value)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{where}: the pickle is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle can fail in any way, and all mean the same
        raise CheckpointError(f"{where}: the pickle cannot be read ({type(error).__name__}: {error})") from None


class _Settler:
    """Replaces the shells that rebuild arrays and byte streams by what they hold, and counts what there is.

    Every object is visited once. What is shared is counted each time, as whatever reads the result will meet it; a
    value inside itself is refused.
    """

    def __init__(self, max_nodes: int) -> None:
        self._max_nodes = max_nodes
        self._done: dict[int, tuple[Any, int, Any]] = {}  # by id: settled, nodes, and the object, which keeps its id

    def settle(self, value: Any) -> Any:
        """Return `value` with all shells replaced."""
        return self._visit(value)[0]

    def _visit(self, value: Any) -> tuple[Any, int]:
        if value is None or isinstance(value, (bool, float, Symbol)):
            return value, 1
        if isinstance(value, int):
            if value.bit_length() > 128:
                raise pickle.UnpicklingError(show(value))
            return value, 1
        if isinstance(value, (str, bytes)):
            return value, 1 + len(value) // 16
        known = self._done.get(id(value))
        if known is None:
            self._done[id(value)] = (None, self._max_nodes, value)  # while its parts are visited
            settled, nodes = self._inside(value)
            known = self._done[id(value)] = (settled, nodes, value)
        if known[1] >= self._max_nodes:
            raise pickle.UnpicklingError("values that are shared so often that together they are too many")
        return known[0], known[1]

    def _inside(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, (_ArrayShell, _BytesShell)):
            return self._visit(value.value)
        if isinstance(value, np.ndarray):
            return value, 1 + value.size
        if isinstance(value, (types.SimpleNamespace, Inert)):
            return value, self._fill(vars(value))
        if isinstance(value, dict):
            return value, self._fill(value)
        if isinstance(value, (list, tuple)):
            parts = [self._visit(item) for item in value]
            settled = [part for part, _ in parts]
            if isinstance(value, list):
                value[:] = settled
            return value if isinstance(value, list) else tuple(settled), 1 + sum(nodes for _, nodes in parts)
        return value, MAX_KEY_NODES if isinstance(value, (set, frozenset)) else 1

    def _fill(self, mapping: dict[Any, Any]) -> int:
        """Settle the values of a mapping in place and return its nodes."""
        total = 1
        for key, item in mapping.items():
            mapping[key], nodes = self._visit(item)
            total += nodes + self._visit(key)[1]
        return total
