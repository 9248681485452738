"""Forward passes of a chunk that are taken back later: on a tape, or by MindSpore's autograd."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mindspore import Parameter, Tensor, nn

from parallel_core.autograd import backward, forget_recording
from parallel_core.ops import are_compiled, raw
from parallel_core.tape import WRITTEN, OffTape, Tape, has_hooks, is_known

logger = logging.getLogger(__name__)

TakeBack = Callable[[Tensor], Tensor]
"""`take_back(gradient of the output) -> gradient of the input`; parameters get theirs on the way."""


class RereadableIterator:
    """An iterator that can go back to where `mark` was called."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self._since_mark, self._again = items, list[Any](), list[Any]()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = self._again.pop(0) if self._again else next(self._items)
        self._since_mark.append(item)
        return item

    def mark(self) -> None:
        """Remember this place."""
        self._since_mark.clear()

    def go_back(self) -> None:
        """Give what was read since the mark once more."""
        self._again, self._since_mark = [*self._since_mark, *self._again], []


class RecordedCalls:
    """Calls a Cell of one tensor so that each call can be taken back.

    A cell whose parts are of this package goes on a tape, so that MindSpore's autograd has no part in it. Where it
    turns out to have an operator of MindSpore's, and while hooks look at its modules or parameters, MindSpore records
    it.

    Args:
        cell: what is called.
        parameters: the parameters whose gradients are wanted.
    """

    def __init__(self, cell: nn.Cell, parameters: Sequence[Parameter]) -> None:
        self._cell, self._parameters = cell, parameters
        self._possible, self._on_tape = True, False

    def start_iteration(self, *, records: bool) -> None:
        """Look whether hooks or modules have come or gone; `records` says whether calls are to be taken back."""
        possible = self._possible and are_compiled() and is_known(self._cell)
        self._on_tape = possible and not has_hooks(self._cell, self._parameters)
        self._cell.set_grad(records and not self._on_tape)

    def call(self, entry: Tensor, start_again: Sequence[Callable[[], None]]) -> tuple[Tensor, TakeBack]:
        """Return the cell's output, and what takes the call back.

        Args:
            entry: the input; another tensor for every call that is not taken back yet.
            start_again: called one after another, they undo what a call that was given up has changed.
        """
        if self._on_tape:
            try:
                return self._call_on_tape(entry)
            except OffTape as reason:
                self._possible = self._on_tape = False
                self._cell.set_grad(True)
                logger.info("the model is recorded by MindSpore's autograd, because %s", reason)
            for undo in start_again:
                undo()
        try:
            return self._cell(entry), lambda gradient: backward(self._cell, (entry,), self._parameters, gradient)[0][0]
        except BaseException:
            forget_recording()
            raise

    def _call_on_tape(self, entry: Tensor) -> tuple[Tensor, TakeBack]:
        tape = Tape(self._cell, (entry,), self._parameters)
        output, tape.output = tape.output, None

        def take_back(gradient: Tensor) -> Tensor:
            (of_entry,), _ = tape.backward(gradient, _deliver)
            return _zeros(entry) if of_entry is None else of_entry

        return output, take_back


def _deliver(parameter: Parameter, gradient: Tensor | None) -> None:
    if gradient is WRITTEN:
        for completed in getattr(parameter, "completions", ()):
            completed()
        return
    if gradient is None:  # what the output does not depend on has a gradient of zeros, as in MindSpore's autograd
        gradient = _zeros(parameter)
    for receive in getattr(parameter, "receivers", ()):
        receive(gradient)


def _zeros(x: Tensor) -> Tensor:
    return raw.zeros(x.shape, x.dtype)
