"""Writing Megatron's `torch_dist` format in its fully reshardable form, which any layout can load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.megatron.experts import is_buffer, is_expert
from parallel_core.checkpoint.megatron.export import KINDS, Export
from parallel_core.checkpoint.megatron.names import LAYER_PATTERN, layer_of
from parallel_core.checkpoint.megatron.pickle_emitter import (
    Call,
    GlobalName,
    Instance,
    PickleEmitter,
    torch_dtype,
    write_torch_zip,
)
from parallel_core.checkpoint.safetensors_file import StreamTensor

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
Record = tuple[str, tuple[int, ...] | None, str, int, int]
"""(key, offset of the chunk or None for an object, file, position, length)."""


def dist_items(export: Export) -> list[tuple[str, str]]:
    """Return everything to write, as (parameter name, kind), with "" as the kind of the parameter itself."""
    if not export.has_optimizer:
        return [(name, "") for name in export.infos]
    # A float32 model has masters only where the distributed optimizer keeps its own copy of the weights.
    masters = export.params_dtype != "float32" or export.args["use_distributed_optimizer"]
    kinds = ("", *(("master",) if masters else ()), *KINDS)
    return [(name, kind) for name in export.infos for kind in (("",) if is_buffer(name) else kinds)]


def write_distcp(
    path: Path, export: Export, items: Sequence[tuple[str, str]], part: int, progress: Callable[[int], None]
) -> list[Record]:
    """Write one `.distcp` file with some of the items and return where in it they are.

    Args:
        path: the `iter_XXXXXXX` directory.
        export: what to write; its tensor parallel size must be 1, for the chunks are whole.
        items: what `dist_items` returned, or a share of it.
        part: number of this file; file 0 also gets the objects.
        progress: told after each tensor how many bytes it had.
    """
    name_of_file = f"__{part}_0.distcp"
    records: list[Record] = []
    with (path / name_of_file).open("wb") as handle:
        for name, kind in items:
            key, offset, stacked_shape = _place(export, name, kind)
            position = handle.tell()
            tensor = export.tensor(name, 0, kind)
            length = write_torch_zip(handle, StreamTensor(stacked_shape, tensor.dtype, tensor.parts))
            records.append((key, offset, name_of_file, position, length))
            progress(tensor.nbytes)
        for key, value in _objects(export) if part == 0 else ():
            position = handle.tell()
            records.append((key, None, name_of_file, position, write_torch_zip(handle, [value])))
        handle.flush()
        os.fsync(handle.fileno())
    return records


def write_dist_metadata(path: Path, export: Export, records: Sequence[Record]) -> None:
    """Write `.metadata`, `metadata.json` and `common.pt`, once all `.distcp` files are there."""
    entries: dict[str, Any] = {}
    for name, kind in dist_items(export):
        key, offset, shape = _place(export, name, kind)
        chunk = Instance(
            GlobalName(_METADATA, "ChunkStorageMetadata"), {"offsets": _size(offset), "sizes": _size(shape)}
        )
        if key in entries:
            entries[key].state["chunks"].append(chunk)
            continue
        in_stack = export.stacked and layer_of(name) is not None
        whole = (export.args["num_layers"], *shape[1:]) if in_stack else shape
        state = {"properties": _properties(export.shard(name, 0, kind).dtype), "size": _size(whole), "chunks": [chunk]}
        entries[key] = Instance(GlobalName(_METADATA, "TensorStorageMetadata"), state)
    for key, at, *_ in records:
        if at is None:
            entries[key] = Instance(GlobalName(_METADATA, "BytesStorageMetadata"), {})
    _write(path / ".metadata", _metadata_pickle(entries, records))
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    versions |= {"common_backend": "torch", "common_backend_version": 1}
    _write(path / "metadata.json", json.dumps(versions).encode())
    with (path / "common.pt").open("wb") as handle:
        write_torch_zip(handle, _common(export), "common")
        handle.flush()
        os.fsync(handle.fileno())


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _place(export: Export, name: str, kind: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return the key a tensor is stored under, where its chunk starts, and the chunk's shape; layers are stacked."""
    shape = export.infos[name].shape
    key, offset = export.name_in_file(name, distributed=True), (0,) * len(shape)
    match = LAYER_PATTERN.fullmatch(key)
    if match and export.stacked:
        key, offset, shape = f"decoder.layers.{match[2]}", (int(match[1]), *offset), (1, *shape)
    if kind == "master":
        kind = "param" if export.args["use_distributed_optimizer"] else "fp32_param"
    return (f"optimizer.state.{kind}.{key}" if kind else key), offset, shape


def _objects(export: Export) -> Iterator[tuple[str, Any]]:
    """Yield what Megatron insists on: an extra state per linear layer, and the common state of releases >= 0.19."""
    layers = export.args["num_layers"]
    for name, info in export.infos.items():
        module, _, kind = name.rpartition(".")
        match = LAYER_PATTERN.fullmatch(module)
        linear = re.search(r"\.(linear_|eh_proj)", module) and (match or module.startswith("mtp."))
        if kind != "weight" or not linear:
            continue
        stacked = match if export.stacked else None
        places = [str(number) for number in range(info.shape[0])] if is_expert(name) else [""]
        for place in places:  # of a stack every layer, of experts every one
            shard = [str(n) for n in ((stacked[1],) if stacked else ()) + ((place,) if place else ())]
            total = [str(n) for n in ((layers,) if stacked else ()) + ((info.shape[0],) if place else ())]
            key = f"decoder.layers.{stacked[2]}" if stacked else module
            yield f"{key}._extra_state/shard_{'.'.join(shard or ['0'])}_{'.'.join(total or ['1'])}", None
    yield "common_state/shard_0_1", _common(export)


def _common(export: Export) -> dict[str, Any]:
    state = export.common_state()
    distributed = bool(export.args["use_distributed_optimizer"])
    state["content_metadata"] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if distributed:
        state["content_metadata"]["distrib_optim_sharding_type"] = "fully_reshardable"
    if not export.has_optimizer:
        return state
    inner: dict[str, Any] = {"param_groups": [export.param_group(decays) for decays in (True, False)]}
    if not distributed:
        inner["state"] = {"common_step": export.step_tensor()}
    plain = not distributed and export.params_dtype == "float32"
    state["optimizer"] = inner if plain else {"optimizer": inner}
    if distributed:
        state["optimizer"]["param_state_sharding_type"] = "fully_reshardable"
    scaler = export.grad_scaler()
    if scaler is not None:
        state["optimizer"]["grad_scaler"] = scaler
    return state


def _size(dims: Sequence[int]) -> Call:
    return Call(GlobalName("torch", "Size"), (tuple(int(n) for n in dims),))


def _properties(tag: str) -> Instance:
    storage_dtype(tag)
    layout = Call(GlobalName("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(GlobalName(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    return Instance(GlobalName(_METADATA, "TensorProperties"), (torch_dtype(tag), layout, False, memory_format, False))


class _Pairs(dict[Any, Any]):
    """A dict whose keys need not be hashable here: they become objects when the pickle is read."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        super().__init__()
        self._pairs = list(pairs)

    def items(self) -> Any:
        return self._pairs


def _metadata_pickle(entries: dict[str, Any], records: Sequence[Record]) -> bytes:
    storage = []
    for key, offset, file, position, length in records:
        index = {"fqn": key, "offset": None if offset is None else _size(offset), "index": None}
        info = {"relative_path": file, "offset": position, "length": length, "transform_descriptors": None}
        storage.append(
            (
                Instance(GlobalName(_METADATA, "MetadataIndex"), index),
                Instance(GlobalName(_FILESYSTEM, "_StorageInfo"), info),
            )
        )
    state = {
        "state_dict_metadata": entries,
        "planner_data": None,
        "storage_data": _Pairs(storage),
        "storage_meta": None,
        "version": None,
    }
    return PickleEmitter().dumps(Instance(GlobalName(_METADATA, "Metadata"), state))
