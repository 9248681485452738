"""Experts chosen in rounds: the published numbers, what that code lost, slopes, and what does not go with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from parallel_core.config import load_config
from parallel_core.config.experts import MoEConfig
from parallel_core.config.plan import model_parameters
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.expert_parallel.rounds import balance_loss, choose, grad_logits, route_in_rounds
from parallel_core.expert_parallel.routing import softmax
from parallel_core.layout.shard import shard_of
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import PanguAlphaModel
from tests.unit.transformer.test_pangu_alpha import config

T, E = 8, 4
LOGITS = np.sin(0.7 * np.arange(T * E).reshape(T, E) + 0.3).astype(np.float32)


def rounds(k: int, factor: float) -> MoEConfig:
    return MoEConfig(num_experts=E, moe_router_topk=k, moe_router_rounds=True, moe_expert_capacity_factor=factor)


GOLDEN = [
    (1, 1.1, 3, 1.027025408774855, [2, 1, 1, 2]),
    (2, 1.1, 5, 2.3185507682654656, [4, 4, 4, 3]),
    (1, 2.0, 4, 1.027025408774855, [3, 1, 1, 3]),
]


@pytest.mark.parametrize(("k", "factor", "capacity", "aux", "kept"), GOLDEN)
def test_the_routing_is_the_published_one(k, factor, capacity, aux, kept):
    moe, ledger = rounds(k, factor), RoutingLedger()
    routing = route_in_rounds(LOGITS, moe, ledger, batch=1)
    assert (routing.capacity, routing.counts(E).tolist()) == (capacity, kept)
    assert balance_loss(routing, ledger)[0] == pytest.approx(aux, rel=1e-6)
    if k == 2:
        row = np.zeros(E)
        row[routing.experts[0]] = routing.weights[0]
        np.testing.assert_allclose(row, [0, 0.462522, 0.537478, 0], atol=1e-6)


def test_an_expert_takes_one_token_less_than_its_capacity_the_first_of_the_batch():
    """Samples are filled one after the other, though a position's samples lie side by side in memory."""
    logits = np.zeros((3, 2, E), np.float32)  # positions, samples; all choose expert 0 but the second sample's first
    logits[0, 1, 1] = 1
    routing = route_in_rounds(logits.reshape(6, E), rounds(1, 2.0), RoutingLedger(), batch=2)
    assert routing.capacity == 3
    assert routing.experts.reshape(3, 2).T.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert routing.kept.reshape(3, 2).T.tolist() == [[True, True, False], [True, False, False]]


def test_the_chosen_expert_weighs_what_its_probability_is_so_that_the_router_learns():
    """The published code divides one gate by itself: the language model's loss says nothing to the router."""
    moe = rounds(1, 2.0)
    routing = route_in_rounds(LOGITS, moe, RoutingLedger(), batch=1)
    want = np.where(routing.kept[:, 0], softmax(LOGITS).max(1), 0)
    np.testing.assert_allclose(routing.weights[:, 0], want, rtol=1e-6)
    assert np.abs(grad_logits(routing, np.ones((T, 1), np.float32), moe)).max() > 1e-2


def test_a_token_that_was_left_out_tries_again_and_two_rounds_never_take_it_twice():
    rng = np.random.default_rng(0)
    for _ in range(20):
        experts, kept, opened, _ = choose(softmax(rng.standard_normal((16, E)).astype(np.float32) * 4), rounds(3, 0.8))
        for t in range(16):
            taken = experts[t][kept[t]].tolist()
            assert len(set(taken)) == len(taken)
            assert all(opened[k, t, experts[t, k]] for k in range(3))
    sharp = np.zeros((4, E), np.float32)
    sharp[:, 1] = 1  # what is left is exactly zero, and the expert that has the token must not be taken again
    assert choose(sharp, rounds(2, 9.0))[0].tolist() == [[1, 0]] * 4


@pytest.mark.parametrize(("k", "factor"), [(1, 1.1), (2, 1.1), (2, 0.0), (3, 2.0)])
def test_gradients_are_the_slopes(k, factor):
    moe, ledger, rng = rounds(k, factor), RoutingLedger(), np.random.default_rng(k)
    routing = route_in_rounds(LOGITS, moe, ledger, batch=1)
    dweights = rng.standard_normal((T, k)).astype(np.float32)

    def values(logits: np.ndarray) -> tuple[float, float]:
        with_these = route_in_rounds(logits.astype(np.float32), moe, ledger, batch=1)
        assert (with_these.experts == routing.experts).all() and (with_these.kept == routing.kept).all()
        return float((with_these.weights * dweights).sum()), balance_loss(with_these, ledger)[0]

    slopes = [grad_logits(routing, dweights, moe), balance_loss(routing, ledger)[1]]
    for _ in range(4):
        direction, step = rng.standard_normal((T, E)), 3e-3
        above, below = values(LOGITS + step * direction), values(LOGITS - step * direction)
        for slope, a, b in zip(slopes, above, below):
            assert (slope * direction).sum() == pytest.approx((a - b) / (2 * step), rel=5e-3, abs=2e-3)


# ---- the model ------------------------------------------------------------------------------------------------------
def test_the_query_layer_has_no_experts_and_60b_are_as_many_as_published():
    options: dict[str, Any] = {"moe": MoEConfig(num_experts=4, moe_router_topk=1, moe_router_rounds=True)}
    model = PanguAlphaModel(ModelStage(config(**options)))
    names = {shard_of(p).name for p in model.trainable_params()}
    with_experts = {name.split(".")[2] for name in names if ".experts." in name}
    assert with_experts == {"0", "1"} and "decoder.layers.2.mlp.linear_fc1.weight" in names
    assert "decoder.layers.0.mlp.router.weight" in names and "decoder.layers.0.mlp.router.bias" not in names
    words = "--config configs/pangu_alpha_2.6b.yaml --num-experts 36 --moe-router-topk 1 --moe-router-rounds"
    words += " --expert-tensor-parallel-size 1"
    big = load_config(words.split()).config.model_config
    assert model_parameters(big) == 59_527_288_320
    assert big.moe.layers_with_experts(32) == 31
