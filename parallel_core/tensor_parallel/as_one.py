"""A cell that is recorded as one function, for as long as it consists of functions."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mindspore import Parameter, Tensor, nn

from parallel_core.autograd import records_gradients
from parallel_core.ops import are_compiled
from parallel_core.tape import OffTape, as_one, has_hooks, is_known
from parallel_core.tensor_parallel.random import RandomStreams

logger = logging.getLogger(__name__)


class AsOne:
    """Calls `function`, which is what a cell computes, as one recorded function.

    Where an operator of MindSpore's turns out to be in it, or another's module, and where hooks look at its modules,
    each of its functions is recorded for itself, with the same values.

    Args:
        cell: the owner of the parameters that the function uses.
        function: of tensors, to a tensor.
        streams: where its dropout draws.
    """

    def __init__(self, cell: nn.Cell, function: Callable[..., Tensor], streams: RandomStreams) -> None:
        self._cell, self._function, self._streams = cell, function, streams
        self._parameters: tuple[Parameter, ...] | None = None
        self._possible = True

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Return what the function does."""
        if not (self._possible and records_gradients() and are_compiled()):
            return self._function(*inputs)
        if self._parameters is None:
            self._parameters, self._possible = tuple(self._cell.trainable_params()), is_known(self._cell)
        if not self._possible or has_hooks(self._cell, self._parameters):
            return self._function(*inputs)
        drawn = self._streams.get_state()
        try:
            return as_one(self._function, inputs, self._parameters)
        except OffTape as reason:
            self._possible = False
            logger.info("%s: recorded kernel by kernel, because %s", type(self._cell).__name__, reason)
        self._streams.set_state(drawn)
        return self._function(*inputs)
