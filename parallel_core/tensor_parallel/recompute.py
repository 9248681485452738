"""Activation recomputation: keep a segment's inputs, run it again in backward.

Source: Chen et al. 2016 (arXiv:1604.06174); selective form Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mindspore import Parameter, Tensor

from parallel_core.autograd import Function, applies, inner_backward, no_grad
from parallel_core.tape import gradients_again
from parallel_core.tensor_parallel.random import RandomStreams


def recompute(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Parameter], streams: RandomStreams
) -> Tensor:
    """Return `function(*inputs)`, keeping nothing but the inputs for backward.

    Args:
        function: a pure function of its inputs and `parameters`; its dropout draws from `streams`.
        inputs: tensors; those of integer type get no gradient.
        parameters: every parameter that the function uses.
        streams: the draws of the first run are repeated by the second, for any number of microbatches in flight.

    Backward:
        runs the function again, then its backward pass: bit-equal to not recomputing.
    """
    return _Recompute.apply(function, streams, len(inputs), *inputs, *parameters)


class _Recompute(Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], streams: RandomStreams, num_inputs: int, *tensors: Tensor
    ) -> Tensor:
        inputs = tensors[:num_inputs]
        ctx.function, ctx.streams, ctx.state = function, streams, streams.get_state()
        ctx.parameters, ctx.on_tape = tensors[num_inputs:], applies() is not None
        ctx.save_for_backward(*inputs)
        with no_grad():
            return function(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        replay = partial(ctx.streams.replay, ctx.state)
        arguments = ctx.function, ctx.saved_tensors, ctx.parameters, dy
        if ctx.on_tape:
            of_inputs, of_parameters = gradients_again(*arguments, replay)
        else:
            with replay():
                of_inputs, of_parameters = inner_backward(*arguments)
        return (None, None, None, *of_inputs, *of_parameters)
