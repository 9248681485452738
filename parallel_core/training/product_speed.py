"""How fast this rank's device multiplies matrices: what a step's speed is a share of."""

from __future__ import annotations

import time

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

_TIMES = 4


def product_speed(dtype: str) -> float:
    """Return the operations per second of a product of large matrices, the best of a few; some hundredths of a second.

    Args:
        dtype: what activations are computed in.
    """
    on_cpu = ms.get_context("device_target") == "CPU"
    size = 768 if on_cpu else 8192
    kind = ms.float32 if on_cpu else getattr(ms, dtype)  # a CPU computes products of 16 bits in other ways
    matrix = Tensor(np.ones((size, size), np.float32)).astype(kind)
    best = float("inf")
    for _ in range(_TIMES):
        begun = time.perf_counter()
        mint.matmul(matrix, matrix).asnumpy()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best
