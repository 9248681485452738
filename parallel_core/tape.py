"""Several functions recorded as one: MindSpore's autograd is called once for a layer, not once for each of its kernels.

The modules of a layer run as they stand. While they do, every `autograd.Function` notes itself on a tape instead of
being handed to MindSpore, which is then given one function for all of them; its backward pass walks the tape. What is
not a `Function`, an operator of MindSpore's, leaves nothing on a tape. So a tensor that a function takes must be an
input, a parameter or on the tape; otherwise the tape refuses, and the caller records function by function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mindspore import Parameter, Tensor, mint

from parallel_core import ops
from parallel_core.autograd import Function, applied_by, no_grad, records_gradients, run_forward

__all__ = ["OffTape", "as_one", "constant", "reshaped"]


class OffTape(Exception):  # noqa: N818 - it says where a tensor is, and is caught
    """A function takes a tensor that no function made, so that its gradient would be lost."""


def as_one(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], parameters: Sequence[Parameter]
) -> Tensor:
    """Return `function(*inputs)`, recorded as one function; outside of recording, and on another tape, just call it.

    Args:
        function: made of `Function`s; its own state may change only in what a second call sets again.
        inputs: tensors; those of integer type, and None, get no gradient.
        parameters: every trainable parameter that the function uses.

    Raises:
        OffTape: an operator of MindSpore's own stands between two functions; nothing is recorded.
    """
    if not records_gradients():
        return function(*inputs)
    tape = _Tape(inputs, parameters)
    with no_grad(), applied_by(tape.apply):
        tape.end(function(*inputs))
    return _AsOne.apply(tape, *inputs, *parameters)


_CONSTANT = (-1, -1)


def constant(x: Tensor) -> Tensor:
    """Return `x`, and say that nobody asks for its gradient; a tape takes such tensors from anywhere."""
    x.place_on_tape = _CONSTANT
    return x


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """Return a contiguous `x` in another shape, as a function where a tape takes notes and as an operator elsewhere."""
    return x.reshape(*shape) if records_gradients() else _Reshaped.apply(x, shape)


class _Reshaped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return ops.shaped(x, shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ops.shaped(dy.contiguous(), ctx.shape), None


class _Context:
    """What a function keeps for its backward pass; MindSpore's has these names."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


class _Call(NamedTuple):
    function: type[Function]
    context: _Context
    sources: list[int | None]
    """Of every argument, its number on the tape; None: it gets no gradient."""
    results: range
    shapes: tuple[tuple[Any, Any], ...]
    """Shape and type of each result, of a function that has several."""


_serials = itertools.count()


class _Tape:
    """Calls in their order. Tensors are numbered: the inputs, the parameters, the results.

    A tensor bears its number itself, with the tape's: an address or an `id` may be given to another tensor once it is
    freed, and a table of tensors would keep them alive until the backward pass.
    """

    def __init__(self, inputs: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> None:
        self._serial = next(_serials)
        self._calls: list[_Call] = []
        self._num_inputs = len(inputs)
        for number, x in enumerate(inputs):
            if x is not None:
                x.place_on_tape = self._serial, number
        self._parameters = {id(p): len(inputs) + i for i, p in enumerate(parameters)}
        self._count = self.num_outer = len(inputs) + len(parameters)
        self.output: Tensor | None = None
        self._last = -1

    def apply(self, function: type[Function], args: tuple[Any, ...]) -> Any:
        """Call a function's forward pass and note it."""
        sources = [self._number(x) if isinstance(x, Tensor) else None for x in args]
        context = _Context()
        result = run_forward(function, context, args)
        results = result if isinstance(result, tuple) else (result,)
        first = self._count
        self._count += len(results)
        for number, x in enumerate(results, first):
            x.place_on_tape = self._serial, number
        shapes = tuple((x.shape, x.dtype) for x in results) if len(results) > 1 else ()
        self._calls.append(_Call(function, context, sources, range(first, self._count), shapes))
        return result

    def _number(self, x: Tensor) -> int | None:
        place = getattr(x, "place_on_tape", None)
        if place is not None and place[0] == self._serial:
            return place[1]
        if isinstance(x, Parameter) and (id(x) in self._parameters or not x.requires_grad):
            return self._parameters.get(id(x))
        if place is _CONSTANT or not x.is_floating_point():
            return None
        raise OffTape(f"an operator of MindSpore's made a tensor {x.dtype} {list(x.shape)}")

    def end(self, output: Tensor) -> None:
        """Take note of what the last call returned.

        Raises:
            OffTape: it is on no tape.
        """
        number = self._number(output)
        if number is None:
            raise OffTape("the result is a constant")
        self.output, self._last = output, number

    def backward(self, gradient: Tensor) -> list[Tensor | None]:
        """Return the gradients of the inputs and of the parameters; what the calls have kept is given back as it goes."""
        self.output = None
        gradients: list[Tensor | None] = [None] * self._count
        gradients[self._last] = gradient
        while self._calls:
            call = self._calls.pop()
            of_results = [gradients[number] for number in call.results]
            if all(x is None for x in of_results):
                continue
            gradients[call.results.start : call.results.stop] = [None] * len(of_results)
            for i, (shape, dtype) in enumerate(call.shapes):
                if of_results[i] is None:
                    of_results[i] = mint.zeros(shape, dtype=dtype)
            for number, got in zip(call.sources, call.function.backward(call.context, *of_results)):
                if number is not None and got is not None:
                    held = gradients[number]
                    gradients[number] = got if held is None else ops.total(held, got)
        return gradients[: self.num_outer]


class _AsOne(Function):
    @staticmethod
    def forward(ctx: Any, tape: _Tape, *tensors: Tensor | None) -> Tensor:
        ctx.tape = tape
        return tape.output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.tape.backward(gradient))
