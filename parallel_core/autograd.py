"""What this program takes from MindSpore's autograd, imported in this one place.

`Function` is over MindSpore's torch-like custom function, which is private there (`mindspore.common._grad_function`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn
from mindspore.common._grad_function import _Function
from mindspore.common.api import _pynative_executor
from mindspore.ops.composite import GradOperation

__all__ = [
    "Function",
    "applied_by",
    "applies",
    "backward",
    "forward_only",
    "in_inner_backward",
    "inner_backward",
    "no_grad",
    "records_gradients",
    "run_forward",
]

no_grad = ms._no_grad
"""Context manager: operations inside are not recorded."""


def records_gradients() -> bool:
    """Return whether operations are recorded here, so that a tensor made now can have a hook for its gradient."""
    return bool(_pynative_executor.enable_grad())


class _OfThread(threading.local):
    apply: Callable[[type[Function], tuple[Any, ...]], Any] | None = None


_this_thread = _OfThread()


class Function(_Function):
    """MindSpore's custom function; inside `applied_by` it is called, and recorded or not, in another way."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Return what `forward` returns of these arguments."""
        return super().apply(*args) if _this_thread.apply is None else _this_thread.apply(cls, args)


def applies() -> Callable[[type[Function], tuple[Any, ...]], Any] | None:
    """Return what this thread is inside of `applied_by`, or None."""
    return _this_thread.apply


@contextmanager
def applied_by(apply: Callable[[type[Function], tuple[Any, ...]], Any] | None) -> Iterator[None]:
    """Call `apply(function, arguments)` in the block for every `Function`; None: MindSpore's way."""
    before, _this_thread.apply = _this_thread.apply, apply
    try:
        yield
    finally:
        _this_thread.apply = before


class _Forgetful:
    """What `forward` keeps for a backward pass that never comes."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep nothing."""


def _forget(function: type[Function], args: tuple[Any, ...]) -> Any:
    return function.forward(_Forgetful(), *args)


def run_forward(function: type[Function], context: Any, args: tuple[Any, ...]) -> Any:
    """Return what a function's forward pass gives; functions that it calls itself are not recorded."""
    before, _this_thread.apply = _this_thread.apply, _forget  # as `applied_by`, without a generator for each kernel
    try:
        return function.forward(context, *args)
    finally:
        _this_thread.apply = before


@contextmanager
def forward_only() -> Iterator[None]:
    """Run operations that no backward pass follows, as in generation: a custom function costs no more than its kernel.

    `no_grad` does the same for operators, but still calls custom functions through MindSpore, which takes longer than a
    small kernel.
    """
    with no_grad(), applied_by(_forget):
        yield


_GRAD_OF_INPUTS_AND_PARAMETERS = GradOperation(get_all=True, get_by_list=True, sens_param=True)


def backward(
    cell: nn.Cell, inputs: Sequence[Any], parameters: Sequence[Parameter], grad_output: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the gradients of one earlier call of `cell`, without running it again.

    MindSpore finds the recorded call by its input objects: `inputs` must be the very tensors of that call, different
    ones for every call in flight. Calls may be taken back in any order.

    Args:
        cell: a Cell with `set_grad(True)`.
        inputs: the arguments of the call.
        parameters: the parameters whose gradients are wanted.
        grad_output: gradient of the output, in its shape and dtype.

    Returns:
        Gradients of the inputs, and of the parameters.
    """
    of_inputs, of_parameters = _GRAD_OF_INPUTS_AND_PARAMETERS(cell, ParameterTuple(parameters))(*inputs, grad_output)
    return of_inputs, of_parameters


def forget_recording() -> None:
    """Forget a call whose forward pass raised; else MindSpore takes every later one for a part of it."""
    _pynative_executor.clear_res()
    _pynative_executor.set_grad_flag(False)


_inner_backwards = 0


def inner_backward(
    function: Callable[..., Tensor], inputs: Sequence[Any], parameters: Sequence[Parameter], grad_output: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run `function(*inputs)` and return its gradients, inside the backward pass of a `Function`.

    Gradient hooks do not fire here: the outer backward pass fires them with what this one contributes.
    """
    global _inner_backwards
    # Cut off from their history: an input that is a view of a Function's output gets a gradient of zero otherwise.
    # Integers have none, and stay the objects that they are (see `ops.documents`).
    inputs = tuple(ms.ops.stop_gradient(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    _inner_backwards += 1
    try:
        return _GRAD_OF_INPUTS_AND_PARAMETERS(function, ParameterTuple(parameters))(*inputs, grad_output)
    finally:
        _inner_backwards -= 1


def in_inner_backward() -> bool:
    """Return whether `inner_backward` is running, in which gradients are not complete."""
    return _inner_backwards > 0
