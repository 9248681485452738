"""Gradients that several ranks hold parts of are summed in one all-reduce, on the device."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core.comm.interface import SoloGroup
from parallel_core.optimizer import finalize, flat

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)


class Tripled(SoloGroup):
    """Three ranks with the same numbers."""

    sizes: list[int]
    seen: list[int]

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        assert x.dtype == ms.float32 and op == "sum"
        self.sizes.append(x.size)
        self.seen.append(x.data_ptr())
        return x.copy_(x * 3.0)


@pytest.mark.parametrize("kernels", ["auto", "local"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_gets_its_part_of_the_sum(dtype, kernels):
    ops.use_kernels(kernels)
    buffer = flat.zeros(20, dtype)
    buffer.load(np.arange(20, dtype=np.float32))
    group = Tripled()
    group.sizes, group.seen = [], []
    finalize._sum_together([buffer.part(2, 5), buffer.part(9, 16)], group)
    want = np.arange(20, dtype=np.float32)
    want[2:5] *= 3
    want[9:16] *= 3
    assert np.array_equal(buffer.numpy().astype(np.float32), want) and group.sizes == [10]
    finalize._sum_together([], group)
    assert group.sizes == [10]
    ops.use_kernels("local")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_alone_is_summed_where_it_is(dtype):
    """A tied embedding is as large as the vocabulary; with weights' gradients in float32 it is not copied."""
    buffer = flat.zeros(12, dtype)
    buffer.load(np.arange(12, dtype=np.float32))
    group = Tripled()
    group.sizes, group.seen = [], []
    finalize._sum_together([buffer.part(2, 9)], group)
    want = np.arange(12, dtype=np.float32)
    want[2:9] *= 3
    assert np.array_equal(buffer.numpy().astype(np.float32), want) and group.sizes == [7]
    in_place = group.seen == [buffer.part(2, 9).tensor().data_ptr()]
    assert in_place == (dtype == "float32")
