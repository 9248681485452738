"""What dropout draws on Ascend, where the seeds of `ops.Dropout` have no effect: the same mask for the same seed."""

from __future__ import annotations

import functools
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint
from mindspore.ops.auto_generate import DropoutGenMaskExt

from parallel_core.autograd import Function

Seed = tuple[int, int]
"""Two non-negative numbers of 31 bits."""


@functools.cache
def _generator() -> ms.Generator:
    return ms.Generator()


def _key(seed: Seed) -> int:
    return seed[0] << 31 | seed[1]


def seeded_dropout(x: Tensor, rate: float, seed: Seed) -> Tensor:
    """Return `x` with a share `rate` of its elements zeroed and the rest divided by 1 - rate, in any floating type.

    Nothing is kept for the backward pass, which draws the mask again. Not verified: never run on an NPU.
    """
    return _SeededDropout.apply(x, rate, seed)


class _SeededDropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: Seed) -> Tensor:
        ctx.rate, ctx.seed = rate, seed
        return _masked(x, rate, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _masked(dy, ctx.rate, ctx.seed), None, None


def _masked(x: Tensor, rate: float, seed: Seed) -> Tensor:
    # float32 whatever x is: of bfloat16's 256 steps the share that is dropped would be off by up to 0.4 percent points.
    draws = mint.rand(x.shape, generator=_generator().manual_seed(_key(seed)), dtype=ms.float32)
    return x * (draws >= rate).astype(x.dtype) * (1.0 / (1.0 - rate))


def drop_bits(count: int, rate: float, seed: Seed) -> Tensor:
    """Return the mask of `count` weights that `flash_attention_score` takes, uint8 [count / 8], a share `rate` of 0.

    Which bit is which weight does not matter: forward and backward get the same tensor. Not verified: never run.

    Args:
        count: of the weights, a multiple of 8.
        rate: share of the weights that are dropped.
        seed: equal seeds give equal masks.
    """
    # The operator counts its own tensor of the offset up, so every call gets another one.
    place = Tensor(_key(seed), ms.int64), Tensor(0, ms.int64)
    bits = DropoutGenMaskExt()((count,), rate, *place, ms.float32)  # 128 bits at a time
    return bits[: count // 8]
