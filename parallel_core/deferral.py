"""Gradients of weights that are computed later than those of inputs: the open list, and who asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mindspore import Tensor


def late_gradient(parameter: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """Return `compute()`, a gradient of `parameter`; inside `deferring` leave it for later where its sum is at hand."""
    late = getattr(parameter, "late_grad", None) if is_deferring() else None
    return compute() if late is None else late.accumulate_later(compute)


_deferred: list[Callable[[], None]] | None = None


@contextmanager
def deferring() -> Iterator[list[Callable[[], None]]]:
    """Inside the block, backward passes leave the gradients of weights as calls in the list that this gives.

    So a backward pass is split: the gradient of its input is on its way to the previous stage before any weight's is
    computed. A block inside another has a list of its own; an exception closes it.
    """
    global _deferred
    outer, _deferred = _deferred, []
    try:
        yield _deferred
    finally:
        _deferred = outer


def is_deferring() -> bool:
    """Return whether gradients of weights are left for later."""
    return _deferred is not None


def defer(work: Callable[[], None]) -> None:
    """Leave `work` in the list of `deferring`; outside of it call it."""
    if _deferred is None:
        work()
    else:
        _deferred.append(work)
