"""A parameter's gradient: whether there is one, where it is summed, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mindspore import Parameter, Tensor

from parallel_core.autograd import in_inner_backward


def needs_gradient(parameter: Tensor) -> bool:
    """Return whether a `Function.backward` has to compute this weight's gradient: not for a frozen parameter."""
    return getattr(parameter, "requires_grad", True)


class MainGrad(Protocol):
    """Where the gradients of a parameter are summed over microbatches (Megatron: `param.main_grad`)."""

    def takes(self, dtype: Any) -> bool:
        """Return whether `accumulate` sums gradients that are computed from tensors of a type."""

    def accumulate(self, write: Callable[[Any, bool], None], *, lookup: bool = False) -> Tensor | None:
        """Call `write(memory, add)`, which overwrites memory in the parameter's shape or adds to it.

        The memory is a NumPy array, or a tensor where it is a device's; sums of 16 bits take each gradient as a whole.

        Inside `deferring` the call is left for later. `lookup`: an embedding's rows are added, see `in_order`.

        Returns:
            What the calling `Function.backward` returns as the parameter's gradient.
        """

    takes_writes: bool
    """Whether sums are numbers on the host, so that there is `reserve`."""

    def reserve(self) -> tuple[int, int, bool]:
        """Return (address, kind of its numbers, add): the caller overwrites the memory there next, or adds to it.

        Not inside `deferring`. The kind is as `library.KINDS` has it.
        """

    def accumulate_later(self, compute: Callable[[], Tensor]) -> Tensor | None:
        """Inside `deferring`: leave `compute()`, which returns the gradient, for later. Returns as `accumulate`."""


def main_grad_of(parameter: Tensor, gradient: Tensor) -> MainGrad | None:
    """Return where gradients of `parameter` are summed that follow from `gradient`, if backward may write there."""
    main_grad: MainGrad | None = getattr(parameter, "main_grad", None)
    return main_grad if main_grad is not None and main_grad.takes(gradient.dtype) else None


def everyone_takes_written(parameter: Tensor) -> bool:
    """Return whether all that `on_gradient` calls can do without the gradient, where it has been written."""
    return len(getattr(parameter, "receivers", ())) <= len(getattr(parameter, "completions", ()))


def on_gradient(
    parameter: Parameter, receive: Callable[[Tensor], None], completed: Callable[[], None] | None = None
) -> None:
    """Call `receive(gradient)` in every backward pass, as soon as the parameter's gradient is complete.

    With `completed` this is called in its place where the gradient has been written to the parameter's `main_grad`.
    """

    def hook(gradient: Tensor) -> None:
        if not in_inner_backward():
            receive(gradient)

    parameter.register_hook(hook)
    parameter.receivers = [*getattr(parameter, "receivers", ()), receive]
    if completed is not None:
        parameter.completions = [*getattr(parameter, "completions", ()), completed]
