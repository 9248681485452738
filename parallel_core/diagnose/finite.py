"""Looks at every module's output, and at the gradient of it, while an iteration runs: which is the first not finite.

Modules are found by MindSpore's hooks, so models of one's own are looked at like this package's. A module tells after
the modules inside it, so what is found first is the innermost. Ranks agree on the order of what they found without
clocks: forward passes by microbatch and stage and, within them, by the number of the module, which is the same on
ranks that hold parts of one layer; backward passes likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core import spans
from parallel_core.autograd import no_grad, records_gradients
from parallel_core.layout.shard import shard_of

_PARAMETERS, _FORWARD, _BACKWARD, _WEIGHTS = range(4)
_THE = {True: "", False: "the "}


@dataclass(frozen=True)
class Found:
    """A tensor that is not finite, as a rank tells the others.

    Attributes:
        order: by which ranks compare what they found; the least is the first.
        rank: whose it is.
        what: the tensor in words: `output of decoder.layers.3.mlp (MLP)`.
        when: in which part of the iteration.
        values: dtype, shape, and how many values are not finite.
        beside: lines about what the tensor was computed from.
    """

    order: tuple[int, ...]
    rank: int
    what: str
    when: str
    values: str
    beside: tuple[str, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Found:
        """Return what `to_record` of another rank has told."""
        return cls(**{**record, "order": tuple(record["order"]), "beside": tuple(record["beside"])})


@dataclass
class _Pass:
    """The forward or backward pass under way."""

    backward: bool = False
    microbatch: int = 0
    chunk: int = 0
    looked: int = 0
    last: str = ""
    """What was looked at before, and finite."""


@dataclass
class FiniteWatch(spans.Listener):
    """Context in which a rank's model chunks are looked at.

    Attributes:
        chunks: the model chunks.
        stages: which pipeline stage each of them is.
        rank: this rank.
        number: a microbatch's number over all data parallel ranks, from this rank's.
        gradients: name and sum of squares and values of every parameter's gradient, asked after the last backward pass.
        first: the first tensor that is not finite, if any was.
        largest: what was looked at -> its largest absolute value.
    """

    chunks: Sequence[nn.Cell]
    stages: Sequence[int]
    rank: int
    number: Callable[[int], int] = lambda microbatch: microbatch
    gradients: Callable[[], Iterator[tuple[str, np.ndarray]]] = lambda: iter(())
    first: Found | None = None
    largest: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> FiniteWatch:
        self._now: _Pass | None = None
        self._handles: list[Any] = []
        for chunk, model in enumerate(self.chunks):
            self._look_at_parameters(chunk, model)
            for name, cell in _named(model):
                words = f"{name} ({type(cell).__name__})" if name else type(cell).__name__
                self._handles.append(cell.register_forward_hook(self._after_call(words)))
        spans.listen(self)
        return self

    def __exit__(self, *error: object) -> None:
        spans.ignore(self)
        for handle in self._handles:
            handle.remove()

    def begin(self, name: str, level: int, details: dict[str, Any]) -> None:  # noqa: ARG002
        """Take note of a pass that begins."""
        if name in ("forward-compute", "backward-compute"):
            self._now = _Pass(name == "backward-compute", self.number(details["microbatch"]), details["chunk"])

    def end(self, name: str, level: int, start_ns: int, end_ns: int, details: dict[str, Any]) -> None:  # noqa: ARG002
        """Take note of the end of a pass, and of all of them."""
        if name in ("forward-compute", "backward-compute"):
            self._now = None
        elif name == "forward-backward":
            self._look_at_gradients()

    # ---- what is looked at ------------------------------------------------------------------------------------------
    def _look_at_parameters(self, chunk: int, model: nn.Cell) -> None:
        for number, parameter in enumerate(model.get_parameters()):
            values = _values(parameter)
            if self.first is None and not np.isfinite(values).all():
                self.first = Found(
                    (_PARAMETERS, self.stages[chunk], number), self.rank, f"parameter {shard_of(parameter).name}",
                    "before the iteration begins, so the update before it, or what was loaded, made it so",
                    _described(values),
                )  # fmt: skip

    def _after_call(self, words: str) -> Callable[[nn.Cell, Any, Any], None]:
        def look(cell: nn.Cell, inputs: Any, output: Any) -> None:
            now = self._now
            if now is None:
                return
            outputs = list(_tensors(output))
            for number, tensor in enumerate(outputs):
                which = f"output {number} of " if len(outputs) > 1 else "output of "
                # What is computed again in a backward pass was looked at in the forward pass.
                if not now.backward:
                    self._look(now, which + words, tensor, lambda: _beside(cell, inputs))
                if records_gradients():
                    tensor.register_hook(self._on_gradient(f"gradient of {_THE[len(outputs) > 1]}{which}{words}"))

        return look

    def _on_gradient(self, what: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if self._now is not None and isinstance(gradient, Tensor):
                self._look(self._now, what, gradient, lambda: ())

        return look

    def _look(self, now: _Pass, what: str, tensor: Tensor, beside: Callable[[], tuple[str, ...]]) -> None:
        now.looked += 1
        values = _values(tensor)
        if not values.size:
            return
        if np.isfinite(values).all():
            now.last = what
            self.largest[what] = max(self.largest.get(what, 0.0), float(np.abs(values).max()))
        elif self.first is None or now.backward is False and self.first.order[0] > _FORWARD:
            stage = self.stages[now.chunk]
            order = (_BACKWARD, now.microbatch, -stage) if now.backward else (_FORWARD, now.microbatch, stage)
            before = (f"the last one before it, {now.last}, was finite",) if now.last else ()
            kind = "backward" if now.backward else "forward"
            self.first = Found(
                (*order, now.looked), self.rank, what,
                f"in the {kind} pass of microbatch {now.microbatch} at pipeline stage {stage}",
                _described(values), (*beside(), *before),
            )  # fmt: skip

    def _look_at_gradients(self) -> None:
        for number, (name, values) in enumerate(self.gradients()):
            if self.first is None and not np.isfinite(values).all():
                self.first = Found(
                    (_WEIGHTS, number), self.rank, f"gradient of {name}",
                    "after the backward passes, in which every layer's gradient was finite", _described(values),
                )  # fmt: skip


def _named(model: nn.Cell) -> Iterator[tuple[str, nn.Cell]]:
    """Yield every module with its name in the whole model: layers have their global number on every stage."""
    known: dict[str, str] = {"": ""}
    for path, cell in model.cells_and_names():
        above, _, last = path.rpartition(".")
        own = getattr(cell, "name", None) if hasattr(cell, "layer_number") else None
        inherited = f"{known.get(above, above)}.{last}".lstrip(".")
        known[path] = own if isinstance(own, str) and own else inherited
        yield known[path], cell


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of floating point numbers in what a module returns."""
    if isinstance(value, Tensor):
        if value.dtype in (ms.float32, ms.float16, ms.bfloat16):
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _values(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values, those of bfloat16, which NumPy does not know, as float32."""
    with no_grad():
        return (tensor if tensor.dtype != ms.bfloat16 else tensor.astype(ms.float32)).asnumpy()


def _described(values: np.ndarray) -> str:
    """Return type, shape and the number of values that are not finite, or the largest."""
    head = f"{values.dtype} {list(values.shape)}"
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if not nan + infinite:
        return f"{head}, finite, largest {float(np.abs(values).max()) if values.size else 0.0:.4g}"
    return f"{head}, {nan} NaN and {infinite} infinite of {values.size}"


def _beside(cell: nn.Cell, inputs: Any) -> tuple[str, ...]:
    """Return lines about a module's inputs and its own parameters."""
    lines = [f"its input: {_described(_values(tensor))}" for tensor in _tensors(inputs)]
    own: Iterator[Parameter] = (p for p in cell.get_parameters(expand=False) if isinstance(p, Parameter))
    lines += [f"its parameter {shard_of(p).name}: {_described(_values(p))}" for p in own]
    return tuple(lines)
