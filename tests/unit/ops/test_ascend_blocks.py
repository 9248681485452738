"""Blocks of attention over Ascend's operators, which are here what their documentation says."""

from __future__ import annotations

from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.ops import ascend, reference
from tests.helpers.ascend_double import on_ascend_double

S, T, B, N, G, D = 6, 8, 2, 4, 2, 16
HALF = np.float16


@pytest.fixture(autouse=True)
def _double():
    with on_ascend_double():
        yield


STARTS = np.array([[0, 0, 3, 3, 15, 15], [0, 5, 5, 5, 9, 9]], np.int32)


@pytest.mark.parametrize(("q_first", "k_first"), [(16, 0), (8, 8), (10, 8), (8, 10), (16, 8), (2, 0)])
@pytest.mark.parametrize("start", [None, STARTS], ids=["causal", "documents"])
def test_blocks_are_what_the_reference_computes(q_first: int, k_first: int, start: np.ndarray | None) -> None:
    """Blocks that are seen whole, cut by the diagonal, seen by some queries, and by documents."""
    rng = np.random.default_rng(0)
    shapes = (S, B, N, D), (T, B, G, D), (T, B, G, D), (S, B, N * D)
    query, key, value, dout = (Tensor(rng.standard_normal(shape).astype(HALF)) for shape in shapes)
    inputs = query, key, value, None if start is None else Tensor(start)
    options = {"q_first": q_first, "k_first": k_first, "scale": 0.25}
    with mock.patch.object(reference, "attention_mask", side_effect=AssertionError("a whole mask")):
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
            ([half[0], *(x[:6] for x in half[1:])], {"dropout_rate": 0.5, "dropout_seed": (1, 2)}),
            ([*half[:2], half[2][..., :8]], {}),
        ):
            context, _ = ascend.attention_block(*inputs, None, **options, **more)
            assert context.shape == (S, B, N * inputs[2].shape[-1])
        with pytest.raises(AssertionError, match="not for the operator"):
            ascend.attention_block(*half, None, **options)


def test_weights_of_blocks_are_dropped_alike_in_forward_and_backward() -> None:
    """The context is linear in the values: <gradient for the values, values> is <context, its gradient>."""
    rng = np.random.default_rng(0)
    shapes = (S, B, N, D), (T, B, G, D), (T, B, G, D), (S, B, N * D)
    query, key, value, dout = (Tensor(rng.standard_normal(shape).astype(HALF)) for shape in shapes)
    options = {"q_first": 16, "k_first": 8, "scale": 0.25, "dropout_rate": 0.5, "dropout_seed": (3, 4)}
    context, lse = ascend.attention_block(query, key, value, None, **options)
    assert np.array_equal(context.asnumpy(), ascend.attention_block(query, key, value, None, **options)[0].asnumpy())
    for other in ({"k_first": 0}, {"dropout_seed": (4, 3)}, {"heads": (4, 8)}):
        changed = ascend.attention_block(query, key, value, None, **{**options, **other})[0]
        assert not np.array_equal(context.asnumpy(), changed.asnumpy())
    _, _, dvalue = ascend.attention_block_grad(query, key, value, None, context, dout, lse, **options)
    products = ((a.astype(ms.float32) * b.astype(ms.float32)).sum() for a, b in ((dvalue, value), (context, dout)))
    through, straight = map(float, products)
    assert through == pytest.approx(straight, rel=0.02, abs=0.1)


@pytest.mark.parametrize(("q_first", "k_first", "length", "mode"), [(8, 0, 8, 0), (8, 8, 8, 3), (8, 0, 16, 3)])
def test_blocks_of_a_cut_sequence_need_no_mask_of_their_size(q_first, k_first, length, mode) -> None:
    """Of a ring: seen whole, or cut by the diagonal; of gathered keys: all up to the queries' own."""
    masks = [ascend._block_mask((8, B), length, None, q_first, k_first) for _ in range(2)]
    assert all(mask.mode == mode and mask.sees is None for mask in masks)
    assert masks[0].hidden is masks[1].hidden and (masks[0].hidden is None) == (mode == 0)


def test_blocks_are_joined_by_the_operator() -> None:
    """Also where queries have seen no key in one block, or in both."""
    rng = np.random.default_rng(1)
    out, other = (rng.standard_normal((S, B, N * D)).astype(np.float32) for _ in range(2))
    lse, other_lse = (3 * rng.standard_normal((B, N, S)).astype(np.float32) for _ in range(2))
    lse[:, :, :2], other_lse[:, :, 1:3] = -np.inf, -np.inf
    out[:2], other[1:3] = 0.0, 0.0
    inputs = [Tensor(x) for x in (out, lse, other.astype(HALF), other_lse)]
    got, want = ascend.join_blocks(*inputs), reference.join_blocks(*inputs)
    for mine, theirs in zip(got, want):
        np.testing.assert_allclose(mine.asnumpy(), theirs.asnumpy(), atol=2e-6)
    assert np.isneginf(got[1].asnumpy()[:, :, 1]).all() and got[0].dtype == ms.float32
