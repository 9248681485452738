"""Experts' products over Ascend's operators, which are here what their documentation says, in NumPy."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.ops import ascend, reference_experts
from parallel_core.ops.registry import KERNELS

E, I, O = 4, 6, 5


def documented_matmul(
    x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, split_item: int, group_type: int
) -> list[Tensor]:
    """One tensor in and out, groups of rows, by the end of each; x and weight of one type."""
    assert (len(x), len(weight), split_item, group_type) == (1, 1, 3, 0)
    (rows,), (matrices,) = x, weight
    assert rows.dtype == matrices.dtype and rows.ndim == 2 and matrices.ndim == 3
    ends = documented_ends(group_list, len(matrices), rows.shape[0])
    assert matrices.shape[1] == rows.shape[1]
    parts = [rows.asnumpy()[a:b] @ matrices.asnumpy()[i] for i, (a, b) in enumerate(zip([0, *ends], ends))]
    return [Tensor(np.concatenate(parts).astype(rows.asnumpy().dtype))]


def documented_add(x: Tensor, weight: Tensor, group_list: Tensor, out: Tensor) -> Tensor:
    """16 bits in, float32 out, to which the product over each group's rows is added."""
    assert x.dtype == weight.dtype and x.dtype in (ms.float16, ms.bfloat16) and out.dtype == ms.float32
    ends = documented_ends(group_list, out.shape[0], x.shape[0])
    a, b = (t.asnumpy().astype(np.float32) for t in (x, weight))
    return Tensor(out.asnumpy() + np.stack([a[i:j].T @ b[i:j] for i, j in zip([0, *ends], ends)]))


def documented_ends(group_list: Tensor, groups: int, rows: int) -> list[int]:
    ends = group_list.asnumpy()
    assert group_list.dtype == ms.int64 and ends.shape == (groups,) and ends[-1] == rows
    assert (np.diff(ends, prepend=0) > 0).all()  # whether groups may be empty is not documented
    return ends.tolist()


@pytest.fixture(autouse=True)
def operators():
    with (
        mock.patch.object(ascend, "grouped_matmul_v4", documented_matmul),
        mock.patch.object(ascend, "grouped_matmul_add_", documented_add),
    ):
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
