"""Gradients that backward passes sum in place, beside those that autograd hands over."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.autograd import backward
from parallel_core.comm.interface import SoloGroup
from parallel_core.main_grad import on_gradient
from parallel_core.optimizer.grad_buffer import ParamAndGradBuffer
from parallel_core.tensor_parallel.embedding import embedding_lookup
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.parameter import constant

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

ROWS, WIDTH = 5, 4


@pytest.fixture(autouse=True, params=["auto", "local"])
def kernels(request):
    ops.use_kernels(request.param)
    yield
    ops.use_kernels("local")


class Tied(nn.Cell):
    """A table that is looked up and multiplied with, and with `and_plainly` used by an ordinary operator too."""

    def __init__(self, dtype: str, and_plainly: bool) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(
            WIDTH, ROWS, tp_group=SoloGroup(), init_method=constant(0.5), bias=False, params_dtype=dtype
        )
        self.and_plainly = and_plainly

    def construct(self, x: Tensor, ids: Tensor) -> Tensor:
        rows = ops.cast(embedding_lookup(ids, self.linear.weight), ms.float32)
        y, _ = self.linear(x + rows)
        total = (y * y).sum()
        return total + (ops.cast(self.linear.weight, ms.float32) * 3.0).sum() if self.and_plainly else total


def expected(x: np.ndarray, ids: np.ndarray, and_plainly: bool) -> np.ndarray:
    w = np.full((ROWS, WIDTH), 0.5)
    h = x + w[ids]
    dy = 2 * h @ w.T
    gradient = dy.T @ h
    np.add.at(gradient, ids, dy @ w)
    return gradient + 3.0 * and_plainly


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("and_plainly", [False, True])
def test_a_tied_weight_collects_every_contribution(dtype, and_plainly):
    """Over two microbatches: the first overwrites what an earlier iteration left, hooks fire once for each."""
    model = Tied(dtype, and_plainly)
    model.set_grad(True)
    parameters = list(model.trainable_params())
    group, fired = SoloGroup(), []
    buffer = ParamAndGradBuffer(
        parameters, ["w"], dtype, "float32", group, bucket_size=None, sharded=False, alone=(), average_after=False,
        gradient_scale=1.0,
    )  # fmt: skip
    on_gradient(parameters[0], lambda gradient: (fired.append(1), buffer.accumulate(0, gradient)))
    rng = np.random.default_rng(0)
    for _ in range(2):
        buffer.start_iteration()
        want, fired[:] = 0.0, []
        for _ in range(2):
            x, ids = rng.standard_normal((6, WIDTH)).astype(np.float32), rng.integers(0, ROWS, 6).astype(np.int32)
            inputs = Tensor(x), Tensor(ids)
            model(*inputs)
            backward(model, inputs, parameters, Tensor(np.float32(1.0)))
            want = want + expected(x, ids, and_plainly)
        assert len(fired) == 2
        got = buffer.main_grad(0).numpy().reshape(ROWS, WIDTH)
        tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())
