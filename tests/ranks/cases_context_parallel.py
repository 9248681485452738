"""Attention of a sequence cut over ranks: every exchange gives what one rank computes, forward and backward."""

from __future__ import annotations

import functools
import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.autograd import backward
from parallel_core.comm.shm import ShmGroup
from parallel_core.config.schema import FlashAttentionConfig
from parallel_core.context import ParallelContext
from parallel_core.context_parallel.attention import ContextAttention, ContextGroups
from parallel_core.errors import CommError
from parallel_core.layout.sequence import cut, positions
from parallel_core.tape import Tape
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import check as check_layout
from tests.ranks.cases_layouts import settings, without_rounding
from tests.ranks.support import (
    LLAMA,
    Tiny,
    TinyRun,
    context_of,
    from_rank_0,
    group_of,
    on_a_tape,
    parallel_context,
    world_group,
)

S, B, D = 64, 2, 8
SEED = (11, 5)


class Attend(nn.Cell):
    """An attention function as a Cell, for autograd."""

    def __init__(self, function: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options

    def construct(self, mixed: Tensor) -> Tensor:
        return self.function(mixed, D, **self.options)


def run(function: Any, mixed: np.ndarray, dout: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the context and the gradient of the packed queries, keys and values."""
    cell = Attend(function, options)
    cell.set_grad(True)
    entry = Tensor(mixed)
    out = cell(entry)
    ((gradient, *_), _) = backward(cell, (entry,), [], Tensor(dout))
    return out.asnumpy(), gradient.asnumpy()


def run_on_tape(
    function: Any, mixed: np.ndarray, dout: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same, without MindSpore's autograd."""
    tape = Tape(lambda x: function(x, D, **options), (Tensor(mixed),), ())
    out = tape.output
    ((gradient,), _) = tape.backward(Tensor(dout))
    return out.asnumpy(), gradient.asnumpy()


def starts(kind: str, rng: np.random.Generator) -> np.ndarray | None:
    """Return the first position that each position may see, int32 [B, S]."""
    if kind == "causal":
        return None
    if kind == "window":
        return np.broadcast_to(np.maximum(np.arange(S) - 13, 0), (B, S)).astype(np.int32).copy()
    start = np.zeros((B, S), np.int32)
    for sample in start:
        for place in sorted(rng.choice(np.arange(1, S), 5, replace=False)):
            sample[place:] = place
    return start


def groups_of(ctx: CaseContext, inner: int) -> ContextGroups:
    cp, size = world_group(ctx), ctx.world_size
    runs = [list(range(i, i + inner)) for i in range(0, size, inner)]
    rings = [list(range(j, size, inner)) for j in range(inner)]
    mine = (next(ranks for ranks in every if ctx.rank in ranks) for every in (runs, rings))
    return ContextGroups(cp, *(group_of(ctx, ranks) for ranks in mine))


EXCHANGES = ["all_gather", "p2p", "a2a", "a2a+p2p"]


@case(
    world_size=(2, 4),
    variants=[
        {"exchange": exchange, "kernels": kernels}
        for exchange, kernels in itertools.product(EXCHANGES, ("auto", "local"))
    ],
)
def test_every_exchange_computes_what_one_rank_does(ctx: CaseContext, exchange: str, kernels: str) -> None:
    """GQA with more and with fewer key heads than ranks, documents that begin anywhere, windows, dropout."""
    ops.use_kernels(kernels)
    rates = (0.0, 0.3) if kernels == "auto" else (0.0,)  # plain operators draw by block
    for (N, G), kind, rate in itertools.product([(8, 8), (8, 2), (4, 1)], ("causal", "window", "documents"), rates):
        rng = np.random.default_rng([N, G])
        start = starts(kind, rng)
        mixed = rng.standard_normal((S, B, G, (N // G + 2) * D)).astype(np.float32)
        dout = rng.standard_normal((S, B, N * D)).astype(np.float32)
        options: dict[str, Any] = {
            "scale": 0.3, "document_start_BS": None if start is None else Tensor(start), "dropout_rate": rate,
            "dropout_seed": SEED,
        }  # fmt: skip
        want, dwant = run(ops.causal_attention_packed, mixed, dout, softmax_in_fp32=True, **options)
        attention = ContextAttention(groups_of(ctx, 2), exchange)
        mine = positions(S, ctx.world_size, ctx.rank)
        given = cut(mixed, ctx.world_size, ctx.rank, 0), dout[mine].copy()
        out, gradient = run(attention.packed, *given, **options)
        what = f"{exchange}, {N} heads, {G} key heads, {kind}, dropout {rate}"
        if kernels == "auto":
            with mock.patch.object(ShmGroup, "passing", lambda _: None):  # the same by calls from here
                again = run_on_tape(attention.packed, *given, **options)
            for recorded, one_call, calls in zip(
                (out, gradient), run_on_tape(attention.packed, *given, **options), again
            ):
                np.testing.assert_array_equal(recorded, one_call, err_msg=what)
                np.testing.assert_array_equal(recorded, calls, err_msg=what)
        # fp32: sums of 64 products in another order; MindSpore's own exp is off by up to 6e-6
        atol = 3e-6 if kernels == "auto" else 2e-5
        np.testing.assert_allclose(out, want[mine], rtol=0, atol=atol, err_msg=what)
        np.testing.assert_allclose(gradient, dwant[mine], rtol=0, atol=4 * atol, err_msg=f"gradient: {what}")


@case(world_size=2)
def test_a_ring_says_what_came_in_place_of_keys(ctx: CaseContext) -> None:
    ops.use_kernels("auto")
    group = world_group(ctx)
    mixed = Tensor(np.zeros((S // 2, B, 2, 3 * D), np.float32))
    if ctx.rank == 0:
        with pytest.raises(CommError, match=r"receive in a ring.*a message of 12 bytes of float32"):
            ContextAttention(ContextGroups(group), "p2p").packed(mixed, D, scale=1.0)
    else:
        group.send(Tensor(np.zeros(3, np.float32)), 0)
        group.receive((S // 2, B, 2, 2 * D), mixed.dtype, 0).wait()
    group.barrier()
    if ctx.rank == 0:  # what nobody has taken is still there
        group.receive((3,), mixed.dtype, 1).wait()


# ---- whole runs -----------------------------------------------------------------------------------------------------
def check(ctx: CaseContext, common: Tiny, layout: Tiny) -> None:
    with on_a_tape():
        check_layout(ctx, common, layout)


SIXTEEN = {"seq_length": 16}
MANY_KEYS = {**LLAMA.model, "num_query_groups": 8}
LAYOUTS_OF_4 = [
    "cp4 p2p", "cp4 all_gather", "cp4 a2a", "cp4 a2a+p2p", "cp2 p2p tp2 sp", "cp2 a2a tp2", "cp2 all_gather pp2 vpp2",
    "cp2 p2p distopt overlap", "cp2 a2a pp2", "cp2 all_gather tp2 sp distopt",
]  # fmt: skip


@case(world_size=2, variants=[{"layout": f"cp2 {exchange}"} for exchange in ("p2p", "all_gather", "a2a")])
def test_two_parts_of_a_sequence_train_like_one(ctx: CaseContext, layout: str) -> None:
    """Learned positions, tied embedding, uneven loss masks that differ between the parts."""
    check(ctx, Tiny(), settings(layout))


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4])
def test_four_ranks_with_cut_sequences_train_like_one(ctx: CaseContext, layout: str) -> None:
    """Rotary positions, RMSNorm, SwiGLU, grouped queries."""
    model = {**MANY_KEYS, **SIXTEEN}
    check(ctx, LLAMA.with_(model=model), settings(layout).with_(model=model))


@case(world_size=2, variants=[{"layout": f"cp2 {exchange}"} for exchange in ("p2p", "all_gather", "a2a")])
def test_documents_and_windows_cross_the_cuts(ctx: CaseContext, layout: str) -> None:
    extra = {"reset_attention_mask": True}
    model = {**SIXTEEN, "fa_config": FlashAttentionConfig(pre_tokens=5)}
    check(ctx, Tiny(data=extra, model=model), settings(layout).with_(data=extra, model=model))


@case(world_size=2, variants=[{"layout": f"cp2 {exchange}"} for exchange in ("p2p", "all_gather", "a2a")])
def test_attention_dropout_draws_the_masks_of_one_rank(ctx: CaseContext, layout: str) -> None:
    rates = {**SIXTEEN, "attention_dropout_rate": 0.3}
    check(ctx, Tiny(model=rates), settings(layout).with_(model=rates))


# ---- twenty updates -------------------------------------------------------------------------------------------------
SMOOTH = Tiny(model={**SIXTEEN, "hidden_size": 32, "init_method_std": 0.05}, optimizer={"learning_rate": 1e-3})
"""Not where a rounding in one update becomes another curve in the next: what is left is the order of sums."""
MORE = ("tp2", "tp2 sp", "pp2", "pp2 vpp2", "distopt")
OF_TWO = ["cp2 p2p", "cp2 all_gather", "cp2 a2a"]
OF_FOUR = [
    *(f"cp4 {exchange}" for exchange in EXCHANGES),
    *(f"cp2 {exchange} {more}" for exchange in EXCHANGES[:3] for more in MORE),
]  # fmt: skip


@functools.cache
def twenty_on_one_rank(common: Tiny) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    return twenty(common, parallel_context(0, 1))


def twenty(tiny: Tiny, context: ParallelContext) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Return losses and gradient norms of twenty updates, and the first update's gradients."""
    run = TinyRun(tiny, context)
    reports = run.train()
    gradients = without_rounding(run.gradients())
    reports += run.train(19)
    return [r.losses["lm loss"] for r in reports], [r.grad_norm for r in reports], gradients


@case(world_size=2, variants=[{"layout": name} for name in OF_TWO], slow=True)
def test_twenty_updates_of_two_ranks_follow_one(ctx: CaseContext, layout: str) -> None:
    follow(ctx, layout, SMOOTH)


@case(world_size=4, variants=[{"layout": name} for name in OF_FOUR], slow=True)
def test_twenty_updates_of_four_ranks_follow_one(ctx: CaseContext, layout: str) -> None:
    follow(ctx, layout, SMOOTH.with_(model=MANY_KEYS))


def follow(ctx: CaseContext, layout: str, common: Tiny) -> None:
    """Losses, norms and every tensor's gradient (by the norm of the difference) within 1e-6 of one rank's."""
    tiny = settings(layout)
    tiny = common.with_(parallel=tiny.parallel, training=tiny.training, optimizer=tiny.optimizer)
    with on_a_tape():
        losses, norms, gradients = twenty(tiny, context_of(ctx, tiny))
    want = from_rank_0(ctx, lambda: twenty_on_one_rank(common))
    np.testing.assert_allclose(losses, want[0], rtol=1e-6)
    np.testing.assert_allclose(norms, want[1], rtol=1e-6)
    assert gradients.keys() == want[2].keys()
    for name, gradient in want[2].items():
        difference = np.linalg.norm((gradients[name] - gradient).astype(np.float64))
        assert difference <= 1e-6 * np.linalg.norm(gradient.astype(np.float64)), name
