"""Optimizer state of `torch_dist` that is kept as the distributed optimizer's flat buckets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel_core.checkpoint.megatron.common_state import loss_scaler_of, scalar
from parallel_core.checkpoint.megatron.dcp import DistributedCheckpoint, StoredTensor
from parallel_core.checkpoint.megatron.flat_buffers import FlatLayout, bucket_size_of, flat_layout
from parallel_core.checkpoint.megatron.names import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    predicts,
    registration_order,
    tensor_parallel_dim,
)
from parallel_core.checkpoint.megatron.placement import Collector, is_te_spec, stages_of
from parallel_core.checkpoint.megatron.safe_pickle import TorchTensor
from parallel_core.checkpoint.megatron.torch_optimizer import shared_embeddings
from parallel_core.checkpoint.source import Piece, TensorInfo
from parallel_core.errors import CheckpointError
from parallel_core.records import Record, show

_GROUP = r"optimizer\.distributed\.dp_group_idx_(\d{1,6})"
BUCKET_KEY = re.compile(
    r"(?:chained_0\.)?" + _GROUP + r"\.gbuf_idx_(\d{1,6})\.dtype_\(torch\.(\w+), torch\.\w+\)\.bucket_idx_(\d{1,6})"
    r"\.(param|exp_avg|exp_avg_sq)"
)
_GATHERED_KEY = re.compile(r"(?:chained_0\.)?" + _GROUP + r"\.param_state/shard_0_1")
_GROUP_OBJECT = re.compile(r"(?:chained_0\.)?" + _GROUP + r"\.optimizer/shard_0_1")


@dataclass
class FlatState:
    """Optimizer tensors by key, and what came with them."""

    tensors: dict[str, tuple[TensorInfo, list[Piece]]] = field(default_factory=dict)
    step: float | int | None = None
    loss_scaler: dict[str, float | int | None] | None = None
    dialect: str = ""


class ChunkLayouts:
    """The flat layout of every (tensor, pipeline, chunk) position, from the model's shapes and the arguments."""

    def __init__(self, infos: Mapping[str, TensorInfo], args: Mapping[str, Any]) -> None:
        self.tp_size = int(args.get("tensor_model_parallel_size") or 1)
        self.infos = dict(infos)
        self.stages = stages_of(args)
        self._args = args
        self._shared = shared_embeddings(args)
        if WORD_EMBEDDINGS not in self.infos:
            raise CheckpointError(f"there is no {WORD_EMBEDDINGS} among the parameters")
        tied = not args.get("untie_embeddings_and_output_weights")
        if self._shared and tied and predicts(self.infos):
            raise CheckpointError("a tied embedding under multi-token prediction on several stages is not converted")
        if self._shared and tied and OUTPUT_LAYER not in self.infos:  # tied: the last stage's copy is a parameter there
            self.infos[OUTPUT_LAYER] = self.infos[WORD_EMBEDDINGS]

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter on one tensor parallel rank."""
        shape = list(self.infos[name].shape)
        dim = tensor_parallel_dim(name, is_te_spec(self._args))
        if dim is not None and dim >= len(shape):
            raise CheckpointError(f"{name} of shape {shape} has no dim {dim} to be cut along")
        if dim is not None:
            shape[dim] //= self.tp_size
        return tuple(shape)

    def layout(self, pp: int, chunk: int, dtype: str) -> FlatLayout:
        """Return where the parameters of one dtype of a model chunk are."""
        names = set(self.infos)
        if not self.stages.is_first(pp, chunk):
            # The last stage embeds the tokens that it predicts from.
            copied = {WORD_EMBEDDINGS} if self.stages.is_last(pp, chunk) and predicts(names) else set()
            names = {name for name in names if not name.startswith("embedding.")} | copied
        if not self.stages.is_last(pp, chunk):
            ends = ("decoder.final_layernorm.", OUTPUT_LAYER, "mtp.")
            names = {name for name in names if not name.startswith(ends)}
        order = registration_order(names, self.stages.layers[pp][chunk], is_te_spec(self._args))
        sizes = []
        for name in order:
            if self.infos[name].dtype == dtype:
                count = 1
                for n in self.local_shape(name):
                    count *= n
                sizes.append((name, count))
        size = bucket_size_of(self._args, pp, chunk, sum(count for _, count in sizes))
        return flat_layout(sizes, size, self._shared)


def read_buckets(stored: DistributedCheckpoint, infos: Mapping[str, TensorInfo], args: Mapping[str, Any]) -> FlatState:
    """Return the optimizer state of `dp_reshardable` (or bucket-space) checkpoints; empty when there is none.

    The gaps between parameters, which hold uninitialised memory, are never read.

    Raises:
        CheckpointError: a bucket is shorter than its parameters need, or a position is missing.
    """
    entries = [(match, stored.tensors[key]) for key in stored.tensors if (match := BUCKET_KEY.fullmatch(key))]
    state = FlatState(dialect="dp_reshardable" if entries else "")
    if not entries:
        return state
    if any(key.startswith("chained_1.") for key in stored.tensors):
        raise CheckpointError(
            f"{stored.path}: the experts' optimizer is in the flat buckets of ranks (dp_reshardable), which cannot be "
            "read; save with --dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )
    layouts = ChunkLayouts(infos, args)
    collector = Collector(str(stored.path), layouts.tp_size, bool(args.get("swiglu")), is_te_spec(args))
    for match, tensor in entries:
        pp, tp = divmod(int(match[1]), layouts.tp_size)
        if pp >= layouts.stages.num_ranks or int(match[2]) >= layouts.stages.num_chunks:
            raise CheckpointError(f"{stored.path}: {tensor.key} is of no pipeline stage the arguments describe")
        layout = layouts.layout(pp, int(match[2]), match[3])
        kind = "master" if match[5] == "param" else match[5]
        _add_bucket(collector, layouts, layout, tensor, int(match[4]), tp, kind)
    state.tensors = _without_tied_copy(collector, infos)
    for key in stored.objects():
        if _GROUP_OBJECT.fullmatch(key):
            value = stored.object(key)
            inner = Record(value, f"{stored.path}: {key}", CheckpointError)
            groups = inner.records("param_groups") if "param_groups" in inner.values else []
            state.step = next((scalar(g.values["step"]) for g in groups if "step" in g.values), state.step)
            state.loss_scaler = loss_scaler_of(value)
            break
    return state


def _add_bucket(
    collector: Collector,
    layouts: ChunkLayouts,
    layout: FlatLayout,
    tensor: StoredTensor,
    bucket: int,
    tp: int,
    kind: str,
) -> None:
    expected = layout.bucket_numel[bucket] if bucket < len(layout.bucket_numel) else None
    if expected is None or len(tensor.shape) != 1 or tensor.shape[0] < expected:
        raise CheckpointError(
            f"{tensor.key} has shape {list(tensor.shape)}; by the checkpoint's arguments the bucket should have "
            f"{expected or 0} elements, so the parameters in it cannot be located"
        )
    for place in layout.parameters:
        if place.bucket != bucket:
            continue
        shape = layouts.local_shape(place.name)
        for chunk in tensor.chunks:
            begin, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            first, last = max(begin, place.start), min(end, place.start + place.numel)
            if first < last:
                part = chunk.blob.crop([(first - begin, last - begin)])
                collector.add_flat(f"{place.name}@{kind}", tp, shape, part, first - place.start, 0)


def read_gathered(stored: DistributedCheckpoint, infos: Mapping[str, TensorInfo], args: Mapping[str, Any]) -> FlatState:
    """Return the optimizer state of `dp_zero_gather_scatter` checkpoints, which hold `distrib_optim.pt` as an object.

    Raises:
        CheckpointError: a buffer has another length than the arguments give.
    """
    keys = [(match, key) for key in stored.objects() if (match := _GATHERED_KEY.fullmatch(key))]
    state = FlatState(dialect="dp_zero_gather_scatter" if keys else "")
    if not keys:
        return state
    layouts = ChunkLayouts(infos, args)
    collector = Collector(str(stored.path), layouts.tp_size, bool(args.get("swiglu")), is_te_spec(args))
    for match, key in keys:
        pp, tp = divmod(int(match[1]), layouts.tp_size)
        content = Record(stored.object(key), f"{stored.path}: {key}", CheckpointError)
        for chunk in range(layouts.stages.num_chunks if pp < layouts.stages.num_ranks else 0):
            for dtypes, inner in content.inner(str(chunk), content.values.get(chunk)).values.items():
                buffer = content.inner(f"{chunk}: {show(dtypes)}", inner).values
                dtype = dtypes[0] if isinstance(dtypes, tuple) and dtypes else dtypes
                layout = layouts.layout(pp, chunk, str(dtype).removeprefix("torch."))
                for kind in ("param", "exp_avg", "exp_avg_sq"):
                    _add_gathered(collector, layouts, layout, buffer.get(kind), kind, tp, key)
    state.tensors = _without_tied_copy(collector, infos)
    return state


def _add_gathered(
    collector: Collector, layouts: ChunkLayouts, layout: FlatLayout, flat: Any, kind: str, tp: int, key: str
) -> None:
    if not isinstance(flat, TorchTensor) or flat.shape != (layout.numel,):
        raise CheckpointError(f"{key}: {kind} should have {layout.numel} elements by the checkpoint's arguments")
    name_of_kind = "master" if kind == "param" else kind
    for place in layout.parameters:
        part = flat.blob.crop([(place.file_start, place.file_start + place.numel)])
        collector.add(f"{place.name}@{name_of_kind}", tp, part.reshape(layouts.local_shape(place.name)))


def _without_tied_copy(
    collector: Collector, infos: Mapping[str, TensorInfo]
) -> dict[str, tuple[TensorInfo, list[Piece]]]:
    return {key: value for key, value in collector.tensors().items() if key.partition("@")[0] in infos}
