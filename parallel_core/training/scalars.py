"""The numbers of one pass over a batch, summed over all ranks in one all-reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from parallel_core.comm.interface import Group
from parallel_core.errors import ResultError
from parallel_core.optimizer.in_order import exact_sum

Report = tuple[Any, Mapping[str, tuple[Any, Any]]]
"""Of one microbatch: number of tokens, and {name: (sum, number)}; see `pipeline.stage`."""


@dataclass
class LossTotals:
    """Sum and count of every reported loss, over any number of batches."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, other: LossTotals) -> None:
        """Add what further batches reported."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + other.counts[name]

    def means(self) -> dict[str, float | None]:
        """Return the mean of each loss over everything that counted; None where nothing did."""
        return {name: value / self.counts[name] if self.counts[name] else None for name, value in self.sums.items()}


@dataclass(frozen=True)
class Scalars:
    """What all ranks found in one pass; the same on every rank.

    Attributes:
        losses: every reported loss.
        tokens: tokens that count.
        squares: squared gradient norm.
        stop: a rank asks for the run to end.
    """

    losses: LossTotals
    tokens: float
    squares: float
    stop: bool


class ScalarReducer:
    """Sums the ranks' numbers; the names of the losses are agreed on once, and again when a rank has others.

    Args:
        world: all ranks.
        exactly: sums are rounded once, so that they do not depend on which rank has which number.
    """

    def __init__(self, world: Group, exactly: bool = False) -> None:
        self._world, self._exactly = world, exactly
        self._own: list[str] | None = None
        self._names: list[str] = []

    def reduce(self, reports: Sequence[Report], squares: Any, stop: Callable[[], bool]) -> Scalars:
        """Return the sums over all ranks.

        Args:
            reports: of each microbatch, on the one rank that tells of it; empty elsewhere.
            squares: this rank's share of the squared gradient norm, a number or a tensor of one, or several numbers.
            stop: asked as late as possible whether this rank wants the run to end.

        Communication: one all-reduce of 4 + 2 * losses float32; a second one, after a gather of the names, at first
        and whenever they change. `exactly`: one gather of objects.
        """
        if self._exactly:
            return self._sum_exactly(squares, reports, stop)
        squares, reports = _on_host(squares, reports)
        own = list(dict.fromkeys(name for _, report in reports for name in report))
        head = [squares, sum(float(count) for count, _ in reports), float(stop())]
        if self._own is None:
            self._agree(own)
        total = self._sum([*head, float(own != self._own)], reports)
        if total[3]:
            self._agree(own)
            total = self._sum([*head, 0.0], reports)
        count = len(self._names)
        sums, counts = total[4 : 4 + count].tolist(), total[4 + count :].tolist()
        losses = LossTotals(dict(zip(self._names, sums)), dict(zip(self._names, counts)))
        return Scalars(losses, tokens=float(total[1]), squares=float(total[0]), stop=total[2] > 0)

    def _sum_exactly(self, squares: Any, reports: Sequence[Report], stop: Callable[[], bool]) -> Scalars:
        own = [[float(count), {name: [float(one) for one in pair] for name, pair in report.items()}]
               for count, report in reports]  # fmt: skip
        of_ranks = self._world.all_gather_object([np.atleast_1d(squares).tolist(), own, bool(stop())])
        told = [report for _, reports_of_rank, _ in of_ranks for report in reports_of_rank]
        sums: dict[str, list[list[float]]] = {}
        for _, report in told:
            for name, pair in report.items():
                sums.setdefault(name, []).append(pair)
        losses = LossTotals(
            {name: exact_sum([value for value, _ in pairs]) for name, pairs in sums.items()},
            {name: exact_sum([number for _, number in pairs]) for name, pairs in sums.items()},
        )
        all_squares = [one for of_rank, _, _ in of_ranks for one in of_rank]
        tokens = exact_sum([count for count, _ in told])
        return Scalars(losses, tokens, exact_sum(all_squares), stop=any(asks for _, _, asks in of_ranks))

    def _agree(self, own: list[str]) -> None:
        self._own = own
        self._names = list(dict.fromkeys(name for names in self._world.all_gather_object(own) for name in names))

    def _sum(self, head: list[float], reports: Sequence[Report]) -> np.ndarray:
        pairs = [[report[name] for _, report in reports if name in report] for name in self._names]
        sums = [sum(float(value) for value, _ in of_name) for of_name in pairs]
        counts = [sum(float(number) for _, number in of_name) for of_name in pairs]
        vector = np.array([*head, *sums, *counts], np.float32)
        if self._world.size > 1:
            vector = self._world.all_reduce_(Tensor(vector)).asnumpy()
        return vector.astype(np.float64)


def _on_host(squares: Any, reports: Sequence[Report]) -> tuple[float, list[Report]]:
    """Return both as floats; what is on an NPU comes from there in one copy."""
    values = [squares]
    for count, report in reports:
        values += [count, *(number for pair in report.values() for number in pair)]
    if ms.get_context("device_target") == "Ascend":
        at = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        joined = [values[i].astype(ms.float32).reshape(1) for i in at]
        for i, number in zip(at, mint.cat(joined).asnumpy().tolist() if joined else ()):
            values[i] = number
    floats = iter([float(value) for value in values])
    return next(floats), [
        (next(floats), {name: (next(floats), next(floats)) for name in report}) for _, report in reports
    ]


def require_finite(losses: Mapping[str, float | None], iteration: int) -> None:
    """Refuse losses that are not finite.

    Raises:
        ResultError: for the first one, by name.
    """
    for name, value in losses.items():
        if value is not None and not math.isfinite(value):
            raise ResultError(
                f"iteration {iteration}: the reported {name!r} is {value}, though every gradient is finite; no update "
                "was made. Look at what loss_func reports, or use --no-check-for-nan-in-loss-and-grad to go on."
            )
