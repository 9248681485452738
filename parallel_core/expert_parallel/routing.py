"""Which experts a token goes to and with what weight, and the gradients of weights and balancing losses. NumPy alone.

Source: Megatron-LM's router. Routing is decided on the host, where the sizes of the exchange that follows must be known
anyway. Of equal scores the expert with the smaller number is chosen.

Shapes: T tokens of this rank's microbatch, E experts, K chosen ones. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parallel_core.config.experts import MoEConfig

_EPS = np.float32(1e-20)


@dataclass(frozen=True)
class Routing:
    """What the router decided for a microbatch.

    Attributes:
        experts: int64 [T, K], the best first; an assignment that was dropped stays.
        weights: [T, K], 0 where dropped.
        kept: bool [T, K], False where an expert was full.
        capacity: tokens that an expert takes; None: all.
        scores: what the gradient of the weights needs of the scores.
    """

    experts: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    capacity: int | None
    scores: np.ndarray

    def counts(self, num_experts: int) -> np.ndarray:
        """Return the tokens of each expert, int64 [E], dropped ones left out."""
        return np.bincount(self.experts[self.kept], minlength=num_experts)


def route(logits: np.ndarray, moe: MoEConfig, bias: np.ndarray | None = None, training: bool = True) -> Routing:
    """Return the experts of every token.

    Args:
        logits: [T, E].
        moe: how to choose.
        bias: [E], added to sigmoid scores for the choice alone.
        training: whether Sinkhorn's assignment balances the choice.
    """
    k = moe.moe_router_topk
    if moe.moe_router_load_balancing_type[0] == "sinkhorn":
        experts = top_k(sinkhorn(logits) if training else logits, k)
        scores = sigmoid(logits) if k == 1 else softmax(logits)
        weights = np.take_along_axis(scores, experts, 1)
    elif moe.moe_router_score_function == "sigmoid":
        scores = sigmoid(logits)
        experts = top_k(within_groups(scores if bias is None else scores + bias, moe), k)
        weights = np.take_along_axis(scores, experts, 1)
        if k > 1:
            weights = weights / (weights.sum(1, keepdims=True) + _EPS)
    elif moe.moe_router_pre_softmax:
        scores = softmax(logits)
        experts = top_k(within_groups(scores, moe), k)
        weights = np.take_along_axis(scores, experts, 1)
    else:
        experts = top_k(within_groups(logits, moe), k)
        weights = scores = softmax(np.take_along_axis(logits, experts, 1))
    if moe.moe_router_topk_scaling_factor:
        weights = weights * np.float32(moe.moe_router_topk_scaling_factor)
    capacity = moe.capacity(len(logits))
    kept = within_capacity(experts, weights, capacity, moe.num_experts, by_weight=moe.moe_token_drop_policy == "probs")
    return Routing(experts, np.where(kept, weights, np.float32(0)), kept, capacity, scores)


def grad_logits(routing: Routing, dweights: np.ndarray, moe: MoEConfig) -> np.ndarray:
    """Return the gradient of the weights for the logits, [T, E].

    Args:
        routing: what `route` returned.
        dweights: [T, K].
        moe: as for `route`.
    """
    experts, scores = routing.experts, routing.scores
    dweights = np.where(routing.kept, dweights, np.float32(0))
    if moe.moe_router_topk_scaling_factor:
        dweights = dweights * np.float32(moe.moe_router_topk_scaling_factor)
    is_sinkhorn = moe.moe_router_load_balancing_type[0] == "sinkhorn"
    by_sigmoid = moe.moe_router_topk == 1 if is_sinkhorn else moe.moe_router_score_function == "sigmoid"
    if by_sigmoid:
        chosen = np.take_along_axis(scores, experts, 1)
        if moe.moe_router_topk > 1:
            total = chosen.sum(1, keepdims=True) + _EPS
            dweights = (dweights - (dweights * chosen).sum(1, keepdims=True) / total) / total
        return _spread(dweights * chosen * (1 - chosen), experts, moe.num_experts)
    if scores.shape[1] == moe.num_experts and (is_sinkhorn or moe.moe_router_pre_softmax):
        return softmax_grad(scores, _spread(dweights, experts, moe.num_experts))
    return _spread(softmax_grad(scores, dweights), experts, moe.num_experts)


def _spread(values: np.ndarray, experts: np.ndarray, num_experts: int) -> np.ndarray:
    out = np.zeros((len(values), num_experts), np.float32)
    np.put_along_axis(out, experts, values.astype(np.float32, copy=False), 1)
    return out


# ---- choice ---------------------------------------------------------------------------------------------------------
def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the k largest scores of each row, int64 [T, k], the largest first, ties by number."""
    left = scores.copy()
    rows = np.arange(len(scores))
    chosen = np.empty((len(scores), k), np.int64)
    for i in range(k):
        chosen[:, i] = left.argmax(1)
        left[rows, chosen[:, i]] = -np.inf
    if np.isneginf(scores).any() or k == scores.shape[1]:  # what is left out already must not be taken twice
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return order.astype(np.int64)
    return chosen


def within_groups(scores: np.ndarray, moe: MoEConfig) -> np.ndarray:
    """Return the scores with -inf outside the best groups; a group counts the sum of its best topk // group_topk."""
    groups, kept = moe.moe_router_num_groups, moe.moe_router_group_topk
    if not groups:
        return scores
    by_group = scores.reshape(len(scores), groups, -1)
    best = -np.sort(-by_group, axis=2)[:, :, : moe.moe_router_topk // kept].sum(2)
    inside = np.zeros(best.shape, bool)
    np.put_along_axis(inside, top_k(best, kept), True, 1)
    return np.where(inside[:, :, None], by_group, -np.inf).reshape(scores.shape)


def within_capacity(
    experts: np.ndarray, weights: np.ndarray, capacity: int | None, num_experts: int, *, by_weight: bool
) -> np.ndarray:
    """Return which assignments the experts take, bool [T, K]: the largest weights, or the first tokens."""
    kept = np.ones(experts.shape, bool)
    if capacity is None or capacity >= len(experts):
        return kept
    flat, weight = experts.reshape(-1), weights.reshape(-1)
    for expert in np.flatnonzero(np.bincount(flat, minlength=num_experts) > capacity):
        places = np.flatnonzero(flat == expert)
        if by_weight:
            places = places[np.argsort(-weight[places], kind="stable")]
        kept.reshape(-1)[places[capacity:]] = False
    return kept


def sinkhorn(logits: np.ndarray, tolerance: float = 1e-4) -> np.ndarray:
    """Return exp(logits) with rows and columns scaled to equal sums."""
    cost = np.exp(logits.astype(np.float32))
    rows, columns = np.ones(cost.shape[0], np.float32), np.ones(cost.shape[1], np.float32)
    eps, error, before = np.float32(1e-8), 1e9, columns
    while error > tolerance:
        rows = np.float32(1 / len(rows)) / ((columns * cost).sum(1) + eps)
        columns = np.float32(1 / len(columns)) / ((rows[:, None] * cost).sum(0) + eps)
        error = float(np.abs(before - columns).mean())
        before = columns
    return columns * cost * rows[:, None]


# ---- scores ---------------------------------------------------------------------------------------------------------
def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax of each row."""
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def softmax_grad(y: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return the gradient of a softmax whose result is y."""
    return y * (dy - (y * dy).sum(1, keepdims=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x))."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e).astype(np.float32) / (1 + e)


# ---- balancing losses -----------------------------------------------------------------------------------------------
class BalanceScores:
    """The scores that balancing losses look at, [T, E], and the plain top-k of them, whatever was routed."""

    def __init__(self, logits: np.ndarray, moe: MoEConfig) -> None:
        self._is_sigmoid = moe.moe_router_score_function == "sigmoid"
        self._raw = sigmoid(logits) if self._is_sigmoid else softmax(logits)
        self._total = self._raw.sum(1, keepdims=True) + _EPS if self._is_sigmoid else np.float32(1)
        self.values = self._raw / self._total if self._is_sigmoid else self._raw
        self.chosen = top_k(self.values, moe.moe_router_topk)

    def grad_logits(self, dvalues: np.ndarray) -> np.ndarray:
        """Return the gradient for the logits, [T, E]."""
        if not self._is_sigmoid:
            return softmax_grad(self.values, dvalues)
        draw = (dvalues - (self.values * dvalues).sum(1, keepdims=True)) / self._total
        return draw * self._raw * (1 - self._raw)


def z_loss(logits: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean over tokens of the squared log-sum-exp, and its gradient [T, E]."""
    largest = logits.max(1, keepdims=True)
    e = np.exp(logits - largest)
    total = e.sum(1, keepdims=True)
    lse = largest + np.log(total)
    return float((lse * lse).mean()), (2 / len(logits)) * lse * (e / total)
