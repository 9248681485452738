"""Attention of a sequence that is cut over ranks, by one of four exchanges.

Every rank holds the positions that `layout.sequence` gives it. `all_gather` gathers keys and values; `p2p` passes them
round a ring (Liu et al. 2023, arXiv:2310.01889); `a2a` gives every rank some heads of the whole sequence (Ulysses,
arXiv:2309.14509); `a2a+p2p` does that in runs of neighbouring ranks and a ring over the runs (arXiv:2405.07719). All
four see the same keys from the same queries: what is visible is told by positions.

Shapes: S positions of this rank, B microbatch, N query heads, G key/value heads, D head size, E of values (else D),
X = (N / G + 1) * D + E.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.context_parallel.blocks import Chunks, Meetings
from parallel_core.layout.sequence import held_order, sequence_order
from parallel_core.ops.fused_attention import Ring
from parallel_core.tape import reshaped
from parallel_core.tensor_parallel.mappings import all_to_all


@dataclass(frozen=True)
class ContextGroups:
    """The ranks that hold parts of the same sequences.

    Attributes:
        cp: all of them.
        inner: the runs of neighbouring ranks that exchange heads under `a2a+p2p`.
        ring: one rank of each run, with the same place in it.
    """

    cp: Group = field(default_factory=SoloGroup)
    inner: Group = field(default_factory=SoloGroup)
    ring: Group = field(default_factory=SoloGroup)

    def of(self, exchange: str) -> tuple[Group, Group]:
        """Return the groups (that exchange heads, that pass keys on) of an exchange."""
        solo = SoloGroup("solo", self.cp.ranks[self.cp.rank])
        return {"a2a": (self.cp, solo), "a2a+p2p": (self.inner, self.ring)}.get(exchange, (solo, self.cp))


class ContextAttention:
    """Causal attention over the ranks of `groups.cp`; has no parameters and keeps nothing between calls.

    Args:
        groups: the ranks.
        exchange: one of `layout.sequence.EXCHANGES`.

    Backward:
        the gradients of this rank's queries, keys and values.

    Communication (elements that leave a rank, forward and backward, of S * B * D, with c = CP):
        p2p 6 G (c - 1) + 2 G; all_gather 6 G (c - 1), keys and values being gathered again in backward; a2a
        (1 - 1 / c) 4 (N + max(G, c)); messages 3 c - 2, 3 and 4.
    """

    def __init__(self, groups: ContextGroups, exchange: str) -> None:
        self._heads, self._ring = groups.of(exchange)
        self._function = _AllGather if exchange == "all_gather" else _Ring

    def packed(
        self,
        mixed_SBGX: Tensor,
        head_size: int,
        *,
        scale: float,
        softmax_coefficient: float = 1.0,
        softmax_in_fp32: bool = True,  # noqa: ARG002 - blocks are joined in float32
        document_start_BS: Tensor | None = None,
        dropout_rate: float = 0.0,
        dropout_seed: tuple[int, int] = (0, 0),
        value_size: int | None = None,
    ) -> Tensor:
        """Return the context [S, B, N * E] of packed queries, keys and values (see `ops.causal_attention_packed`).

        Args:
            mixed_SBGX: this rank's positions.
            head_size: D.
            scale: factor of the scores.
            softmax_coefficient: further factor (query-key layer scaling).
            softmax_in_fp32: the softmax is always in float32 here.
            document_start_BS: int32, the first position that each position of the *whole* sequence may see; None: 0.
            dropout_rate: share of the attention weights set to zero.
            dropout_seed: the same on all ranks of the group: masks are drawn by position and head.
            value_size: E, the size of a value head; None: D.
        """
        u, both = self._heads.size, head_size + (value_size or head_size)
        num_heads = mixed_SBGX.shape[2] * ((mixed_SBGX.shape[3] - both) // head_size)
        if u > 1:
            mixed_SBGX = _to_sequence(all_to_all(_whole_groups(mixed_SBGX, both, u), self._heads, 2, 0), u)
        heads = (self._heads.rank * num_heads // u, num_heads)
        factor = scale * softmax_coefficient
        options: dict[str, Any] = {"scale": factor, "heads": heads}
        options |= {"dropout_rate": dropout_rate, "dropout_seed": dropout_seed}
        if self._ring.size == 1 and both == 2 * head_size:
            context = ops.causal_attention_packed(
                mixed_SBGX, head_size, document_start_BS=document_start_BS, softmax_in_fp32=True, **options
            )
        elif self._ring.size == 1:
            S, B, _, X = mixed_SBGX.shape
            query, key, value = ops.split_last_dim(mixed_SBGX, (X - both, head_size, both - head_size))
            query = reshaped(query, S, B, num_heads // u, head_size)
            context = ops.causal_attention(query, key, value, document_start_BS=document_start_BS, **options)
        else:
            query, keys = ops.split_last_dim(mixed_SBGX, (mixed_SBGX.shape[3] - both, both))
            options |= {"head_size": head_size}
            context = self._function.apply(query, keys, document_start_BS, self._ring, options)
        return all_to_all(_to_ranks(context, u), self._heads, 0, 2) if u > 1 else context

    def __call__(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGE: Tensor, **options: Any) -> Tensor:
        """Return the context of queries, keys and values that stand apart; the options are those of `packed`."""
        S, B, G, D = key_SBGD.shape
        query = reshaped(query_SBND, S, B, G, query_SBND.shape[2] // G * D)
        mixed = ops.packed_heads(query, key_SBGD, value_SBGE)
        return self.packed(mixed, D, value_size=value_SBGE.shape[-1], **options)


# ---- all-gather -----------------------------------------------------------------------------------------------------
class _AllGather(Function):
    """Each of this rank's chunks attends to the gathered keys up to its own end."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, start: Tensor | None, group: Group, options: dict[str, Any]
    ) -> Tensor:
        chunks = Chunks(query.shape[0], group.size, group.rank, start)
        ctx.options = {**options, "length": chunks.length, "meetings": chunks.with_all()}
        gathered = _gathered(keys, group)
        out, log_sum_exp = ops.attention_of_meetings(query, gathered, None, None, start, **ctx.options)
        out = ops.cast(out, query.dtype)
        ctx.save_for_backward(query, keys, out, log_sum_exp)
        ctx.start, ctx.group = start, group
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, out, log_sum_exp = ctx.saved_tensors
        gathered, group = _gathered(keys, ctx.group), ctx.group
        dquery, dkeys = ops.attention_of_meetings_grad(
            query, gathered, out, dout, log_sum_exp, None, ctx.start, **ctx.options
        )
        mine = group.reduce_scatter(ops.reordered(dkeys, held_order(group.size)), 0)
        return ops.cast(dquery, query.dtype), ops.cast(mine, keys.dtype), None, None, None


def _gathered(keys: Tensor, group: Group) -> Tensor:
    """Return the keys and values of the whole sequence, in order."""
    return ops.reordered(group.all_gather(keys, 0), sequence_order(group.size))


# ---- ring -----------------------------------------------------------------------------------------------------------
class _Ring(Function):
    """Keys and values visit every rank; in backward their gradients travel with them and come home.

    Where messages are functions of C, as over shared memory, all of it is one call, in the order of the calls here.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, start: Tensor | None, group: Group, options: dict[str, Any]
    ) -> Tensor:
        chunks = Chunks(query.shape[0], group.size, group.rank, start)
        ctx.start, ctx.group, ctx.visits = start, group, chunks.visits()
        ctx.options = {**options, "length": chunks.length}
        ctx.in_one_call = _ring_of_one_call(ctx) if query.dtype == ms.float32 else None
        if ctx.in_one_call is not None:
            out, log_sum_exp = ctx.in_one_call.attend(query, keys, start)
        else:
            out, log_sum_exp = _attend(ctx, query, keys)
        ctx.save_for_backward(query, keys, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, out, log_sum_exp = ctx.saved_tensors
        if ctx.in_one_call is not None:
            dquery, dkeys = ctx.in_one_call.take_back(query, keys, out, dout, log_sum_exp, ctx.start)
        else:
            dquery, dkeys = _take_back(ctx, query, keys, out, dout, log_sum_exp)
        return dquery, dkeys, None, None, None


def _ring_of_one_call(ctx: Any) -> Ring | None:
    """Return what computes and communicates in one C call, where kernels and messages are functions of C."""
    group = ctx.group
    passing = group.passing() if ops.are_compiled() else None
    if passing is None:
        return None
    next_, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    fields = passing.group, passing.send, passing.receive, passing.float32, next_, previous
    return Ring(fields, passing.limit_s, passing.check, ctx.visits, ctx.options)


def _attend(ctx: Any, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Any, Any] = (None, None)
    for met, visiting in _visits(keys, ctx.visits, ctx.group):
        found = ops.attention_of_meetings(query, visiting, *found, ctx.start, meetings=met, **ctx.options)
    return ops.cast(found[0], query.dtype), found[1]


def _take_back(
    ctx: Any, query: Tensor, keys: Tensor, out: Tensor, dout: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor]:
    dquery: Any = None
    home: Any = None  # the gradients of the keys that visit, on their way round
    for met, visiting in _visits(keys, ctx.visits, ctx.group):
        dquery, dkeys = ops.attention_of_meetings_grad(
            query, visiting, out, dout, log_sum_exp, dquery, ctx.start, meetings=met, **ctx.options
        )
        home = ctx.group.shift_start(dkeys if home is None else ops.total(dkeys, home.wait()))
    return ops.cast(dquery, query.dtype), ops.cast(home.wait(), keys.dtype)


def _visits(keys: Tensor, visits: tuple[Meetings, ...], group: Group) -> Iterator[tuple[Meetings, Tensor]]:
    """Yield what this rank's queries meet of each rank's keys and values, and these, which travel on meanwhile."""
    for step, met in enumerate(visits):
        arriving = group.shift_start(keys) if step < group.size - 1 else None
        yield met, keys
        keys = keys if arriving is None else arriving.wait()


# ---- heads ----------------------------------------------------------------------------------------------------------
def _whole_groups(mixed_SBGX: Tensor, both: int, u: int) -> Tensor:
    """Return packed heads whose groups can be dealt out to `u` ranks, the key and value of a group (together of size
    `both`) repeated where they must be.
    """
    G = mixed_SBGX.shape[2]
    return mixed_SBGX if G % u == 0 else _RepeatGroups.apply(mixed_SBGX, both, u // G)


class _RepeatGroups(Function):
    """Cuts each group's query heads into `times` groups, which all have its key and value; backward sums them."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, both: int, times: int) -> Tensor:
        S, B, G, X = mixed.shape
        ctx.shape, ctx.both, ctx.times = mixed.shape, both, times
        width = (X - both) // times
        shared = mixed[..., X - both :]
        parts = [mint.cat((mixed[..., i * width : (i + 1) * width], shared), -1) for i in range(times)]
        return mint.cat([part.reshape(S, B, G, 1, -1) for part in parts], 3).reshape(S, B, G * times, -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        S, B, G, X = ctx.shape
        width = (X - ctx.both) // ctx.times
        parts = dy.reshape(S, B, G, ctx.times, -1)
        queries = parts[..., :width].reshape(S, B, G, -1)
        return mint.cat((queries, parts[..., width:].sum(3)), -1), None, None


class _Reorder(Function):
    """Puts the rows' chunks in another order; backward puts them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: tuple[int, ...]) -> Tensor:
        ctx.back = tuple(order.index(i) for i in range(len(order)))
        return ops.reordered(x, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ops.reordered(dy, ctx.back), None


def _to_sequence(x: Tensor, size: int) -> Tensor:
    return _Reorder.apply(x, sequence_order(size))


def _to_ranks(x: Tensor, size: int) -> Tensor:
    return _Reorder.apply(x, held_order(size))
