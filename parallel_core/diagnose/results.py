"""Which results of an iteration cannot be right, and what computing it again says of them. Pure Python.

Megatron-LM's meaning (its rerun state machine): a result that is not finite, or ten times the largest of the first
hundred, is computed again on the same device; one that differs points at a passing error, one that is the same is
computed on another device, where another result points at a broken device and the same one at the model or its data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from parallel_core.errors import CheckpointError
from parallel_core.records import Record

SPIKE = 10.0
"""How many times the largest sample makes a value unexpected."""
SAMPLES = 100
GRADIENT_NORM = "gradient norm"
TOLERANCE_OF_GRADIENTS = 1e-3
"""Relative; losses have none, forward passes are deterministic."""


class Usual:
    """Tells whether a value is unexpectedly large: ten times the largest of the first hundred, or more."""

    def __init__(self) -> None:
        self._count, self._largest = 0, 0.0

    def exceeded_by(self, value: float) -> float | None:
        """Return the largest sample if `value` is unexpectedly large, else None, having taken it for a sample."""
        if not math.isfinite(value):
            return None
        if self._count < SAMPLES:
            self._count, self._largest = self._count + 1, max(self._largest, abs(value))
            return None
        return self._largest if abs(value) >= SPIKE * self._largest else None


@dataclass(frozen=True)
class Rejection:
    """A result that cannot be right.

    Attributes:
        result: which one: the gradient norm, or the loss of a microbatch.
        value: what it was.
        why: in words.
        fatal: the run ends by it.
        place: the machine, and device, that computed it.
        injected: nothing is wrong with it; the kind of error that is played (`error_injection_type`).
    """

    result: str
    value: float
    why: str
    fatal: bool
    place: str
    injected: str = ""

    def to_record(self) -> dict[str, Any]:
        """Return what JSON can hold: a value that is not finite as a word."""
        return {**asdict(self), "value": repr(self.value)}

    @classmethod
    def of_record(cls, values: Any, where: str) -> Rejection:
        """Return what `to_record` of another rank, or in a checkpoint, says.

        Raises:
            CheckpointError: it says something else.
        """
        said = Record(values, where, CheckpointError)
        try:
            value = float(said.text("value") or "")
        except ValueError:
            said.refuse("value", "a number in a text")
        return cls(
            said.text("result"), value, said.text("why"), said.flag("fatal"), said.text("place"), said.text("injected")
        )

    def is_reproduced_by(self, value: float | None, *, elsewhere: bool) -> bool:
        """Tell whether the same computation gave the same result, as far as a computation does.

        Args:
            value: what it gave.
            elsewhere: it was computed on another device.
        """
        if self.injected:
            return self.injected == "correct_result" or (self.injected == "persistent_error" and not elsewhere)
        return value is not None and difference(self.value, value) <= _tolerance(self.result)


def _tolerance(result: str) -> float:
    return TOLERANCE_OF_GRADIENTS if result == GRADIENT_NORM else 0.0


def difference(one: float, other: float) -> float:
    """Return the relative difference of two results; those that are not finite in the same way do not differ."""
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.inf
    return abs(one - other) / max(abs(one), abs(other))


@dataclass
class Validation:
    """Finds the result of an iteration that cannot be right.

    Args:
        finite: results that are not finite cannot.
        spiky_loss: nor can unexpectedly large losses.
        large_grads: nor can unexpectedly large gradients.
        place: machine and device.
    """

    finite: bool
    spiky_loss: bool
    large_grads: bool
    place: str
    _usual: dict[bool, Usual] = field(default_factory=lambda: {True: Usual(), False: Usual()})

    def rejections(self, results: Mapping[str, float]) -> list[Rejection]:
        """Return what cannot be right of a rank's results, by name."""
        found = []
        for result, value in results.items():
            of_loss = result != GRADIENT_NORM
            if self.finite and not math.isfinite(value):
                found.append(Rejection(result, value, "it is not finite", True, self.place))
            elif (self.spiky_loss if of_loss else self.large_grads) and (
                largest := self._usual[of_loss].exceeded_by(value)
            ) is not None:
                why = f"it is {SPIKE:g} times the largest of the first {SAMPLES} ({largest:.6g}) or more"
                found.append(Rejection(result, value, why, False, self.place))
        return found


def injected(results: Mapping[str, float], rate: int, kind: str, place: str, key: object) -> Rejection | None:
    """Return a right result that is to be taken for a wrong one, one of `rate`, or None.

    Args:
        results: of a rank.
        rate: one of so many; 0: none.
        kind: `error_injection_type`.
        place: machine and device.
        key: what the draw follows from.
    """
    draw = random.Random(repr(key))
    for result, value in results.items() if rate else ():
        if draw.randrange(rate) == 0:
            return Rejection(result, value, f"an error is injected ({kind})", True, place, kind)
    return None


@dataclass
class Differences:
    """How far results are from those of the same computation again."""

    count: int = 0
    identical: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, value: float) -> None:
        """Take one in."""
        self.count, self.identical = self.count + 1, self.identical + (value == 0.0)
        self.total, self.largest = self.total + value, max(self.largest, value)

    def combine(self, other: Differences) -> None:
        """Take those of another rank in."""
        self.count, self.identical = self.count + other.count, self.identical + other.identical
        self.total, self.largest = self.total + other.total, max(self.largest, other.largest)

    def text(self) -> str:
        """Return them in words."""
        if self.count == self.identical:
            return f"{self.count} computed twice, all identical"
        mean = self.total / self.count
        return (f"{self.count} computed twice, {self.identical} identical; relative difference {mean:.3g} on average, "
                f"{self.largest:.3g} at most")  # fmt: skip
