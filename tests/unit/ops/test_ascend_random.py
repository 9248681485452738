"""Dropout on Ascend: equal seeds give equal masks, whatever ran before, in every floating type."""

from __future__ import annotations

from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from parallel_core.ops import ascend_random, reference
from tests.helpers import ascend_double

SEEDS = (3, 5), (5, 3), (2**31 - 1, 2**31 - 1)


@pytest.fixture(autouse=True)
def _double():
    with ascend_double.on_ascend_double():
        yield


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_mask_follows_the_seed_alone(dtype):
    x = Tensor(np.random.default_rng(0).standard_normal((8, 6, 50)).astype(dtype))
    masks = {}
    for seed in (*SEEDS, *SEEDS[:1]):
        y = reference.dropout(x, 0.25, seed).asnumpy()
        kept = y != 0
        np.testing.assert_allclose(y[kept], x.asnumpy()[kept] / 0.75, rtol=1e-3 if dtype == np.float16 else 1e-6)
        assert 0.2 < 1 - kept.mean() < 0.3
        assert np.array_equal(masks.setdefault(seed, kept), kept)
    assert len({kept.tobytes() for kept in masks.values()}) == len(SEEDS)
    assert reference.dropout(x, 0.0, SEEDS[0]) is x


def test_the_backward_pass_draws_the_same_mask_and_keeps_nothing():
    x = Tensor(np.random.default_rng(1).standard_normal((4, 2, 32)).astype(np.float32))
    bias, residual = Tensor(np.ones(32, np.float32)), Tensor(np.zeros((4, 2, 32), np.float32))

    def loss(x: Tensor) -> Tensor:
        return (reference.bias_dropout_add(x, bias, residual, 0.5, SEEDS[0]) ** 2).sum()

    y = reference.bias_dropout_add(x, bias, residual, 0.5, SEEDS[0]).asnumpy()
    reference.dropout(x, 0.5, SEEDS[1])  # another draw in between
    np.testing.assert_allclose(ms.grad(loss)(x).asnumpy(), 2 * y * 2, rtol=1e-5)


def test_attention_of_the_reference_drops_by_seed_too():
    query, key, value = (Tensor(np.random.default_rng(i).standard_normal((6, 2, 2, 4)).astype(np.float32))
                         for i in range(3))  # fmt: skip
    options = {"scale": 0.5, "dropout_rate": 0.5}
    first, again, other = (
        reference.causal_attention(query, key, value, **options, dropout_seed=seed).asnumpy()
        for seed in (SEEDS[0], SEEDS[0], SEEDS[1])
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    block = {**options, "q_first": 0, "k_first": 0}
    first, again = (
        reference.attention_block(query, key, value, None, **block, dropout_seed=SEEDS[0])[0].asnumpy() for _ in "12"
    )
    assert np.array_equal(first, again)


def test_the_mask_of_flash_attention_has_a_bit_for_every_weight():
    first, again, other = (ascend_random.drop_bits(480, 0.25, seed) for seed in (SEEDS[0], SEEDS[0], SEEDS[1]))
    assert first.shape == (60,) and first.dtype == ms.uint8
    assert np.array_equal(first.asnumpy(), again.asnumpy()) and not np.array_equal(first.asnumpy(), other.asnumpy())
    assert 0.15 < 1 - np.unpackbits(first.asnumpy()).mean() < 0.35


def test_bfloat16_is_taken_by_the_operators():
    """CPU has few operators of bfloat16: the type that each one is handed is looked at, not what it computes."""
    x = mock.Mock(spec=["shape", "dtype", "__mul__"], shape=(2, 3), dtype=ms.bfloat16)
    x.__mul__ = mock.Mock(side_effect=lambda other: other)
    with mock.patch.object(ascend_random.mint, "rand", ascend_double.rand):
        y = ascend_random._masked(x, 0.5, SEEDS[0])
    assert y.dtype == ms.bfloat16 and isinstance(y, Tensor) and ops.cast(y, ms.float32).asnumpy().max() == 2.0
