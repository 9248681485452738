"""A word embedding whose rows are cut over the tensor parallel group."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import Group
from parallel_core.deferral import late_gradient
from parallel_core.layout.shard import Cut, TensorShard
from parallel_core.main_grad import main_grad_of, needs_gradient
from parallel_core.tensor_parallel import mappings
from parallel_core.tensor_parallel.checks import check_ids
from parallel_core.tensor_parallel.parameter import InitMethod, make_parameter


class VocabParallelEmbedding(nn.Cell):
    """Looks ids up in a [num_embeddings, embedding_dim] table of which every rank has an equal range of rows.

    Args:
        num_embeddings: rows of the full table; a multiple of the group's size.
        embedding_dim: columns.
        tp_group: the tensor parallel group.
        init_method: initial value of the full table.
        reduce_scatter_embeddings: return this rank's part along dim 0 only (sequence parallelism).
        params_dtype, dtype: of the table, and of the output as a MindSpore type; None: the table's.
        name: global name of the layer; its parameter is `{name}.weight`.

    Backward:
        dense gradient of this rank's rows.

    Communication:
        forward 1 all-reduce (or reduce-scatter) of the output's elements; backward 1 all-gather in the latter case.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        tp_group: Group,
        init_method: InitMethod,
        reduce_scatter_embeddings: bool = False,
        params_dtype: str = "float32",
        dtype: Any = None,
        name: str = "embedding",
    ) -> None:
        super().__init__(auto_prefix=True)
        self.tp_group, self.reduce_scatter_embeddings, self.dtype = tp_group, reduce_scatter_embeddings, dtype
        rows = Cut("tp", 0, tp_group.rank, tp_group.size)
        shard = TensorShard.cut(f"{name}.weight", (num_embeddings, embedding_dim), rows, is_embedding_or_output=True)
        self.weight = make_parameter(shard, init_method, params_dtype)
        self.first_row = tp_group.rank * shard.local_shape[0]

    def construct(self, ids: Tensor) -> Tensor:
        """Return the rows of `ids`.

        Args:
            ids: int32 of any shape; dim 0 is the sequence if `reduce_scatter_embeddings`.

        Returns:
            [*ids.shape, embedding_dim], or with dim 0 divided by the group's size.
        """
        check_ids(ids, self.weight.shard.global_shape[0], self.weight.shard.name)
        partial = embedding_lookup(ids, self.weight, self.first_row, self.dtype)
        if self.reduce_scatter_embeddings:
            return mappings.reduce_scatter_to_sequence_parallel_region(partial, self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(partial, self.tp_group)


def embedding_lookup(ids: Tensor, table: Tensor, first_row: int = 0, dtype: Any = None) -> Tensor:
    """Return rows `ids - first_row` of the [R, H] table, zeros for ids outside: [*ids.shape, H] of `dtype` or its own.

    Backward: dense gradient of the table. Communication: none.
    """
    return _LocalEmbedding.apply(ids, table, first_row, dtype)


class _LocalEmbedding(Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, first_row: int, dtype: Any) -> Tensor:
        ctx.first_row, ctx.weight = first_row, weight
        ids_T = ops.shaped(ids.contiguous(), (ids.size,))
        ctx.save_for_backward(ids_T)
        return ops.shaped(ops.embedding(ids_T, weight, first_row, dtype), (*ids.shape, weight.shape[1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not needs_gradient(ctx.weight):
            return None, None, None, None
        (ids_T,), first_row, weight = ctx.saved_tensors, ctx.first_row, ctx.weight
        dy_TH = ops.shaped(ops.cast(dy, ms.float32).contiguous(), (ids_T.size, dy.shape[-1]))
        main_grad = main_grad_of(weight, dy_TH)
        if main_grad is None:
            dw = late_gradient(
                weight,
                lambda: ops.cast(ops.embedding_grad_table(dy_TH, ids_T, weight.shape[0], first_row), weight.dtype),
            )
            return None, dw, None, None
        dw = main_grad.accumulate(
            lambda into_VH, add: ops.embedding_grad_table_(into_VH, dy_TH, ids_T, first_row, add), lookup=True
        )
        return None, dw, None, None
