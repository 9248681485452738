"""Where no backward pass follows, a custom function is its forward pass and keeps nothing."""

from __future__ import annotations

import threading

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.autograd import Function, forward_only


class _Square(Function):
    seen: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.power = 2
        _Square.seen.append(type(ctx).__name__)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * ctx.power * x


def test_forward_only_calls_the_forward_pass_in_its_own_thread_alone():
    x = Tensor(np.array([3.0], np.float32))
    _Square.seen.clear()
    with forward_only():
        assert _Square.apply(x).asnumpy() == [9.0]
        other = threading.Thread(target=lambda: _Square.apply(x))
        other.start()
        other.join()
        with pytest.raises(ZeroDivisionError), forward_only():
            1 / 0  # noqa: B018
        _Square.apply(x)
    assert _Square.seen[0] == _Square.seen[2] == "_Forgetful" != _Square.seen[1]
    assert ms.grad(_Square.apply)(x).asnumpy() == [6.0]
