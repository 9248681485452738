"""Functions that are noted and taken back without MindSpore's autograd, or recorded by it as one.

The modules of a stage or of a layer run as they stand. While they do, every `autograd.Function` notes itself on a tape
instead of being handed to MindSpore, and the backward pass walks the tape. What is not a `Function`, an operator of
MindSpore's, leaves nothing on a tape. So a tensor that a function takes must be an input, a parameter or on the tape;
otherwise the tape refuses, and the caller has MindSpore record function by function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, NamedTuple

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.autograd import (
    Function,
    applied_by,
    applies,
    in_inner_backward,
    inner_backward,
    no_grad,
    records_gradients,
    run_forward,
)
from parallel_core.ops import raw

__all__ = [
    "WRITTEN",
    "OffTape",
    "Tape",
    "as_one",
    "constant",
    "gradients_again",
    "has_hooks",
    "is_known",
    "reshaped",
    "takes_notes",
    "takes_written",
]


Deliver = Callable[[Parameter, Tensor | None], None]
Gradients = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
"""Of inputs and of parameters."""


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
    return _AsOne.apply(Tape(function, inputs, parameters), *inputs, *parameters)


_CONSTANT = (-1, -1)
_FLOATS = ms.float32, ms.bfloat16, ms.float16, ms.float64


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


def has_hooks(cell: nn.Cell, parameters: Sequence[Parameter]) -> bool:
    """Return whether somebody waits for a call or a gradient of a single module or parameter: MindSpore tells them.

    A method that somebody has put in the place of a module's own is such a hook too.
    """
    return any(map(_is_hooked, _parts(cell))) or any(
        p.num_hooks > len(getattr(p, "receivers", ())) for p in parameters if hasattr(p, "num_hooks")
    )


def is_known(cell: nn.Cell) -> bool:
    """Return whether a cell's parts are all of this package: others may change tensors in place, which no tape sees.

    A class of which somebody has replaced a method is another's.
    """
    return all(map(_is_known, {type(part) for part in _parts(cell)}))


_OURS = __name__.partition(".")[0]


def _is_known(kind: type) -> bool:
    ours = [vars(one).values() for one in kind.__mro__ if _package(one.__module__) == _OURS]
    # Not by a method's `__module__`, which a wrapper takes from what it wraps.
    functions = (x for values in ours for x in values if isinstance(x, FunctionType))
    return _package(kind.__module__) in (_OURS, "mindspore") and all(
        _package(f.__globals__.get("__name__", "")) == _OURS for f in functions
    )


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_hooked(cell: nn.Cell) -> bool:
    hooks = cell._forward_hook or cell._forward_pre_hook or cell._backward_hook or cell._backward_pre_hook
    return bool(hooks) or "construct" in cell.__dict__


def _parts(cell: nn.Cell) -> list[nn.Cell]:
    parts = [cell]
    for part in parts:
        parts += [child for child in part._cells.values() if child is not None]
    return parts


_register_hook = Tensor.register_hook


def _note_hook(x: Tensor, hook: Any) -> Any:
    if takes_notes():
        raise OffTape("a hook is put on a tensor")
    x.num_hooks = getattr(x, "num_hooks", 0) + 1
    return _register_hook(x, hook)


# MindSpore does not tell who has put hooks on a tensor; on a tape they would wait in vain.
Tensor.register_hook = _note_hook


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


class _Written:
    """Stands for a gradient that is written where its parameter's are summed."""


WRITTEN = _Written()
"""What a `Function.backward` on a tape returns for a parameter whose gradient it has written to `MainGrad.reserve`."""


_serials = itertools.count()
_takes_written = False


def takes_written() -> bool:
    """Return whether it is a tape that calls a `Function.backward` here, so that it may return `WRITTEN`."""
    return _takes_written and not in_inner_backward()


class Tape:
    """Calls of functions in their order, until `backward` takes them back.

    Tensors are numbered: the inputs, the parameters, the results. A tensor bears its number itself, with the tape's: an
    address or an `id` may be given to another tensor once it is freed, and a table of tensors would keep them alive
    until the backward pass.

    Args:
        function, inputs, parameters: see `as_one`; the function is called.

    Raises:
        OffTape: see `as_one`.
    """

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor | None], parameters: Sequence[Parameter]
    ) -> None:
        self._serial = next(_serials)
        self._calls: list[_Call] = []
        for number, x in enumerate(inputs):
            if x is not None:
                x.place_on_tape = self._serial, number
        self._num_inputs, self.parameters = len(inputs), parameters
        self._number_of = {id(p): len(inputs) + i for i, p in enumerate(parameters)}
        self._count = self._num_outer = len(inputs) + len(parameters)
        self._uses = [0] * self._count
        with no_grad(), applied_by(self._apply):
            self.output = function(*inputs)
        last = self._number(self.output)
        if last is None:
            raise OffTape("its result is a constant")
        self._last = last

    def _apply(self, function: type[Function], args: tuple[Any, ...]) -> Any:
        outer = self._number_of  # parameters, which live as long as the tape: most arguments, and the quickest to tell
        sources = [
            outer[id(x)] if id(x) in outer else self._number(x) if isinstance(x, Tensor) else None for x in args
        ]
        context = _Context()
        result = run_forward(function, context, args)
        results = result if isinstance(result, tuple) else (result,)
        first = self._count
        self._count += len(results)
        for number, x in enumerate(results, first):
            x.place_on_tape = self._serial, number
        for source in sources:
            if source is not None and source < self._num_outer:
                self._uses[source] += 1
        shapes = tuple((x.shape, x.dtype) for x in results) if len(results) > 1 else ()
        self._calls.append(_Call(function, context, sources, range(first, self._count), shapes))
        return result

    def _number(self, x: Tensor) -> int | None:
        place = getattr(x, "place_on_tape", None)
        if place is not None and place[0] == self._serial:
            return place[1]
        if place is _CONSTANT or x.dtype not in _FLOATS or (isinstance(x, Parameter) and not x.requires_grad):
            return None
        raise OffTape(f"an operator of MindSpore's made a tensor {x.dtype} {list(x.shape)}")

    def backward(self, gradient: Tensor, deliver: Deliver | None = None) -> Gradients:
        """Take the calls back; what they have kept is freed as it goes.

        Args:
            gradient: of the output, in its shape and type.
            deliver: called with each parameter and its gradient as soon as that is complete, which may be `WRITTEN`;
                None: nothing used it.

        Returns:
            Gradients of the inputs, and of the parameters if there is no `deliver`; these may be `WRITTEN`.
        """
        global _takes_written
        before, _takes_written = _takes_written, True
        try:
            return self._backward(gradient, deliver)
        finally:
            _takes_written = before

    def _backward(self, gradient: Tensor, deliver: Deliver | None) -> Gradients:
        gradients: list[Tensor | None] = [None] * self._count
        gradients[self._last] = gradient
        if deliver:
            self._deliver_unused(deliver)
        while self._calls:
            call = self._calls.pop()
            wanted = gradients[call.results.start : call.results.stop]
            gradients[call.results.start : call.results.stop] = [None] * len(wanted)
            if any(x is not None for x in wanted):
                self._take_back(call, wanted, gradients)
            if deliver:
                self._deliver_complete(call, gradients, deliver)
        return gradients[: self._num_inputs], gradients[self._num_inputs : self._num_outer]

    def _deliver_unused(self, deliver: Deliver) -> None:
        for number, parameter in enumerate(self.parameters, self._num_inputs):
            if not self._uses[number]:
                deliver(parameter, None)

    def _deliver_complete(self, call: _Call, gradients: list[Tensor | None], deliver: Deliver) -> None:
        for number in call.sources:
            if number is not None and self._num_inputs <= number < self._num_outer:
                self._uses[number] -= 1
                if not self._uses[number]:
                    deliver(self.parameters[number - self._num_inputs], gradients[number])
                    gradients[number] = None

    def _take_back(self, call: _Call, wanted: list[Tensor | None], gradients: list[Tensor | None]) -> None:
        for i, (shape, dtype) in enumerate(call.shapes):
            if wanted[i] is None:
                wanted[i] = raw.zeros(shape, dtype)
        for number, got in zip(call.sources, call.function.backward(call.context, *wanted)):
            if number is not None and got is not None:
                held = gradients[number]
                if held is None or held is WRITTEN:
                    gradients[number] = got
                elif got is not WRITTEN:
                    gradients[number] = ops.total(held, got)


_off_tape: set[Any] = set()
"""Code of functions that `gradients_again` has found to have operators of MindSpore's."""


def gradients_again(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    parameters: Sequence[Parameter],
    grad_output: Tensor,
    repeated: Callable[[], AbstractContextManager[None]],
) -> Gradients:
    """Do `autograd.inner_backward` on a tape, or where that cannot be, as MindSpore does it.

    Args:
        function: what was run before.
        inputs: its tensors.
        parameters: those that it uses.
        grad_output: gradient of its output.
        repeated: the block in which the function draws what it drew the first time.
    """
    code = getattr(function, "__code__", None)
    if code not in _off_tape:
        try:
            with repeated():
                return Tape(function, inputs, parameters).backward(grad_output)
        except OffTape:
            _off_tape.add(code)
    with repeated():
        return inner_backward(function, inputs, parameters, grad_output)


def takes_notes() -> bool:
    """Return whether the functions that this thread calls go on a tape."""
    return isinstance(getattr(applies(), "__self__", None), Tape)


class _AsOne(Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, *tensors: Tensor | None) -> Tensor:
        output, tape.output, ctx.tape = tape.output, None, tape
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_inputs, of_parameters = ctx.tape.backward(gradient)
        parameters = ctx.tape.parameters
        return (None, *of_inputs, *(_told(*pair) for pair in zip(parameters, of_parameters)))


def _told(parameter: Parameter, gradient: Any) -> Tensor | None:
    """Return a gradient for MindSpore, which has to know that one has been written to its sum."""
    return parameter.main_grad.accumulate(lambda *_: None) if gradient is WRITTEN else gradient
