"""Where the gradients of one parameter are summed, now or later."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint

from parallel_core.deferral import defer, is_deferring
from parallel_core.main_grad import everyone_takes_written
from parallel_core.ops.library import kind_of
from parallel_core.optimizer import flat
from parallel_core.optimizer.flat import Flat
from parallel_core.tape import WRITTEN, takes_written


class MainGrad:
    """The sum of a parameter's gradients over the microbatches of an iteration; see `main_grad.MainGrad`.

    A layer's backward pass that sums here itself returns `tape.WRITTEN` to a tape, and to MindSpore a placeholder: a
    view of the parameter's shape on one zero. So the gradient's hook still fires when all contributions of a backward
    pass are in, and nothing of the parameter's size is allocated.

    Where the gradients of weights are deferred (`autograd.deferring`), what it returns comes first and the sum later:
    the gradient is complete when nothing is pending any more.

    Args:
        storage: where it is kept.
        parameter: its `late_grad` is set to this object, and its `main_grad`, if backward passes may write here.
    """

    def __init__(self, storage: Flat, parameter: Parameter) -> None:
        self.flat = storage
        self.begun = False
        """Whether this iteration has contributed."""
        self.pending = 0
        """Contributions that are left for later."""
        self.completed: Callable[[], None] = lambda: None
        """Called when the last pending contribution is in."""
        self.apart: Flat | None = None
        """What lookups have added, where it is kept apart."""
        self.apart_begun = False
        self.apart_numel = self._multiple = self._address = self._kind = 0
        self.takes_writes = False
        self._placeholder: Tensor | None = None
        self._lent = False
        self._parameter, self._shape, self._dtype = parameter, parameter.shape, parameter.dtype
        parameter.late_grad = self
        memory = storage.memory(parameter.shape)
        if memory is not None:
            self._memory, self._on_host = memory, isinstance(memory, np.ndarray)
            self.takes_writes = self._on_host
            if self._on_host:
                self._address, self._kind = memory.ctypes.data, kind_of(memory.dtype)
            parameter.main_grad = self

    def takes(self, dtype: Any) -> bool:
        """See `main_grad.MainGrad.takes`: kernels of the host write what they compute in float32."""
        return dtype == ms.float32 or not self._on_host

    def keep_apart(self, multiple: int) -> None:
        """Sum what an embedding adds to a weight that something else has used in the same backward pass by itself.

        Args:
            multiple: of which the length of `apart` is one; the elements beyond the parameter's are zeros.
        """
        self._multiple = multiple

    def accumulate(self, write: Callable[[Any, bool], None], *, lookup: bool = False) -> Tensor | None:
        """See `main_grad.MainGrad.accumulate`."""
        if lookup and self._multiple and self.begun:
            return self._contribute(lambda: self._write_apart(write))
        return self._contribute(lambda: write(self._memory, self.begun))

    def reserve(self) -> tuple[int, int, bool]:
        """See `main_grad.MainGrad.reserve`."""
        add, self.begun = self.begun, True
        return self._address, self._kind, add

    def _write_apart(self, write: Callable[[Any, bool], None]) -> None:
        size = math.prod(self._shape)
        if self.apart is None:
            self.apart_numel = -(-size // self._multiple) * self._multiple
            # Rounded as on a first stage that has nothing else of this weight.
            self.apart = flat.zeros(self.apart_numel, str(self.flat.tensor().dtype).lower())
        write(self.apart.part(0, size).memory(self._shape), self.apart_begun)
        self.apart_begun = True

    def accumulate_later(self, compute: Callable[[], Tensor]) -> Tensor | None:
        """See `main_grad.MainGrad.accumulate_later`."""
        return self._contribute(lambda: self._add(compute()))

    def _contribute(self, add: Callable[[], None]) -> Tensor | None:
        if is_deferring():
            self.pending += 1
            defer(lambda: self._contribute_late(add))
        else:
            add()
            self.begun = True
        return self._lend()

    def _lend(self) -> Any:
        if takes_written() and everyone_takes_written(self._parameter):
            return WRITTEN
        if self._lent:
            return None  # autograd would have to add two placeholders, in a tensor of the parameter's size
        if self._placeholder is None:  # of the parameter's dtype: a cast would make it an ordinary tensor
            self._placeholder = mint.broadcast_to(mint.zeros((1,), dtype=self._dtype), self._shape)
        self._lent = True
        return self._placeholder

    def _contribute_late(self, add: Callable[[], None]) -> None:
        add()
        self.begun = True
        self.pending -= 1
        if not self.pending:
            self.completed()

    def receive(self, gradient: Tensor) -> None:
        """Take what autograd has gathered in one backward pass."""
        lent, self._lent = self._lent, False
        if lent and self._is_placeholder(gradient):
            return
        self._add(gradient)
        self.begun = True

    def _is_placeholder(self, gradient: Tensor) -> bool:
        """Return whether the placeholder comes back alone, as another object on the same memory.

        Where autograd added other contributions to it, the sum is a tensor of its own. A device is not asked for the
        address, which would wait for it: no other tensor repeats one number over the parameter's shape.
        """
        if self._placeholder is None:
            return False
        if self._on_host:
            return bool(gradient.data_ptr() == self._placeholder.data_ptr())
        return not any(gradient.stride())

    def _add(self, gradient: Tensor) -> None:
        if self.begun:
            self.flat.add_(gradient)
        else:
            self.flat.write_(gradient)
