"""Experts chosen in rounds, as MindFormers' router chooses them: who is first in the batch has room. NumPy alone.

In each of K rounds a token takes the likeliest of the experts that have not taken it; an expert of capacity C takes
C - 1 tokens, in the order of the samples and of the positions in each, and what earlier rounds brought counts. The
weights of the experts that took a token are rescaled to sum to 1; one expert's is its probability, so that the language
model's loss reaches the router. The balancing loss is one of each round: E sum_e share_e mean_t p_te, with the share of
tokens that chose e, taken or not, and the round's probabilities, which sum to 1 for each token.

Source: Lepikhin et al. 2020 (arXiv:2006.16668), algorithm 1. The published code
gives one expert the weight 1 and leaves the balancing loss out of the objective, so that nothing trains its router.

Shapes: T tokens, E experts, K rounds. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel_core.config.experts import MoEConfig
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.expert_parallel.routing import Routing, softmax, softmax_grad
from parallel_core.layout.sequence import positions, reorder, sequence_order

_EPS = np.float32(1e-9)


@dataclass(frozen=True)
class RoundsRouting(Routing):
    """What a router decided in rounds; `scores` are probabilities [T, E].

    Attributes:
        gates: [T, K], the probability of each choice.
        open: bool [K, T, E], the experts that a round chose from.
    """

    gates: np.ndarray
    open: np.ndarray


def route_in_rounds(logits: np.ndarray, moe: MoEConfig, ledger: RoutingLedger, batch: int) -> RoundsRouting:
    """Return the experts of every token of this rank.

    Args:
        logits: [T, E]; tokens of one position of the microbatch's samples next to each other.
        moe: how to choose.
        ledger: knows the ranks that hold the microbatch together.
        batch: samples in the microbatch.

    Communication: with a capacity one all-gather of the logits over each of tp and cp.
    """
    probabilities = softmax(logits)
    if moe.moe_expert_capacity_factor:
        order = _places(len(logits), batch, ledger)
        everyone = _together(logits, batch, ledger)
        experts, kept, opened, capacity = choose(softmax(everyone), moe)
        experts, kept, opened = experts[order], kept[order], opened[:, order]
    else:
        experts, kept, opened, capacity = choose(probabilities, moe)
    gates = np.take_along_axis(probabilities, experts, 1)
    weights = np.where(kept, gates, np.float32(0))
    if moe.moe_router_topk > 1:
        weights = weights / (weights.sum(1, keepdims=True) + _EPS)
    return RoundsRouting(experts, weights, kept, capacity, probabilities, gates, opened)


def choose(
    probabilities: np.ndarray, moe: MoEConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int | None]:
    """Return the choices of tokens in the order in which experts take them.

    Args:
        probabilities: [T, E].
        moe: how many rounds, how much room.

    Returns:
        Experts int64 [T, K], kept bool [T, K], the experts that each round chose from bool [K, T, E], capacity.
    """
    T, E = probabilities.shape
    K, capacity = moe.moe_router_topk, moe.capacity(T)
    experts, kept = np.empty((T, K), np.int64), np.ones((T, K), bool)
    opened, taken = np.ones((K, T, E), bool), np.zeros(E, np.int64)
    still, rows = np.ones((T, E), bool), np.arange(T)
    for k in range(K):
        opened[k] = still
        experts[:, k] = np.where(still, probabilities, np.float32(-1)).argmax(1)
        if capacity is not None:
            mine = np.zeros((T, E), np.int64)
            mine[rows, experts[:, k]] = 1
            place = mine.cumsum(0)[rows, experts[:, k]] + taken[experts[:, k]]
            kept[:, k] = place < capacity
        here = kept[:, k]
        still[rows[here], experts[here, k]] = False
        taken += np.bincount(experts[here, k], minlength=E)
    return experts, kept, opened, capacity


def grad_logits(routing: RoundsRouting, dweights: np.ndarray, moe: MoEConfig) -> np.ndarray:
    """Return the gradient of the weights for the logits, [T, E]."""
    dgates = np.where(routing.kept, dweights, np.float32(0))
    if moe.moe_router_topk > 1:
        total = np.where(routing.kept, routing.gates, np.float32(0)).sum(1, keepdims=True) + _EPS
        dgates = (dgates - (dgates * routing.weights).sum(1, keepdims=True)) / total
        dgates = np.where(routing.kept, dgates, np.float32(0))
    spread = np.zeros(routing.scores.shape, np.float32)
    np.add.at(spread, (np.arange(len(spread))[:, None], routing.experts), dgates)
    return softmax_grad(routing.scores, spread)


def balance_loss(routing: RoundsRouting, ledger: RoutingLedger) -> tuple[float, np.ndarray]:
    """Return this rank's part of the balancing loss of its microbatch, and the gradient for the logits, [T, E].

    Communication: one all-reduce of counts over each of tp and cp.
    """
    T, E = routing.scores.shape
    K = routing.experts.shape[1]
    chosen = np.stack([np.bincount(routing.experts[:, k], minlength=E) for k in range(K)]).astype(np.float32)
    tokens = T * ledger.parts
    slopes = ledger.over_microbatch(chosen) * np.float32(E / tokens**2)
    value, dscores = 0.0, np.zeros((T, E), np.float32)
    for slope, opened in zip(slopes, routing.open):
        left = np.where(opened, routing.scores, np.float32(0))
        total = left.sum(1, keepdims=True) + _EPS
        shares = left / total
        value += float((shares * slope).sum(dtype=np.float64))
        dscores += np.where(opened, (slope - (shares * slope).sum(1, keepdims=True)) / total, np.float32(0))
    return value, softmax_grad(routing.scores, dscores)


# ---- the whole microbatch -------------------------------------------------------------------------------------------
def _together(logits: np.ndarray, batch: int, ledger: RoutingLedger) -> np.ndarray:
    """Return the logits of the whole microbatch, sample by sample, [T x ranks, E]."""
    whole = ledger.gathered(logits.reshape(-1, batch, logits.shape[1]))
    whole = reorder(whole, sequence_order(ledger.cp.size)) if ledger.cp.size > 1 else whole
    return np.ascontiguousarray(whole.swapaxes(0, 1)).reshape(-1, logits.shape[1])


def _places(tokens: int, batch: int, ledger: RoutingLedger) -> np.ndarray:
    """Return where this rank's tokens stand in the whole microbatch, int64 [T]."""
    tp, cp = ledger.tp, ledger.cp
    own = tokens // batch
    length = own * tp.size * cp.size
    held = positions(length, cp.size, cp.rank)[tp.rank * own : (tp.rank + 1) * own]
    return (held[:, None] + length * np.arange(batch)).reshape(-1)
