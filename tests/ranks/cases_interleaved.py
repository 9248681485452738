"""Microbatches in parts, one beside the communication of another: the same training as without."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.comm.background import BackgroundGroup, in_background
from parallel_core.errors import CommError
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import check, settings
from tests.ranks.support import LLAMA, Tiny, TinyRun, context_of, world_group

PARTS = {"micro_batch_interleave_num": 2}
TWO = {"data": {"batch_size": 2}}
LAYOUTS = ["tp2", "tp2 sp"]
SLOW_LAYOUTS = ["pp2", "dp2 distopt overlap"]


def in_parts(layout: str, **more: Any) -> Tiny:
    """Return a layout's run in two parts."""
    found = settings(layout)
    return replace(found, parallel={**found.parallel, **PARTS}).with_(**TWO, **more)


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS])
def test_parts_of_a_microbatch_train_like_the_whole(ctx: CaseContext, layout: str) -> None:
    """Uneven loss masks: the mean is over the tokens of both parts, not of two means."""
    check(ctx, Tiny().with_(**TWO), in_parts(layout))


@case(world_size=2, variants=[{"layout": name} for name in SLOW_LAYOUTS], slow=True)
def test_parts_train_like_the_whole_in_other_layouts(ctx: CaseContext, layout: str) -> None:
    check(ctx, Tiny().with_(**TWO), in_parts(layout))


@case(world_size=2, slow=True)
def test_parts_with_full_recomputation_and_documents_train_like_the_whole(ctx: CaseContext) -> None:
    model = {**LLAMA.model, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
    for name in LAYOUTS:
        more = {"model": model, "data": {"batch_size": 2, "reset_attention_mask": True}}
        check(ctx, LLAMA.with_(**more), in_parts(name).with_(**more))


@case(world_size=2)
def test_a_parts_sum_goes_on_while_another_part_computes(ctx: CaseContext) -> None:
    """Every forward sum is started before the next part's arithmetic and waited for after it."""
    run = TinyRun(in_parts("tp2"), context_of(ctx, in_parts("tp2")))
    tp, told = run.step.context.tp, []
    assert isinstance(tp, BackgroundGroup)
    reduce_ = tp.under.all_reduce_

    def noted(x: Tensor, op: str = "sum") -> Tensor:
        told.append(threading.current_thread() is not threading.main_thread())
        return reduce_(x, op)

    tp.under.all_reduce_ = noted  # type: ignore[method-assign]
    try:
        run.train(1)
    finally:
        del tp.under.all_reduce_
    assert sum(told) >= 8  # two layers x two sums x two parts, and as many in backward


@case(world_size=2)
def test_operations_in_the_background_keep_their_order_and_tell_of_errors(ctx: CaseContext) -> None:
    under = world_group(ctx)
    group = in_background(under)
    handles = [group.all_reduce_start_(Tensor(np.full(1000, float(n), np.float32))) for n in range(20)]
    (whole,) = {float(x) for x in group.all_reduce(Tensor(np.ones(3, np.float32))).asnumpy()}
    assert whole == 2.0 and all(h.wait().asnumpy()[0] == 2.0 * n for n, h in enumerate(handles))
    parts = group.reduce_scatter_start(Tensor(np.ones((4, 3), np.float32))).wait()
    assert parts.shape == (2, 3) and group.all_gather_start(parts).wait().shape == (4, 3)
    with pytest.raises(CommError):
        group.all_reduce_start_(Tensor(np.ones(3, np.complex64))).wait()
    group.barrier()
    assert time.monotonic() and group.waited_s >= 0
    group._thread.shutdown()
