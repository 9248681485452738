"""Frozen parameters: any subset, in any layout, without gradients or state, saved and loaded like the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from mindspore import nn

from parallel_core import ops
from parallel_core.config.schema import AllConfig
from parallel_core.errors import ParallelCoreError
from parallel_core.layout.shard import shard_of
from parallel_core.tensor_parallel import linear
from parallel_core.training.checkpointing import Checkpointer, Progress
from parallel_core.transformer import ModelStage
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import settings
from tests.ranks.support import Tiny, TinyRun, assert_close, context_of, from_rank_0, provide_model

SUBSETS: dict[str, Callable[[str], bool]] = {
    "embedding and head": lambda name: "embedding" in name or "output_layer" in name,
    "all but biases": lambda name: not name.endswith("bias"),
    "the first two layers and what is before": lambda name: "layers.0." in name or "layers.1." in name
    or "embedding" in name,
    "every linear weight": lambda name: "linear" in name and name.endswith("weight"),
}  # fmt: skip
LAYOUTS = {1: ["tp1"], 2: ["tp2 sp", "pp2", "dp2 distributed"], 4: ["tp2 sp pp2"]}


def frozen_provider(subset: str, shift: float = 0.0) -> Callable[..., nn.Cell]:
    """Return a provider of models of which a subset is frozen (and moved away from its initial values)."""

    def provide(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
        model = provide_model(pre_process, post_process, stage)
        for parameter in model.get_parameters():
            if SUBSETS[subset](shard_of(parameter).name):
                parameter.requires_grad = False
            if shift:
                parameter.set_data(parameter + shift)
        return model

    return provide


def of(layout: str) -> Tiny:
    """Return an untied tiny model in a layout, clipped so that the norm decides."""
    model = {"untie_embeddings_and_output_weights": True}
    base = settings(layout.replace(" distributed", ""))
    training = {"use_distributed_optimizer": "distributed" in layout}
    return base.with_(model=model, training=training, optimizer={"clip_grad": 0.05})


@case(world_size=(1, 2, 4), variants=[{"subset": subset} for subset in SUBSETS])
def test_the_rest_trains_as_on_one_rank_and_the_frozen_stay(ctx: CaseContext, subset: str) -> None:
    for layout in LAYOUTS[ctx.world_size]:
        check_training(ctx, layout, subset)


def check_training(ctx: CaseContext, layout: str, subset: str) -> None:
    run = TinyRun(of(layout), context_of(ctx, of(layout)), frozen_provider(subset))
    before = run.parameters()
    norms = np.array([report.grad_norm for report in run.train(3)])
    after, is_frozen = run.parameters(), SUBSETS[subset]
    trained = {name for name in after if not is_frozen(name)}
    assert trained and trained != set(after)
    for name, values in after.items():
        assert np.array_equal(values, before[name]) == is_frozen(name), name
    names = {shard_of(p).name for buffer in run.step.ddp.buffers for p in buffer.parameters}
    assert not any(map(is_frozen, names)), "frozen parameters have no place in a gradient buffer"

    def alone() -> dict[str, np.ndarray]:
        solo = CaseContext(0, 1, ctx.tmp_path)
        single = TinyRun(of("tp1"), context_of(solo, of("tp1")), frozen_provider(subset))
        single.train(3)
        return single.parameters()

    # fp32: the layouts add in other orders, and Adam divides by small roots
    assert_close(after, from_rank_0(ctx, alone), 2e-5)
    assert (norms > 0.05).all(), "clipping did nothing"


@case(world_size=1)
def test_no_weight_gradient_is_computed_for_a_frozen_layer(ctx: CaseContext) -> None:
    tiny = of("tp1")
    run = TinyRun(tiny, context_of(ctx, tiny), frozen_provider("every linear weight"))
    with (
        mock.patch.object(linear.ops, "linear_grad_weight", wraps=ops.linear_grad_weight) as returned,
        mock.patch.object(linear.ops, "linear_grad_weight_", wraps=ops.linear_grad_weight_) as written,
    ):
        run.train(1)
    microbatches = run.sizes.num_microbatches(0)
    assert returned.call_count + written.call_count == microbatches  # the output layer alone


@case(world_size=2)
def test_a_tied_embedding_that_one_stage_alone_has_frozen_is_refused(ctx: CaseContext) -> None:
    """By its own name, which is another on the last stage; that of its shard is the same on both."""
    tiny = of("pp2").with_(model={"untie_embeddings_and_output_weights": False})

    def provide(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
        model = provide_model(pre_process, post_process, stage)
        for parameter in model.get_parameters():
            parameter.requires_grad = not parameter.name.startswith("embedding")
        return model

    with pytest.raises(ParallelCoreError, match=r"tied embedding, embedding\.word_embeddings\.weight, is frozen on"):
        TinyRun(tiny, context_of(ctx, tiny), provide)
    TinyRun(tiny, context_of(ctx, tiny), frozen_provider("embedding and head")).train(1)


@case(
    world_size=2,
    variants=[
        {"first": first, "second": second} for first, second in (("tp2 sp", "pp2"), ("dp2 distributed", "tp2 sp"))
    ],
)
def test_frozen_parameters_are_saved_and_loaded_into_any_layout(ctx: CaseContext, first: str, second: str) -> None:
    def config(layout: str, **training: Any) -> Tiny:
        return of(layout).with_(training={"output_dir": str(ctx.tmp_path), **training})

    tiny = config(first)
    run = TinyRun(tiny, context_of(ctx, tiny), frozen_provider("all but biases", shift=0.25))
    run.train(2)
    values, moments = run.parameters(), run.moments("exp_avg")
    checkpointer(run.config, run).save(Progress(iteration=2))
    tiny = config(second, load_checkpoint=str(ctx.tmp_path))
    other = TinyRun(tiny, context_of(ctx, tiny), frozen_provider("all but biases"))
    assert checkpointer(other.config, other).load().iteration == 2
    assert_close(other.parameters(), values, 0.0)
    assert_close(other.moments("exp_avg"), moments, 0.0)
    assert set(moments) == {name for name in values if name.endswith("bias")}


def checkpointer(config: AllConfig, run: TinyRun) -> Checkpointer:
    return Checkpointer(config, run.context, run.step, lambda text: None)
