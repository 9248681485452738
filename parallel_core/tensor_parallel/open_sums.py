"""Row-parallel layers that leave their sum over the ranks to the caller, so that other work is done meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from mindspore import Tensor

from parallel_core.autograd import Function, no_grad
from parallel_core.comm.interface import Group, Handle
from parallel_core.errors import ConfigError


class RowParallel(Protocol):
    """A layer whose output is a sum over its group, with sequence parallelism scattered along dim 0."""

    tp_group: Group
    sequence_parallel: bool


_leaving: list[list[RowParallel]] = []


@contextmanager
def leave_open() -> Iterator[list[RowParallel]]:
    """Have row-parallel layers that add no bias return this rank's part of the sum; the list tells which did."""
    layers: list[RowParallel] = []
    _leaving.append(layers)
    try:
        yield layers
    finally:
        _leaving.pop()


def left_open(layer: RowParallel) -> bool:
    """Note that a layer is called; return whether its sum is the caller's."""
    if _leaving:
        _leaving[-1].append(layer)
    return bool(_leaving)


class OpenSum:
    """The sum of a branch over the tensor parallel ranks, started and not waited for.

    Args:
        partial_SBH: this rank's part, as the layers returned it; it is overwritten.
        layers: those that left their sums open: the one that the branch ends in, or none where nothing is summed.

    Raises:
        ConfigError: several have, so that it is not known what is to be summed.
    """

    def __init__(self, partial_SBH: Tensor, layers: list[RowParallel]) -> None:
        if len(layers) > 1:
            raise ConfigError(
                f"micro_batch_interleave_num: {len(layers)} sums over the tensor parallel ranks in one branch of a "
                "layer; a branch ends in one, write 1"
            )
        self._partial, self._handle = partial_SBH, None
        self._scatters = False
        self._group: Group | None = None
        if layers and layers[0].tp_group.size > 1:
            self._group, self._scatters = layers[0].tp_group, layers[0].sequence_parallel
            with no_grad():
                start = self._group.reduce_scatter_start if self._scatters else self._group.all_reduce_start_
                self._handle = start(partial_SBH)

    def wait(self) -> Tensor:
        """Return the sum [S, B, H], with sequence parallelism this rank's part of it, [S / tp, B, H].

        Backward: identity; with sequence parallelism an all-gather.
        """
        if self._handle is None:
            return self._partial
        return _Finished.apply(self._partial, self._handle, self._group, self._scatters)


class _Finished(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, handle: Handle, group: Group, scatters: bool) -> Tensor:
        ctx.group, ctx.scatters = group, scatters
        total = handle.wait()
        return partial.view(partial.shape) if total is None or not scatters else total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(dy, 0) if ctx.scatters else dy, None, None, None
