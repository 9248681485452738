"""Experts' products over Ascend's operators, which are here what their documentation says, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.ops import ascend_products as ascend
from parallel_core.ops import reference, reference_experts
from parallel_core.ops.registry import KERNELS
from tests.helpers.ascend_double import on_ascend_double

E, I, O = 4, 6, 5


@pytest.fixture(autouse=True)
def _double():
    with on_ascend_double():
        yield


@pytest.mark.parametrize("counts", [[3, 2, 4, 1], [0, 5, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_products_are_the_references(counts: list[int], dtype: Any) -> None:
    """Also of experts without rows; without any row, and weights' gradients of float32, the reference computes."""
    rng, number = np.random.default_rng(0), np.array(counts, np.int64)
    x, dy, weight = (
        Tensor(rng.standard_normal(shape).astype(dtype)) for shape in ((number.sum(), I), (number.sum(), O), (E, O, I))
    )
    for name, inputs in (
        ("grouped_linear", (x, weight)), ("grouped_linear_grad_input", (dy, weight)),
        ("grouped_linear_grad_weight", (dy, x)),
    ):  # fmt: skip
        got = getattr(ascend, name)(*inputs, number)
        want = getattr(reference_experts, name)(*inputs, number)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=0, atol=2e-2 if dtype == np.float16 else 1e-5)
        assert KERNELS[name].implementations["Ascend"] is getattr(ascend, name)


@pytest.mark.parametrize("counts", [[3, 2, 4, 1], [0, 5, 0, 2]], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_gradients_are_summed_where_they_belong(counts: list[int], add: bool) -> None:
    """On the device's memory, as on the host's; products of a linear layer are those of one group."""
    rng, number = np.random.default_rng(0), np.array(counts, np.int64)
    x, dy = (Tensor(rng.standard_normal((number.sum(), width)).astype(np.float16)) for width in (I, O))
    before = rng.standard_normal((E, O, I)).astype(np.float32)
    for name, kernel, want, start, more in (
        ("grouped_linear_grad_weight_", ascend, reference_experts, before, (number,)),
        ("linear_grad_weight_", ascend, reference, before[0], ()),
    ):
        memory, array = start.copy(), start.copy()
        getattr(kernel, name)(Tensor.from_numpy(memory), dy, x, *more, add)
        getattr(want, name)(array, dy, x, *more, add)
        np.testing.assert_allclose(memory, array, atol=2e-2)
        assert np.abs(memory - start).max() > 0.1


def test_rows_are_gathered_and_summed(caplog) -> None:
    """Whole permutations by one operator; with dropped assignments or empty rows by the reference, which is told."""
    rng = np.random.default_rng(0)
    order = rng.permutation(12).astype(np.int32)
    for index in (order, np.where(order == 3, -1, order).astype(np.int32)):
        x = Tensor(rng.standard_normal((12, I)).astype(np.float16))
        for name, rows in (("gather_rows", index), ("sum_rows", index.reshape(4, 3))):
            assert not caplog.records if index is order else True
            got, want = getattr(ascend, name)(x, rows), getattr(reference_experts, name)(x, rows)
            assert got.dtype == want.dtype
            np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), atol=5e-3)
    assert "some rows are empty or dropped" in caplog.text
