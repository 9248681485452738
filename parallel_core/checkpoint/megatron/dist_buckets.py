"""Optimizer state of `torch_dist` that is kept as the distributed optimizer's flat buckets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from parallel_core.checkpoint.megatron.common_state import loss_scaler_of, scalar
from parallel_core.checkpoint.megatron.dcp import DistributedCheckpoint, StoredTensor
from parallel_core.checkpoint.megatron.experts import ExpertGrid, StoredExperts, is_buffer, is_expert
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

_CHAINED = r"(?:chained_(\d)\.)?"
"""The number of one of two optimizers: that of the experts is the second."""
_GROUP = r"optimizer\.distributed\.dp_group_idx_(\d{1,6})"
BUCKET_KEY = re.compile(
    _CHAINED + _GROUP + r"\.gbuf_idx_(\d{1,6})\.dtype_\(torch\.(\w+), torch\.\w+\)\.bucket_idx_(\d{1,6})"
    r"\.(param|exp_avg|exp_avg_sq)"
)
_GATHERED_KEY = re.compile(_CHAINED + _GROUP + r"\.param_state/shard_0_1")
_GROUP_OBJECT = re.compile(_CHAINED + _GROUP + r"\.optimizer/shard_0_1")


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
        self.grid = ExpertGrid.of(args, "the checkpoint's arguments")
        self._args = args
        self._shared = shared_embeddings(args)
        if WORD_EMBEDDINGS not in self.infos:
            raise CheckpointError(f"there is no {WORD_EMBEDDINGS} among the parameters")
        tied = not args.get("untie_embeddings_and_output_weights")
        if self._shared and tied and predicts(self.infos):
            raise CheckpointError("a tied embedding under multi-token prediction on several stages is not converted")
        if self._shared and tied and OUTPUT_LAYER not in self.infos:  # tied: the last stage's copy is a parameter there
            self.infos[OUTPUT_LAYER] = self.infos[WORD_EMBEDDINGS]

    @cached_property
    def experts(self) -> dict[str, StoredExperts]:
        """The tensors in which ranks hold experts, by name."""
        found: dict[str, StoredExperts] = {}
        for _, names in groupby(_in_layers(filter(is_expert, self.infos)), _module_of):
            found.update((tensor.name, tensor) for tensor in self.grid.stored(self.infos, list(names)))
        return found

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor on one rank."""
        if name in self.experts:
            return self.experts[name].shape
        shape = list(self.infos[name].shape)
        dim = tensor_parallel_dim(name, is_te_spec(self._args))
        if dim is not None and dim >= len(shape):
            raise CheckpointError(f"{name} of shape {shape} has no dim {dim} to be cut along")
        if dim is not None:
            shape[dim] //= self.tp_size
        return tuple(shape)

    def names(self, pp: int, chunk: int) -> list[str]:
        """Return the tensors of a model chunk in the order of registration, experts as ranks hold them."""
        names = set(self.infos)
        if not self.stages.is_first(pp, chunk):
            # The last stage embeds the tokens that it predicts from.
            copied = {WORD_EMBEDDINGS} if self.stages.is_last(pp, chunk) and predicts(names) else set()
            names = {name for name in names if not name.startswith("embedding.")} | copied
        if not self.stages.is_last(pp, chunk):
            ends = ("decoder.final_layernorm.", OUTPUT_LAYER, "mtp.")
            names = {name for name in names if not name.startswith(ends)}
        order = registration_order(names, self.stages.layers[pp][chunk], is_te_spec(self._args))
        stored: list[str] = []
        for module, members in groupby(order, _module_of):
            expanded = members if module is None else self._stored_of[module]
            stored += expanded
        return stored

    @cached_property
    def _stored_of(self) -> dict[str, list[str]]:
        of_module: dict[str, list[str]] = {}
        for tensor in self.experts.values():
            of_module.setdefault(_module_of(tensor.canonical) or "", []).append(tensor.name)
        return of_module

    def layout(self, pp: int, chunk: int, dtype: str, experts: bool | None = None) -> FlatLayout:
        """Return where the parameters of one dtype of a model chunk are.

        Args:
            pp: pipeline rank.
            chunk: the chunk.
            dtype: dtype tag of the parameters.
            experts: True: in the optimizer of experts; False: in that of everything else; None: in the only one.
        """
        sizes = []
        for name in self.names(pp, chunk):
            tensor = self.experts.get(name)
            if is_buffer(name) or (experts is not None and experts != (tensor is not None)):
                continue
            if self.infos[tensor.canonical if tensor else name].dtype == dtype:
                sizes.append((name, math.prod(self.local_shape(name))))
        size = bucket_size_of(self._args, pp, chunk, sum(count for _, count in sizes))
        return flat_layout(sizes, size, self._shared)

    def buffers(self, dtype: str, experts: bool | None, pp: int) -> list[FlatLayout]:
        """Return the layouts of an optimizer's buffers: one for each of its chunks that has parameters."""
        layouts = [self.layout(pp, chunk, dtype, experts) for chunk in range(self.stages.num_chunks)]
        return [layout for layout in layouts if layout.names] if experts else layouts


def _module_of(name: str) -> str | None:
    """Return the module of experts that a tensor of all experts belongs to; None for any other."""
    return name.partition(".experts.linear_fc")[0] if is_expert(name) else None


def _in_layers(names: Iterable[str]) -> list[str]:
    """Return experts' tensors, layer by layer, each layer's in the order of registration."""
    kinds = [f"linear_fc{which}.{kind}" for which in (1, 2) for kind in ("weight", "bias")]
    return sorted(names, key=lambda name: (_module_of(name), kinds.index(".".join(name.split(".")[-2:]))))


@dataclass(frozen=True)
class _Place:
    """Whose buffer it is: the optimizer, and the rank among those that share the tensors."""

    experts: bool | None
    pp: int
    tp: int
    ep: int
    etp: int


def _place(layouts: ChunkLayouts, optimizer: str | None, group: int) -> _Place:
    """Return whose a group of data parallel ranks is; groups of experts are numbered over etp, ep and pp."""
    grid = layouts.grid
    if optimizer == "1":
        rest, etp = divmod(group, grid.etp)
        pp, ep = divmod(rest, grid.ep)
        return _Place(True, pp, 0, ep, etp)
    pp, tp = divmod(group, layouts.tp_size)
    return _Place(False if grid.ep > 1 else None, pp, tp, 0, grid.etp_rank(tp, 0) or 0)


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
    layouts = ChunkLayouts(infos, args)
    collector = Collector(str(stored.path), layouts.tp_size, bool(args.get("swiglu")), is_te_spec(args))
    for match, tensor in entries:
        place = _place(layouts, match[1], int(match[2]))
        buffers = layouts.buffers(match[4], place.experts, place.pp) if place.pp < layouts.stages.num_ranks else []
        if int(match[3]) >= len(buffers):
            raise CheckpointError(f"{stored.path}: {tensor.key} is of no pipeline stage the arguments describe")
        kind = "master" if match[6] == "param" else match[6]
        _add_bucket(collector, layouts, buffers[int(match[3])], tensor, int(match[5]), place, kind)
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
    whose: _Place,
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
        for chunk in tensor.chunks:
            begin, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            first, last = max(begin, place.start), min(end, place.start + place.numel)
            if first < last:
                part = chunk.blob.crop([(first - begin, last - begin)])
                _add_part(collector, layouts, place.name, kind, whose, part, first - place.start)


def _add_part(
    collector: Collector, layouts: ChunkLayouts, name: str, kind: str, whose: _Place, part: Any, first: int
) -> None:
    """Add elements of a flat buffer, those of a tensor from its element `first` on."""
    tensor = layouts.experts.get(name)
    if tensor is None:
        collector.add_flat(f"{name}@{kind}", whose.tp, layouts.local_shape(name), part, first, 0)
        return
    info = layouts.infos[tensor.canonical]
    pieces = layouts.grid.flat_pieces(tensor, info, whose.ep, whose.etp, part, first)
    owner = (tensor.name, whose.ep, whose.etp)
    collector.add_pieces(f"{tensor.canonical}@{kind}", TensorInfo(info.shape, part.dtype), pieces, owner, whose.tp)


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
        whose = _place(layouts, match[1], int(match[2]))
        content = Record(stored.object(key), f"{stored.path}: {key}", CheckpointError)
        for index in range(layouts.stages.num_chunks if whose.pp < layouts.stages.num_ranks else 0):
            if whose.experts and index not in content.values and str(index) not in content.values:
                break  # chunks without experts have no buffer
            for dtypes, inner in content.inner(str(index), content.values.get(index)).values.items():
                buffer = content.inner(f"{index}: {show(dtypes)}", inner).values
                dtype = dtypes[0] if isinstance(dtypes, tuple) and dtypes else dtypes
                buffers = layouts.buffers(str(dtype).removeprefix("torch."), whose.experts, whose.pp)
                for kind in ("param", "exp_avg", "exp_avg_sq") if index < len(buffers) else ():
                    _add_gathered(collector, layouts, buffers[index], buffer.get(kind), kind, whose, key)
    state.tensors = _without_tied_copy(collector, infos)
    return state


def _add_gathered(
    collector: Collector, layouts: ChunkLayouts, layout: FlatLayout, flat: Any, kind: str, whose: _Place, key: str
) -> None:
    if not isinstance(flat, TorchTensor) or flat.shape != (layout.numel,):
        raise CheckpointError(f"{key}: {kind} should have {layout.numel} elements by the checkpoint's arguments")
    for place in layout.parameters:
        part = flat.blob.crop([(place.file_start, place.file_start + place.numel)])
        _add_part(collector, layouts, place.name, "master" if kind == "param" else kind, whose, part, 0)


def _without_tied_copy(
    collector: Collector, infos: Mapping[str, TensorInfo]
) -> dict[str, tuple[TensorInfo, list[Piece]]]:
    return {key: value for key, value in collector.tensors().items() if key.partition("@")[0] in infos}
