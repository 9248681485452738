"""Multi-token prediction in every layout against one process."""

from __future__ import annotations

import functools

import numpy as np

from parallel_core.config.multi_token import MTPConfig
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_latent_attention import MODEL as LATENT
from tests.ranks.cases_layouts import ITERATIONS, RTOL, check, settings
from tests.ranks.support import LLAMA, TinyRun, context_of, from_rank_0, parallel_context

MODEL = {**LATENT, "mtp": MTPConfig(mtp_num_layers=2, mtp_loss_scaling_factor=0.5)}
TIED = {**LLAMA.model, "mtp": MTPConfig(mtp_num_layers=1), "untie_embeddings_and_output_weights": False}
LAYOUTS_OF_2 = ["tp2", "tp2 sp", "pp2", "cp2 p2p"]
SLOW_LAYOUTS_OF_2 = ["pp2 vpp2", "dp2", "dp2 distopt overlap", "cp2 a2a"]
LAYOUTS_OF_4 = ["tp2 sp pp2", "tp2 cp2 sp", "pp2 vpp2 distopt overlap", "cp2 pp2", "tp4 sp"]


def compare(ctx: CaseContext, layout: str, model: dict = MODEL, **training: bool) -> None:
    common = LLAMA.with_(model=model, training=training)
    mine = settings(layout).with_(model=model, training=training)
    check(ctx, common, mine)
    logged = "mtp_1 loss"
    run = TinyRun(mine, context_of(ctx, mine))
    found = [report.losses[logged] for report in run.train(ITERATIONS)]
    one = functools.partial(TinyRun, common, parallel_context(0, 1))
    want = from_rank_0(ctx, lambda: [report.losses[logged] for report in one().train(ITERATIONS)])
    np.testing.assert_allclose(found, want, rtol=RTOL)
    assert logged not in run.evaluate()


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS_OF_2])
def test_two_ranks_predict_further_tokens_like_one(ctx: CaseContext, layout: str) -> None:
    """Two depths over latent attention, an output layer of its own, uneven loss masks."""
    compare(ctx, layout)


@case(world_size=2)
def test_a_tied_embedding_serves_as_table_and_as_output_layer_of_the_last_stage(ctx: CaseContext) -> None:
    compare(ctx, "pp2", TIED)


@case(world_size=2, variants=[{"layout": name} for name in SLOW_LAYOUTS_OF_2], slow=True)
def test_two_more_ranks_predict_further_tokens_like_one(ctx: CaseContext, layout: str) -> None:
    compare(ctx, layout)
    compare(ctx, layout, TIED)


@case(world_size=2, variants=[{"layout": name} for name in ("tp2 sp", "pp2", "cp2 p2p")], slow=True)
def test_losses_per_token(ctx: CaseContext, layout: str) -> None:
    compare(ctx, layout, calculate_per_token_loss=True)


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4], slow=True)
def test_four_ranks_predict_further_tokens_like_one(ctx: CaseContext, layout: str) -> None:
    compare(ctx, layout)
