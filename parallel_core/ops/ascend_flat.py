"""Flat 1-D storage on an Ascend device, with the methods of `optimizer.flat.Flat`; a step copies none to the host."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint
from mindspore.ops.auto_generate import AdamW


@functools.lru_cache(1)  # the same for every parameter
def _updates_before(step: int) -> Tensor:
    """Return the number that the fused update counts from 0: MindSpore's optimizer starts at -1 and adds 1 first."""
    return Tensor([step - 1], ms.float32)


class AscendFlat:
    """A view of a 1-D device tensor. Not verified: written against the MindSpore 2.10 documentation, never run."""

    def __init__(self, data: Tensor) -> None:
        self._data = data

    @classmethod
    def zeros(cls, numel: int, dtype: str) -> AscendFlat:
        """Return a buffer of zeros."""
        return cls(mint.zeros((numel,), dtype=getattr(ms, dtype)))

    def part(self, start: int, end: int) -> AscendFlat:
        """Return elements [start, end)."""
        return AscendFlat(self._data.narrow(0, start, end - start))

    def tensor(self) -> Tensor:
        """Return the view."""
        return self._data

    def bind(self, parameter: Parameter) -> None:
        """Move the parameter's value here."""
        self.write_(parameter)
        parameter.set_data(self._data.view(parameter.shape))

    def write_(self, gradient: Tensor) -> None:
        """Overwrite with a gradient."""
        self._data.copy_(gradient.reshape(-1).astype(self._data.dtype))

    def add_(self, gradient: Tensor) -> None:
        """Add a gradient."""
        self._data.add_(gradient.reshape(-1).astype(self._data.dtype))

    def copy_(self, other: Any) -> None:
        """Overwrite, casting."""
        self._data.copy_(other.tensor().astype(self._data.dtype))

    def scale_(self, factor: float) -> None:
        """Multiply."""
        if factor != 1.0:
            self._data.mul_(factor)

    def sum_of_squares(self) -> Tensor:
        """Return the sum of squares, a tensor of one number, which nobody waits for here."""
        wide = self._data.astype(ms.float32)
        return (wide * wide).sum()

    def load(self, values: np.ndarray) -> None:
        """Overwrite with NumPy values."""
        self._data.copy_(Tensor(values).astype(self._data.dtype))

    def numpy(self) -> np.ndarray:
        """Return a copy of the elements."""
        return self._data.asnumpy()

    def memory(self, shape: Sequence[int]) -> Tensor | None:
        """Return a view that operators add products of 16 bits to, or None where it is not float32."""
        return self._data.view(tuple(shape)) if self._data.dtype == ms.float32 else None

    def adam_(
        self,
        gradient: Any,
        exp_avg: Any,
        exp_avg_sq: Any,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        grad_scale: float = 1.0,
        rounded: Any = None,
    ) -> None:
        """Do one AdamW update by the fused operator; see `ops.adam_`."""
        gradient, v = gradient.tensor().astype(ms.float32) * grad_scale, exp_avg_sq.tensor()
        constants = lr, *betas, weight_decay, eps, False, False
        AdamW()(self._data, exp_avg.tensor(), v, v, gradient, _updates_before(step), *constants)
        if rounded is not None:
            rounded.copy_(self)

    def sgd_(
        self,
        gradient: Any,
        momentum_buffer: Any,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        grad_scale: float = 1.0,
        rounded: Any = None,
    ) -> None:
        """Do one update by SGD with momentum."""
        buffer = momentum_buffer.tensor()
        buffer.mul_(momentum).add_(gradient.tensor().astype(ms.float32) * grad_scale + self._data * weight_decay)
        self._data.sub_(buffer * lr)
        if rounded is not None:
            rounded.copy_(self)
