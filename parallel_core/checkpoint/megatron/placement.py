"""Where Megatron's ranks have what: layers on pipeline stages, and tensors in the pieces of tensor parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from parallel_core.checkpoint.megatron.experts import ExpertGrid
from parallel_core.checkpoint.megatron.names import num_stacked_parts, tensor_parallel_dim, with_layer_offset
from parallel_core.checkpoint.megatron.safe_pickle import TorchTensor
from parallel_core.checkpoint.source import Blob, Piece, TensorInfo
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.layout.shard import Range, TensorShard
from parallel_core.layout.stages import StageLayout, decoder_layers, parse_layout, stage_layout
from parallel_core.records import Record


@dataclass(frozen=True)
class _Split:
    """Megatron's arguments in the form of `layout.stages.LayerSplit`."""

    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int
    num_layer_list: tuple[tuple[int, ...], ...]
    decoder_first_pipeline_num_layers: int
    decoder_last_pipeline_num_layers: int
    account_for_embedding_in_pipeline_split: bool
    account_for_loss_in_pipeline_split: bool
    standalone_embedding_stage: bool


def is_te_spec(args: Mapping[str, Any]) -> bool:
    """Tell whether a Megatron run of these arguments has TransformerEngine's modules."""
    return args.get("transformer_impl") == "transformer_engine"


def stages_of(args: Mapping[str, Any]) -> StageLayout:
    """Return the layers of every pipeline stage of a Megatron run.

    Args:
        args: Megatron's arguments: `num_layers`, `pipeline_model_parallel_size`,
            `virtual_pipeline_model_parallel_size`, and those that make stages uneven.

    Raises:
        CheckpointError: the layers cannot be split the way the arguments say.
    """
    ranks = int(args.get("pipeline_model_parallel_size") or 1)
    chunks = int(args.get("virtual_pipeline_model_parallel_size") or 1)
    text = args.get("pipeline_model_parallel_layout")
    try:
        listed = decoder_layers(parse_layout(str(text), ranks)) if text is not None else ()
        split = _Split(
            ranks,
            len(listed[0]) if listed else chunks,
            listed,
            int(args.get("decoder_first_pipeline_num_layers") or 0),
            int(args.get("decoder_last_pipeline_num_layers") or 0),
            bool(args.get("account_for_embedding_in_pipeline_split")),
            bool(args.get("account_for_loss_in_pipeline_split")),
            bool(args.get("standalone_embedding_stage")),
        )
        return stage_layout(Record(args, "the checkpoint's `args`", CheckpointError).integer("num_layers"), split)
    except ConfigError as error:
        told = f"pipeline_model_parallel_layout={text!r} " if text is not None else ""
        raise CheckpointError(f"the checkpoint's arguments: {told}{error}") from None


@dataclass
class Chunk:
    """One model chunk of one rank: its parameters under canonical names, in registration order.

    Attributes:
        tp: tensor parallel rank.
        pp: pipeline rank.
        index: which chunk of that rank.
        tensors: local tensors by name with the chunk's own layer numbers.
        num_layers: how many layers it has.
        first_layer: global number of its first layer.
        ep: expert parallel rank.
    """

    tp: int
    pp: int
    index: int
    tensors: dict[str, TorchTensor]
    num_layers: int
    first_layer: int = 0
    ep: int = 0

    def only(self, wanted: Callable[[str], bool]) -> Chunk:
        """Return the chunk with some of its parameters."""
        return replace(self, tensors={name: tensor for name, tensor in self.tensors.items() if wanted(name)})

    def global_name(self, name: str) -> str:
        """Return a parameter's name with the global layer number."""
        return with_layer_offset(name, self.first_layer)


class Collector:
    """Takes each rank's part of each parameter and knows where in the global tensor it belongs."""

    def __init__(self, where: str, tp_size: int, gated: bool, te_spec: bool = False) -> None:
        """Start empty.

        Args:
            where: the checkpoint, for messages.
            tp_size: number of tensor parallel ranks that will contribute.
            gated: whether fc1 holds [gate ; up] per rank.
            te_spec: whether TransformerEngine's specification wrote it.
        """
        self._where, self._tp_size, self._gated, self._te_spec = where, tp_size, gated, te_spec
        self._tensors: dict[str, tuple[TensorInfo, list[Piece]]] = {}
        self._owners: dict[tuple[Any, ...], int] = {}

    def add(self, key: str, tp: int, array: Any, row_blocks: list[tuple[int, int, int]] | None = None) -> None:
        """Add a rank's local array of `key`.

        Args:
            key: `NAME` or `NAME@kind`.
            tp: tensor parallel rank it is from. Of a parameter that is not cut, rank 0's is taken.
            array: the local array, unread.
            row_blocks: when its rows are in another order, (row in the global order, first row here, step here) of
                each block of rows; every block has the same length.
        """
        shard = self.shard(key, tuple(array.shape), array.dtype, tp)
        info, pieces = self._tensors.setdefault(key, (TensorInfo(shard.global_shape, array.dtype), []))
        if info != TensorInfo(shard.global_shape, array.dtype):
            raise CheckpointError(f"{self._where}: tensor parallel ranks disagree about {key}: {info} and {shard}")
        if tensor_parallel_dim(key.partition("@")[0], self._te_spec) is None and tp != 0:
            return
        if row_blocks:
            pieces += _permuted_rows(shard, array, row_blocks)
            return
        for box in shard.boxes:
            part = array if len(shard.boxes) == 1 else array.crop(box.local)
            pieces.append(Piece(tuple(first for first, _ in box.globe), box.shape, part))

    def add_expert(self, grid: ExpertGrid, key: str, chunk: Chunk, array: Blob) -> None:
        """Add a rank's experts in a tensor of any specification.

        Args:
            grid: how the run shares experts out.
            key: `NAME` or `NAME@kind`, as stored, with the global layer number.
            chunk: the rank and chunk.
            array: the local array, unread.
        """
        stored, at, kind = key.partition("@")
        etp = grid.etp_rank(chunk.tp, chunk.ep)
        if etp is None:
            return
        for name, number, matrix in grid.parts(stored, array, chunk.ep):
            info, pieces = grid.place(name, matrix, number, etp)
            self.add_pieces(f"{name}{at}{kind}", info, pieces, (number, etp), chunk.tp)

    def add_pieces(self, key: str, info: TensorInfo, pieces: list[Piece], part: tuple[Any, ...], tp: int) -> None:
        """Add a rank's pieces of `key`, which other tensor parallel ranks may have too: one of them counts.

        Args:
            key: `NAME` or `NAME@kind`.
            info: of the whole tensor.
            pieces: some or all of the rank's.
            part: which part of the tensor they are of.
            tp: tensor parallel rank.
        """
        if self._owners.setdefault((key, *part), tp) != tp:
            return
        found, all_pieces = self._tensors.setdefault(key, (info, []))
        if found != info:
            raise CheckpointError(f"{self._where}: ranks disagree about {key}: {found} and {info}")
        all_pieces += pieces

    def add_flat(self, key: str, tp: int, local_shape: tuple[int, ...], array: Any, first: int, start: int) -> None:
        """Add elements of a flat buffer that are part of a rank's local array of `key`.

        Args:
            key: `NAME@kind`.
            tp: tensor parallel rank.
            local_shape: shape of the rank's whole local array.
            array: the flat elements, unread.
            first: which element of the flattened local array the buffer's element `start` is.
            start: first element of `array` to use; all that follow belong to `key` too.
        """
        shard = self.shard(key, local_shape, array.dtype, tp)
        _, pieces = self._tensors.setdefault(key, (TensorInfo(shard.global_shape, array.dtype), []))
        if tensor_parallel_dim(key.partition("@")[0], self._te_spec) is None and tp != 0:
            return
        count = array.shape[0] - start
        for box in shard.flat_range(first, first + count).boxes:
            (a, b) = box.local[0]
            part = array.crop([(start + a, start + b)]).reshape(box.shape)
            pieces.append(Piece(tuple(begin for begin, _ in box.globe), box.shape, part))

    def shard(self, key: str, local_shape: tuple[int, ...], dtype: str, tp: int) -> TensorShard:
        """Return where a rank's local array of `key` belongs."""
        name = key.partition("@")[0]
        dim = tensor_parallel_dim(name, self._te_spec)
        if dim is None or self._tp_size == 1:
            return TensorShard.full(name, local_shape, dtype)
        if dim >= len(local_shape):
            raise CheckpointError(f"{self._where}: {key} of shape {list(local_shape)} has no dim {dim} to be cut along")
        shape = list(local_shape)
        shape[dim] *= self._tp_size
        return TensorShard.split(name, shape, dtype, dim, tp, self._tp_size, num_stacked_parts(name, self._gated))

    def tensors(self) -> dict[str, tuple[TensorInfo, list[Piece]]]:
        """Return everything added: parameters first, then optimizer states, each in the order of arrival."""
        return dict(sorted(self._tensors.items(), key=lambda item: "@" in item[0]))


def _permuted_rows(shard: TensorShard, array: Any, blocks: list[tuple[int, int, int]]) -> list[Piece]:
    box = shard.boxes[0]
    rows = array.shape[0] // len(blocks)
    first_row = box.globe[0][0]
    rest: list[Range] = [(0, n) for n in array.shape[1:]]
    pieces = []
    for target, source, step in blocks:
        span = array.crop([(source, source + (rows - 1) * step + 1), *rest])
        part = span.every(step)
        start = (first_row + target, *(begin for begin, _ in box.globe[1:]))
        pieces.append(Piece(start, (rows, *array.shape[1:]), part))
    return pieces


def old_qkv_rows(local_rows: int, num_heads: int, hidden_size: int, version: float) -> list[tuple[int, int, int]]:
    """Return how the rows of a query_key_value written before checkpoint version 2 are permuted.

    Version 0 stores rows as [3, heads, head size], version 1 as [heads, head size, 3]; the order since is
    [heads, 3, head size].

    Args:
        local_rows: rows on one tensor parallel rank.
        num_heads: heads of the whole model.
        hidden_size: hidden size; head size is `hidden_size / num_heads`.
        version: checkpoint version below 2.

    Returns:
        (row in today's order, first row in the file, step between rows in the file) for each block of a head's rows.
    """
    size = hidden_size // num_heads
    heads = local_rows // (3 * size)
    if version < 1:
        return [((head * 3 + i) * size, (i * heads + head) * size, 1) for head in range(heads) for i in range(3)]
    return [((head * 3 + i) * size, head * size * 3 + i, 3) for head in range(heads) for i in range(3)]
