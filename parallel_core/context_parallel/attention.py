"""Attention of a sequence that is cut over ranks, by one of four exchanges.

Every rank holds the positions that `layout.sequence` gives it. `all_gather` gathers keys and values; `p2p` passes them
round a ring (Liu et al. 2023, arXiv:2310.01889); `a2a` gives every rank some heads of the whole sequence (Ulysses,
arXiv:2309.14509); `a2a+p2p` does that in runs of neighbouring ranks and a ring over the runs (arXiv:2405.07719). All
four see the same keys from the same queries: what is visible is told by positions.

Shapes: S positions of this rank, B microbatch, N query heads, G key/value heads, D head size, E of values (else D),
X = (N / G + 1) * D + E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.context_parallel.blocks import Blocks, merged
from parallel_core.layout.sequence import held_order, sequence_order
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
        else:
            S, B, _, X = mixed_SBGX.shape
            query, key, value = ops.split_last_dim(mixed_SBGX, (X - both, head_size, both - head_size))
            query = reshaped(query, S, B, num_heads // u, head_size)
            if self._ring.size == 1:
                context = ops.causal_attention(query, key, value, document_start_BS=document_start_BS, **options)
            else:
                context = self._function.apply(query, key, value, document_start_BS, self._ring, options)
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
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, group: Group, options: dict[str, Any]
    ) -> Tensor:
        blocks = Blocks(query.shape[0], group.size, group.rank, start, options)
        kv, shapes = _together(key, value), (key.shape, value.shape)
        k, v = _gathered(kv, shapes, group)
        parts = [
            ops.attention_block(block.rows(query), k[:end], v[:end], block.start, **block.options(0))
            for block, end in ((block, block.first + blocks.length) for block in blocks.own)
        ]
        out = mint.cat([part for part, _ in parts], 0)
        ctx.save_for_backward(query, kv, out, *(lse for _, lse in parts))
        ctx.blocks, ctx.group, ctx.shapes = blocks, group, shapes
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, kv, out, *log_sum_exps = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        k, v = _gathered(kv, ctx.shapes, ctx.group)
        dqs: list[Tensor] = []
        sums: list[Any] = [None, None]  # of keys and of values
        for block, lse in zip(reversed(blocks.own), reversed(log_sum_exps)):  # the one that sees most keys first
            end = block.first + blocks.length
            dq, *seen = ops.attention_block_grad(
                block.rows(query), k[:end], v[:end], block.start, block.rows(out), block.rows(dout), lse,
                **block.options(0),
            )  # fmt: skip
            dqs.insert(0, dq)
            sums = [_sum_of_first(total, part) for total, part in zip(sums, seen)]
        order, size = held_order(ctx.group.size), ctx.group.size
        of_ranks = [_reordered(_longer(x, blocks.total), order).reshape(size, -1) for x in sums]
        mine = ctx.group.reduce_scatter(mint.cat(of_ranks, 1).reshape(-1), 0)
        return mint.cat(dqs, 0), *_apart(ops.cast(mine, kv.dtype), ctx.shapes), None, None, None


def _sum_of_first(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum of a gradient and that of its first rows, in float32: the ranks' sums are added."""
    part = ops.cast(part, ms.float32)
    return part if total is None else mint.cat((total[: part.shape[0]] + part, total[part.shape[0] :]), 0)


def _longer(x: Tensor, length: int) -> Tensor:
    """Return `length` rows: the last ones, which no query of this rank sees, have no gradient."""
    rest = length - x.shape[0]
    return mint.cat((x, mint.zeros((rest, *x.shape[1:]), dtype=x.dtype)), 0) if rest else x


def _gathered(kv: Tensor, shapes: _Shapes, group: Group) -> tuple[Tensor, ...]:
    """Return the keys and the values of the whole sequence, in order."""
    of_ranks = group.all_gather(kv, 0).reshape(group.size, -1)
    parts = [_apart(of_ranks[rank], shapes) for rank in range(group.size)]
    return tuple(_reordered(mint.cat(one, 0), sequence_order(group.size)) for one in zip(*parts))


# ---- ring -----------------------------------------------------------------------------------------------------------
class _Ring(Function):
    """Keys and values visit every rank; in backward their gradients travel with them and come home."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, group: Group, options: dict[str, Any]
    ) -> Tensor:
        blocks = Blocks(query.shape[0], group.size, group.rank, start, options)
        kv = visiting = _together(key, value)
        shapes = key.shape, value.shape
        found: list[tuple[Tensor, Tensor] | None] = [None, None]
        for step in range(group.size):
            arriving = group.shift_start(visiting) if step < group.size - 1 else None  # travels while this computes
            k, v = _apart(visiting, shapes)
            for place, block, theirs in blocks.pairs((group.rank - step) % group.size):
                part = ops.attention_block(
                    block.rows(query), theirs.rows(k), theirs.rows(v), block.start, **block.options(theirs.first)
                )
                found[place] = merged(found[place], part)
            visiting = visiting if arriving is None else arriving.wait()
        parts = [part for part in found if part is not None]
        out = ops.cast(mint.cat([part for part, _ in parts], 0), query.dtype)
        ctx.save_for_backward(query, kv, out, *(lse for _, lse in parts))
        ctx.blocks, ctx.group, ctx.shapes = blocks, group, shapes
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, visiting, out, *log_sum_exps = ctx.saved_tensors
        blocks, group = ctx.blocks, ctx.group
        dqs: list[Tensor | None] = [None, None]
        home: Any = None  # the gradients of the keys that visit, on their way round
        for step in range(group.size):
            arriving = group.shift_start(visiting) if step < group.size - 1 else None
            k, v = _apart(visiting, ctx.shapes)
            dks: list[Tensor | None] = [None, None]
            dvs: list[Tensor | None] = [None, None]
            for place, block, theirs in blocks.pairs((group.rank - step) % group.size):
                dq, dk, dv = ops.attention_block_grad(
                    block.rows(query), theirs.rows(k), theirs.rows(v), block.start, block.rows(out), block.rows(dout),
                    log_sum_exps[place], **block.options(theirs.first),
                )  # fmt: skip
                dqs[place] = _sum(dqs[place], dq)
                dks[theirs.place], dvs[theirs.place] = _sum(dks[theirs.place], dk), _sum(dvs[theirs.place], dv)
            dkv = mint.cat([_or_zeros(part, like).reshape(-1) for like, two in ((k, dks), (v, dvs)) for part in two], 0)
            dkv = dkv if home is None else dkv + home.wait()
            home = group.shift_start(dkv)
            visiting = visiting if arriving is None else arriving.wait()
        dk, dv = _apart(ops.cast(home.wait(), query.dtype), ctx.shapes)
        dq = mint.cat([_or_zeros(part, query) for part in dqs], 0)
        return ops.cast(dq, query.dtype), dk, dv, None, None, None


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum in float32: in a narrower type every rank of the ring would add its rounding."""
    part = ops.cast(part, ms.float32)
    return part if total is None else total + part


def _or_zeros(part: Tensor | None, like: Tensor) -> Tensor:
    """Return a chunk's gradient, zeros where nothing saw it."""
    return mint.zeros((like.shape[0] // 2, *like.shape[1:]), dtype=ms.float32) if part is None else part


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
        return _reordered(x, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _reordered(dy, ctx.back), None


def _to_sequence(x: Tensor, size: int) -> Tensor:
    return _Reorder.apply(x, sequence_order(size))


def _to_ranks(x: Tensor, size: int) -> Tensor:
    return _Reorder.apply(x, held_order(size))


def _reordered(x: Tensor, order: tuple[int, ...]) -> Tensor:
    length = x.shape[0] // len(order)
    return mint.cat([x[i * length : (i + 1) * length] for i in order], 0)


_Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of keys and values."""


def _together(key: Tensor, value: Tensor) -> Tensor:
    """Return keys and values one behind the other, 1-D: they travel as one, and are told apart without a copy."""
    return mint.cat((key.reshape(-1), value.reshape(-1)), 0)


def _apart(kv: Tensor, shapes: _Shapes) -> tuple[Tensor, Tensor]:
    middle = math.prod(shapes[0])
    return kv[:middle].reshape(shapes[0]), kv[middle:].reshape(shapes[1])
