"""Flat 1-D storage that parameters live in and gradients accumulate in: NumPy memory on CPU, a tensor on Ascend.

MindSpore's in-place tensor operations silently do nothing on CPU views, so there the storage is a NumPy array that
parameters alias. `ops.ascend_flat.AscendFlat` has the same methods on device tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint

from parallel_core import ops
from parallel_core.ops.ascend_flat import AscendFlat


class Flat(Protocol):
    """A 1-D buffer, or a part of one that shares its memory."""

    def part(self, start: int, end: int) -> Flat:
        """Return elements [start, end), sharing memory."""

    def tensor(self) -> Tensor:
        """Return a 1-D tensor that shares memory, for collectives."""

    def bind(self, parameter: Parameter) -> None:
        """Move the parameter's value here and make it live here."""

    def write_(self, gradient: Tensor) -> None:
        """Overwrite with a tensor of as many elements."""

    def add_(self, gradient: Tensor) -> None:
        """Add a tensor of as many elements."""

    def copy_(self, other: Flat) -> None:
        """Overwrite with another buffer's elements, cast to this one's dtype."""

    def scale_(self, factor: float) -> None:
        """Multiply every element."""

    def sum_of_squares(self) -> Any:
        """Return the sum of the squared elements, a float or a tensor of one; not finite if an element is not."""

    def load(self, values: np.ndarray) -> None:
        """Overwrite with NumPy values, cast to this buffer's dtype."""

    def numpy(self) -> np.ndarray:
        """Return the elements; on CPU sharing memory."""

    def memory(self, shape: Sequence[int]) -> Any:
        """Return this memory in a shape, the host's array or a device's tensor; None: kernels cannot add to it."""

    def adam_(self, gradient: Flat, exp_avg: Flat, exp_avg_sq: Flat, **options: Any) -> None:
        """Do one AdamW update of these master weights; `rounded`, if not None, gets them too; see `ops.adam_`."""

    def sgd_(self, gradient: Flat, momentum_buffer: Flat, **options: Any) -> None:
        """Do one update of these master weights by SGD with momentum; see `CpuFlat.sgd_`."""


class CpuFlat:
    """A view of a C-contiguous 1-D NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @classmethod
    def zeros(cls, numel: int, dtype: str) -> CpuFlat:
        """Return a buffer of zeros; dtype float32, float16 or bfloat16."""
        kind = Tensor(np.zeros(1, np.float32)).astype(ms.bfloat16).asnumpy().dtype if dtype == "bfloat16" else dtype
        return cls(np.zeros(numel, kind))

    def part(self, start: int, end: int) -> CpuFlat:
        """Return elements [start, end), sharing memory."""
        return CpuFlat(self._array[start:end])

    def tensor(self) -> Tensor:
        """Return a tensor that shares memory."""
        return Tensor.from_numpy(self._array)

    def bind(self, parameter: Parameter) -> None:
        """Move the parameter's value here; from now on either sees writes to the other."""
        self._array[:] = parameter.asnumpy().reshape(-1)
        parameter.set_data(Tensor.from_numpy(self._array.reshape(parameter.shape)))

    def write_(self, gradient: Tensor) -> None:
        """Overwrite with a gradient."""
        ops.write_(self._array, gradient)

    def add_(self, gradient: Tensor) -> None:
        """Add a gradient."""
        ops.add_(self._array, gradient)

    def copy_(self, other: Flat) -> None:
        """Overwrite, casting."""
        ops.copy_(self._array, other.numpy())

    def scale_(self, factor: float) -> None:
        """Multiply."""
        if factor != 1.0:
            ops.scale_(self._array, factor)

    def sum_of_squares(self) -> float:
        """Return the sum of squares, accumulated in float64."""
        return ops.sum_of_squares(self._array)

    def load(self, values: np.ndarray) -> None:
        """Overwrite with NumPy values."""
        self._array[:] = values

    def numpy(self) -> np.ndarray:
        """Return the array itself."""
        return self._array

    def memory(self, shape: Sequence[int]) -> np.ndarray:
        """Return the array itself."""
        return self._array.reshape(shape)

    def adam_(
        self, gradient: Flat, exp_avg: Flat, exp_avg_sq: Flat, *, rounded: Flat | None = None, **options: Any
    ) -> None:
        """Do one AdamW update."""
        copy = None if rounded is None else rounded.numpy()
        ops.adam_(self._array, gradient.numpy(), exp_avg.numpy(), exp_avg_sq.numpy(), rounded=copy, **options)

    def sgd_(
        self,
        gradient: Flat,
        momentum_buffer: Flat,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        grad_scale: float = 1.0,
        rounded: Flat | None = None,
    ) -> None:
        """Do p -= lr * b, with b = momentum * b + grad_scale * g + weight_decay * p."""
        buffer = momentum_buffer.numpy()
        buffer *= np.float32(momentum)
        buffer += gradient.numpy().astype(np.float32) * np.float32(grad_scale)
        buffer += self._array * np.float32(weight_decay)
        self._array -= np.float32(lr) * buffer
        if rounded is not None:
            rounded.copy_(cast(Flat, self))


def on_host(numbers: Sequence[Any]) -> list[float]:
    """Return floats and tensors of one number as floats; what is on a device comes from there in one copy."""
    if not any(isinstance(number, Tensor) for number in numbers):
        return [float(number) for number in numbers]
    joined = mint.cat([number.astype(ms.float32).reshape(1) for number in numbers])
    values: list[float] = joined.asnumpy().tolist()
    return values


def zeros(numel: int, dtype: str) -> Flat:
    """Return a buffer of zeros on the present device."""
    kind = AscendFlat if ms.get_context("device_target") == "Ascend" else CpuFlat
    return cast(Flat, kind.zeros(numel, dtype))
