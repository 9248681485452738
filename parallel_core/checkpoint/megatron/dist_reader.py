"""Megatron's `torch_dist` format as global tensors, with every form the optimizer state has had in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parallel_core.checkpoint.common import MAX_LAYERS, checked_args
from parallel_core.checkpoint.megatron.common_state import (
    common_of,
    loss_scaler_of,
    plain,
    refuse_unsupported,
    scalar,
    step_of,
)
from parallel_core.checkpoint.megatron.dcp import DistributedCheckpoint, StoredTensor
from parallel_core.checkpoint.megatron.dist_buckets import BUCKET_KEY, read_buckets, read_gathered
from parallel_core.checkpoint.megatron.names import canonical_name, is_ignored
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.checkpoint.source import Piece, PieceSource, TensorInfo
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import TensorShard
from parallel_core.records import Record

_STATE_KEY = re.compile(r"(?:chained_\d\.)?optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)")
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.+)")
_KINDS = {"fp32_param": "master", "param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
Tensors = dict[str, tuple[TensorInfo, list[Piece]]]


class MegatronDistCheckpoint(PieceSource):
    """A Megatron checkpoint in the `torch_dist` format as global tensors."""

    def __init__(self, path: str | Path, allow_inert: Iterable[str] = ()) -> None:
        """Read the metadata and the common state; tensors stay on the disk.

        Args:
            path: an `iter_XXXXXXX` directory with `.metadata` in it.
            allow_inert: further class names to read as inert data.

        Raises:
            CheckpointError: a file is missing, damaged or refused, or it holds something this project has no
                counterpart of.
        """
        path = Path(path)
        stored = DistributedCheckpoint(path, allow_inert)
        state = _common_state(path, stored, tuple(allow_inert))
        args = checked_args(plain(state["args"]), str(path))
        refuse_unsupported(args, str(path))
        tensors = _model_tensors(path, stored)
        float32 = {name for name, (info, _) in tensors.items() if info.dtype == "float32"}
        optimizer = _state_tensors(stored)
        step = _step_of(state.get("optimizer"))
        buckets = read_buckets(stored, {name: info for name, (info, _) in tensors.items()}, args)
        gathered = read_gathered(stored, {name: info for name, (info, _) in tensors.items()}, args)
        for found in (buckets, gathered):
            optimizer.update(found.tensors)
            step = step if step is not None else found.step
        if any(tensor.startswith("optimizer.") for tensor in stored.tensors) and not optimizer:
            raise CheckpointError(f"{path}: its optimizer state is in a form that cannot be read")
        for key, value in optimizer.items():
            name, _, kind = key.partition("@")
            if name not in tensors:
                raise CheckpointError(f"{path}: optimizer state of {name}, but no such parameter")
            if not (kind == "master" and name in float32):  # a float32 weight is its own master
                tensors[key] = value
        facts = Record(state, str(path), CheckpointError)
        common = common_of(state, args, facts.integer("iteration", 0))
        if step is not None:
            common["adam_step"] = step_of(step, str(path))
        scaler = loss_scaler_of(state.get("optimizer")) or buckets.loss_scaler
        if scaler is not None:
            common["loss_scaler"] = scaler
        self.optimizer_dialect = buckets.dialect or gathered.dialect or _dialect(stored)
        super().__init__(path, "megatron torch_dist", tensors, common)


def _common_state(path: Path, stored: DistributedCheckpoint, allow_inert: tuple[str, ...]) -> dict[str, Any]:
    if (path / "common.pt").exists():
        state = load_torch_zip(path / "common.pt", allow_inert=allow_inert)
    elif "common_state/shard_0_1" in stored.objects():
        state = stored.object("common_state/shard_0_1")
    else:
        raise CheckpointError(f"{path / 'common.pt'} is missing, and there is no common_state in .metadata either")
    if not isinstance(state, dict) or "args" not in state:
        raise CheckpointError(f"{path}: its common state holds no `args`: not a training checkpoint of Megatron-LM")
    rng = [key for key in stored.objects() if key.startswith("rng_state/shard_0.0_")]
    if rng:
        value = stored.object(rng[0])
        state = {**state, "rng_state": value if isinstance(value, list) else [value]}
    return state


def _model_tensors(path: Path, stored: DistributedCheckpoint) -> Tensors:
    tensors: Tensors = {}
    for key, tensor in stored.tensors.items():
        if key.startswith(("optimizer.", "chained_")) or is_ignored(key):
            continue
        _add(tensors, str(path), "", key, tensor, tensor.shape)
    if not tensors:
        raise CheckpointError(f"{path} holds no parameters")
    return tensors


def _state_tensors(stored: DistributedCheckpoint) -> Tensors:
    """Read optimizer state kept by parameter, whether with the model's shape or flattened."""
    tensors: Tensors = {}
    for key, tensor in stored.tensors.items():
        match = _STATE_KEY.fullmatch(key)
        if match is None:
            continue
        model = stored.tensors.get(match[2])
        shape = model.shape if model is not None else stored.original_shapes.get(key, tensor.shape)
        _add(tensors, str(stored.path), f"@{_KINDS[match[1]]}", match[2], tensor, shape)
    return tensors


def _add(tensors: Tensors, where: str, suffix: str, key: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Add one stored entry: one tensor, or one per layer when the layers are stacked along a first axis."""
    stacked = _STACKED.fullmatch(key)
    pieces = (
        _unflattened(where, tensor, shape)
        if tensor.shape != shape
        else [Piece(chunk.offsets, chunk.sizes, chunk.blob) for chunk in tensor.chunks]
    )
    name = canonical_name(f"decoder.layers.0.{stacked[1]}" if stacked else key)
    if name is None:
        raise CheckpointError(f"{where}: parameter {key} has no counterpart here")
    if not stacked:
        tensors[name + suffix] = (TensorInfo(shape, tensor.dtype), pieces)
        return
    if not shape or shape[0] > MAX_LAYERS:
        raise CheckpointError(f"{where}: {key} of shape {list(shape)} is no stack of up to {MAX_LAYERS} layers")
    rest = name.removeprefix("decoder.layers.0.")
    for layer in range(shape[0]):
        tensors[f"decoder.layers.{layer}.{rest}{suffix}"] = (TensorInfo(shape[1:], tensor.dtype), [])
    for piece in pieces:
        for i in range(piece.shape[0]):
            blob: Any = piece.blob
            target = tensors[f"decoder.layers.{piece.start[0] + i}.{rest}{suffix}"][1]
            target.append(Piece(piece.start[1:], piece.shape[1:], blob.pick(i)))


def _unflattened(where: str, tensor: StoredTensor, shape: tuple[int, ...]) -> list[Piece]:
    """Return the pieces of an entry stored as (blocks along each axis ..., elements of a block).

    Worked example: shape (4, 32, 32) cut in two along the last axis is stored as (4, 1, 2, 512); the entry at
    (layer, 0, 1) holds rows of columns 16 to 32, one after another.
    """
    if not tensor.shape:
        raise CheckpointError(f"{where}: {tensor.key} without dims does not unfold to {list(shape)}")
    grid = tensor.shape[:-1]
    fits = len(grid) == len(shape) and all(count > 0 and n % count == 0 for n, count in zip(shape, grid))
    block = tuple(n // count for n, count in zip(shape, grid)) if fits else ()
    if not fits or math.prod(block) != tensor.shape[-1]:
        raise CheckpointError(f"{where}: {tensor.key} of shape {list(tensor.shape)} does not unfold to {list(shape)}")
    pieces = []
    for chunk in tensor.chunks:
        if any(n != 1 for n in chunk.sizes[:-1]):
            raise CheckpointError(f"{where}: a chunk of {tensor.key} spans several blocks: {list(chunk.sizes)}")
        origin = [index * n for index, n in zip(chunk.offsets, block)]
        first = chunk.offsets[-1]
        flat = chunk.blob.reshape((chunk.sizes[-1],))
        for box in TensorShard.full(tensor.key, block, tensor.dtype).flat_range(first, first + chunk.sizes[-1]).boxes:
            start = tuple(base + begin for base, (begin, _) in zip(origin, box.globe))
            pieces.append(Piece(start, box.shape, flat.crop(box.local).reshape(box.shape)))
    return pieces


def _step_of(optimizer: Any) -> float | int | None:
    """Return Adam's step count from the common optimizer state, wherever Megatron put it."""
    if isinstance(optimizer, list) and optimizer:
        return _step_of(optimizer[0])
    if not isinstance(optimizer, Mapping):
        return None
    if "step" in optimizer:
        return scalar(optimizer["step"])
    groups = optimizer.get("param_groups")
    for group in groups if isinstance(groups, (list, tuple)) else []:
        if isinstance(group, Mapping) and "step" in group:
            return scalar(group["step"])
    return _step_of(optimizer.get("optimizer")) if "optimizer" in optimizer else _step_in_state(optimizer)


def _step_in_state(optimizer: Mapping[str, Any]) -> float | int | None:
    state = optimizer.get("state")
    if isinstance(state, Mapping):
        if "common_step" in state:
            return scalar(state["common_step"])
        for value in state.values():
            if isinstance(value, Mapping) and "step" in value:
                return scalar(value["step"])
    return None


def _dialect(stored: DistributedCheckpoint) -> str:
    """Name the form of the optimizer state, as Megatron does."""
    for key, tensor in stored.tensors.items():
        match = _STATE_KEY.fullmatch(key)
        if match:
            model = stored.tensors.get(match[2])
            flattened = model is not None and model.shape != tensor.shape
            return "fully_sharded_model_space" if flattened else "fully_reshardable"
        if BUCKET_KEY.fullmatch(key):
            return "dp_reshardable"
    return "none"
