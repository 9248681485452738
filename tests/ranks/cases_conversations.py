"""Packed conversations train alike in every layout, whole models and adapters."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.config.lora import LoraConfig
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.training.batches import make_batch_source
from tests.helpers.cases import CaseContext, case
from tests.helpers.talks import TALKS, datasets, write
from tests.ranks.cases_layouts import settings
from tests.ranks.support import (
    LLAMA,
    SampleSource,
    Tiny,
    TinyRun,
    assert_close,
    context_of,
    from_rank_0,
    parallel_context,
)

LENGTH = 64
LAYOUTS = {2: ["tp2 sp", "pp2", "pp2 vpp2", "dp2 distopt overlap", "cp2 p2p", "cp2 a2a"], 4: ["tp2 sp pp2"]}


@functools.cache
def samples(number: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return datasets(write(Path(folder) / "talks.jsonl", TALKS), LENGTH, (number, 0, 0))[0]


class Packed:
    """The microbatches of one iteration, read as a run reads them."""

    forward_step = staticmethod(SampleSource.forward_step)

    def __init__(self, config: AllConfig, context: ParallelContext, num_microbatches: int, iteration: int) -> None:
        batch = config.dataset_config.global_batch_size
        chunks = config.parallel_config.virtual_pipeline_model_parallel_size or 1
        seen = (iteration - 1) % 4 * batch
        self._batches = make_batch_source(samples(4 * batch), seen, config, context, chunks)

    def iterator(self, chunk: int) -> Iterator[dict[str, Tensor | None]]:
        return self._batches.iterator(chunk)


def of(layout: str, rank: int) -> Tiny:
    lora = {"lora": LoraConfig(rank=rank, alpha=6.0)} if rank else {}
    return settings(layout).with_(
        model={**LLAMA.model, "seq_length": LENGTH},
        training=lora,
        data={"sft": True, "reset_attention_mask": True, "reset_position_ids": True, "num_workers": 0},
    )


@functools.cache
def alone(rank: int) -> dict[str, Any]:
    run = TinyRun(of("tp1", rank), parallel_context(0, 1), source=Packed)
    first = run.evaluate()["lm loss"]
    reports = run.train(3)
    return {"first": first, "losses": [r.losses["lm loss"] for r in reports], "gradients": run.gradients()}


@case(world_size=2, variants=[{"rank": 0}, {"rank": 3}])
def test_packed_conversations_train_as_on_one_rank(ctx: CaseContext, rank: int) -> None:
    as_on_one_rank(ctx, rank)


@case(world_size=4, variants=[{"rank": 0}, {"rank": 3}], slow=True)
def test_packed_conversations_of_four_ranks_train_as_on_one(ctx: CaseContext, rank: int) -> None:
    as_on_one_rank(ctx, rank)


def as_on_one_rank(ctx: CaseContext, rank: int) -> None:
    want = from_rank_0(ctx, lambda: alone(rank))
    for layout in LAYOUTS[ctx.world_size]:
        config = of(layout, rank)
        run = TinyRun(config, context_of(ctx, config), source=Packed)
        np.testing.assert_allclose(run.evaluate()["lm loss"], want["first"], rtol=2e-6, err_msg=layout)
        reports = run.train(3)
        np.testing.assert_allclose([r.losses["lm loss"] for r in reports], want["losses"], rtol=4e-6, err_msg=layout)
        assert_close(run.gradients(), want["gradients"], 1e-4)
