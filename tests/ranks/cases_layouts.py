"""Every layout trains the same model: losses, gradient norms, gradients and parameters against one process."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.cases import CaseContext, case
from tests.ranks.support import Tiny, TinyRun, assert_close, from_rank_0, parallel_context

ITERATIONS = 3
RTOL = 2e-6
"""fp32: sums over ranks and microbatches are made in another order, each off by up to 6e-8 of the largest term, and
three Adam updates, whose steps are of order lr whatever the gradient's size, carry that on."""


def reference(tiny: Tiny) -> dict[str, Any]:
    """Train on one process."""
    context = parallel_context(0, 1)
    run = TinyRun(tiny, context)
    reports = run.train(ITERATIONS)
    return {
        "losses": [r.losses["lm loss"] for r in reports],
        "norms": [r.grad_norm for r in reports],
        "gradients": run.gradients(),
        "evaluation": run.evaluate()["lm loss"],
    }


def check(ctx: CaseContext, common: Tiny, layout: Tiny) -> None:
    want = from_rank_0(ctx, lambda: reference(common))
    parallel = layout.parallel
    context = parallel_context(
        ctx.rank,
        ctx.world_size,
        parallel.get("tensor_model_parallel_size", 1),
        parallel.get("pipeline_model_parallel_size", 1),
    )
    run = TinyRun(layout, context)
    reports = run.train(ITERATIONS)
    np.testing.assert_allclose([r.losses["lm loss"] for r in reports], want["losses"], rtol=RTOL)
    np.testing.assert_allclose([r.grad_norm for r in reports], want["norms"], rtol=10 * RTOL)
    assert_close(run.gradients(), want["gradients"], 20 * RTOL)
    run.parameters()  # replicas agree to the bit
    np.testing.assert_allclose(run.evaluate()["lm loss"], want["evaluation"], rtol=RTOL)


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS_OF_2 = [
    {"layout": "tp2"},
    {"layout": "tp2 sp"},
    {"layout": "pp2"},
    {"layout": "pp2 vpp2"},
    {"layout": "dp2"},
    {"layout": "dp2 distopt overlap"},
]


def settings(layout: str) -> dict[str, dict[str, Any]]:
    """Return the sections of a layout's name."""
    parallel: dict[str, Any] = {}
    training: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    for word in layout.split():
        if word.startswith("tp"):
            parallel["tensor_model_parallel_size"] = int(word[2:])
        elif word.startswith("pp"):
            parallel["pipeline_model_parallel_size"] = int(word[2:])
        elif word.startswith("vpp"):
            parallel["virtual_pipeline_model_parallel_size"] = int(word[3:])
        elif word == "sp":
            parallel["sequence_parallel"] = True
        elif word == "distopt":
            training["use_distributed_optimizer"] = True
        elif word == "overlap":
            training |= {"overlap_grad_reduce": True, "bucket_size": 500}
            optimizer["overlap_param_gather"] = training.get("use_distributed_optimizer", False)
    return {"parallel": parallel, "training": training, "optimizer": optimizer}


@case(world_size=2, variants=LAYOUTS_OF_2)
def test_two_ranks_train_like_one(ctx: CaseContext, layout: str) -> None:
    check(ctx, Tiny(), Tiny(**settings(layout)))
