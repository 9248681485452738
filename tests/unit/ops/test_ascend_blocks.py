"""Blocks of attention over Ascend's operators, which are here what their documentation says, in NumPy."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.ops import ascend, reference

S, T, B, N, G, D = 6, 8, 2, 4, 2, 16
HALF = np.float16


class Documented:
    """The arguments that both operators have, checked as they are documented, and the scores."""

    def __init__(
        self, head_num: int, keep_prob: float = 1.0, scale_value: float = 1.0, pre_tokens: int = 2**31 - 1,
        next_tokens: int = 2**31 - 1, inner_precise: int = 0, input_layout: str = "BSH", sparse_mode: int = 0,
    ) -> None:  # fmt: skip
        assert (head_num, keep_prob, input_layout) == (N, 1.0, "SBH") and inner_precise in (0, 1, 2)
        assert pre_tokens == next_tokens == 2**31 - 1  # in the mode without a mask too, they hide nothing
        self.scale, self.mode = scale_value, sparse_mode

    def heads(self, x: Tensor, heads: int) -> np.ndarray:
        """Return [S, B, H] as float32 [B, heads, S, D], repeated to the query heads."""
        assert x.dtype == ms.float16 and x.ndim == 3 and x.shape[2] == heads * D
        array = x.asnumpy().astype(np.float32).reshape(x.shape[0], B, heads, D).transpose(1, 2, 0, 3)
        return np.repeat(array, N // heads, 1)

    def scores(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[np.ndarray, Any]:
        assert self.mode == (0 if mask is None else 1)
        scores = self.scale * self.heads(query, N) @ self.heads(key, G).swapaxes(-1, -2)
        if mask is None:
            return scores, False
        assert mask.dtype == ms.bool_ and mask.shape in ((S, T), (B, 1, S, T))
        return np.where(mask.asnumpy(), -40000.0, scores), mask.asnumpy()  # a finite number: rows may be all hidden


class Score(Documented):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None) -> Any:
        scores, _ = self.scores(query, key, attn_mask)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = (weights / total @ self.heads(value, G)).transpose(2, 0, 1, 3).reshape(S, B, N * D)
        eight = [Tensor(np.repeat(x, 8, -1).astype(np.float32)) for x in (top, total)]
        return *eight, Tensor(np.zeros((), HALF)), Tensor(out.astype(HALF))


class ScoreGrad(Documented):
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, dy: Tensor, *, atten_mask: Tensor | None,
        softmax_max: Tensor, softmax_sum: Tensor, attention_in: Tensor,
    ) -> Any:  # fmt: skip
        scores, hidden = self.scores(query, key, atten_mask)
        assert softmax_max.shape == softmax_sum.shape == (B, N, S, 8) and softmax_max.dtype == ms.float32
        weights = np.exp(np.where(hidden, -np.inf, scores) - softmax_max.asnumpy()[..., :1])
        weights = weights / softmax_sum.asnumpy()[..., :1]
        dout, out = self.heads(dy, N), self.heads(attention_in, N)
        dscores = weights * (dout @ self.heads(value, G).swapaxes(-1, -2) - (dout * out).sum(-1, keepdims=True))
        grads = (
            dscores @ self.heads(key, G) * self.scale,
            self.shared(dscores.swapaxes(-1, -2) @ self.heads(query, N)) * self.scale,
            self.shared(weights.swapaxes(-1, -2) @ dout),
        )
        flat = (x.transpose(2, 0, 1, 3).reshape(x.shape[2], B, -1) for x in grads)
        return *(Tensor(x.astype(HALF)) for x in flat), Tensor(np.zeros((), HALF))

    def shared(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(B, G, N // G, *x.shape[2:]).sum(2)


STARTS = np.array([[0, 0, 3, 3, 15, 15], [0, 5, 5, 5, 9, 9]], np.int32)


@pytest.mark.parametrize(("q_first", "k_first"), [(16, 0), (8, 8), (10, 8), (8, 10), (16, 8)])
@pytest.mark.parametrize("start", [None, STARTS], ids=["causal", "documents"])
def test_blocks_are_what_the_reference_computes(q_first: int, k_first: int, start: np.ndarray | None) -> None:
    """Blocks that are seen whole, cut by the diagonal, seen by some queries, and by documents."""
    rng = np.random.default_rng(0)
    shapes = (S, B, N, D), (T, B, G, D), (T, B, G, D), (S, B, N * D)
    query, key, value, dout = (Tensor(rng.standard_normal(shape).astype(HALF)) for shape in shapes)
    inputs = query, key, value, None if start is None else Tensor(start)
    options = {"q_first": q_first, "k_first": k_first, "scale": 0.25}
    with mock.patch.multiple(ascend, FlashAttentionScore=Score, FlashAttentionScoreGrad=ScoreGrad):
        context, log_sum_exp = ascend.attention_block(*inputs, **options)
        want, want_lse = reference.attention_block(*inputs, **options)
        np.testing.assert_allclose(context.asnumpy(), want.asnumpy(), atol=4e-3)
        np.testing.assert_allclose(log_sum_exp.asnumpy(), want_lse.asnumpy(), atol=1e-2)
        # Over all blocks the softmax is wider than this block's: its logarithm is larger, and every query sees a key.
        whole = Tensor(np.where(np.isfinite(want_lse.asnumpy()), want_lse.asnumpy(), 0.0).astype(np.float32) + 0.7)
        grads = ascend.attention_block_grad(*inputs, want, dout, whole, **options)
        for got, wanted in zip(grads, reference.attention_block_grad(*inputs, want, dout, whole, **options)):
            assert got.shape == wanted.shape and got.dtype == wanted.dtype == ms.float16
            np.testing.assert_allclose(got.asnumpy(), wanted.asnumpy(), atol=2e-2)


def test_what_the_operator_does_not_take_the_reference_computes() -> None:
    rng = np.random.default_rng(0)
    operator = mock.Mock(side_effect=AssertionError("not for the operator"))
    options = {"q_first": 8, "k_first": 0, "scale": 0.25}
    half = [Tensor(rng.standard_normal(shape).astype(HALF)) for shape in ((S, B, N, D), (T, B, G, D), (T, B, G, D))]
    odd = [x[..., :12] for x in half]
    with mock.patch.object(ascend, "FlashAttentionScore", operator):
        for inputs, more in (
            ([x.astype(ms.float32) for x in half], {}),
            (odd, {}),
            (half, {"dropout_rate": 0.5, "dropout_seed": (1, 2)}),
            ([*half[:2], half[2][..., :8]], {}),
        ):
            context, _ = ascend.attention_block(*inputs, None, **options, **more)
            assert context.shape == (S, B, N * inputs[2].shape[-1])
        with pytest.raises(AssertionError, match="not for the operator"):
            ascend.attention_block(*half, None, **options)
