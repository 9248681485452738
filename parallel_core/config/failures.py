"""What failures cost a job, and how often it should save, on paper. Pure Python.

Ranks fail independently, at a constant rate; a failure of any ends the job, which starts again from its last
checkpoint. Failures strike while training, saving and restarting alike. Source of the closed form: Daly 2006, "A higher
order estimate of the optimum checkpoint interval for restart dumps", section 3; `simulate` draws the failures and needs
no formula.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from parallel_core.errors import ConfigError

_LONGEST = 700.0
"""Exponents beyond this do not fit a float; a job that needs them never gets through."""


@dataclass(frozen=True)
class Failures:
    """How often a job fails, and what a save and a restart take, in seconds."""

    mtbf: float
    """Mean time between failures of the whole job."""
    save: float
    """How long training waits for a save."""
    restart: float
    """From a failure until training goes on: noticing it, starting processes, loading."""

    @staticmethod
    def of_ranks(mtbf_hours: float, ranks: int, save: float, restart: float) -> Failures:
        """Return the failures of a job, from the hours between failures of one rank.

        Raises:
            ConfigError: if a number is not finite, or negative, or there is no time between failures.
        """
        for name, value in (("mtbf-hours", mtbf_hours), ("save-seconds", save), ("restart-seconds", restart)):
            if not 0 <= value < math.inf or (name == "mtbf-hours" and value == 0):
                raise ConfigError(f"{name}={value:g}: use a number of more than 0" if name == "mtbf-hours" else
                                  f"--{name} {value:g}: use a number of 0 or more")
        return Failures(mtbf_hours * 3600.0 / ranks, save, restart)


@dataclass(frozen=True)
class Shares:
    """Where the time goes, as shares of all of it; their sum is 1."""

    training: float
    """Steps that are kept: the goodput."""
    saving: float
    redone: float
    """Steps and saves that a failure took away."""
    restarting: float


def expected(failures: Failures, interval: float) -> Shares:
    """Return the shares that are to be expected with a save after every `interval` seconds of training.

    With L = interval + save, R = restart and the rate r = 1 / mtbf, a stretch from one save to the next takes
    exp(r R) (exp(r L) - 1) / r on average; it fails exp(r L) - 1 times, and each restart takes (exp(r R) - 1) / r.
    """
    rate, length = 1.0 / failures.mtbf, interval + failures.save
    if rate * (length + failures.restart) > _LONGEST:
        return Shares(0.0, 0.0, 1.0, 0.0)
    fails = math.expm1(rate * length)
    total = math.exp(rate * failures.restart) * fails / rate
    restarting = fails * math.expm1(rate * failures.restart) / rate
    parts = (interval / total, failures.save / total, restarting / total)
    return Shares(parts[0], parts[1], max(0.0, 1.0 - sum(parts)), parts[2])


def best_interval(failures: Failures) -> float:
    """Return the seconds of training between saves that give the highest goodput.

    It is x * mtbf with (1 - x) exp(x + save / mtbf) = 1, found by halving; about sqrt(2 * save * mtbf) where saves are
    short. A save that takes no time is made all the time: 0.
    """
    low, high, save = 0.0, 1.0, min(failures.save / failures.mtbf, _LONGEST)
    if save == 0.0:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        # Logarithms: the exponential itself does not fit a float where saves are longer than failures are apart.
        if math.log1p(-middle) + middle + save > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2 * failures.mtbf


def simulate(failures: Failures, interval: float, *, stretches: int = 2000, seed: int = 0) -> Shares | None:
    """Return the shares of one job with so many saves, whose failures are drawn; None if it does not get that far.

    Args:
        failures: their rate and cost.
        interval: seconds of training between saves.
        stretches: saves until the job ends.
        seed: of the draws.
    """
    draw, length = random.Random(seed), interval + failures.save
    redone = restarting = 0.0
    next_failure, patience = draw.expovariate(1.0 / failures.mtbf), 500 * stretches
    for _ in range(stretches):
        while next_failure < length:
            redone += next_failure
            next_failure = draw.expovariate(1.0 / failures.mtbf)
            while next_failure < failures.restart:
                restarting += next_failure
                next_failure = draw.expovariate(1.0 / failures.mtbf)
                patience -= 1
                if not patience:
                    return None
            restarting += failures.restart
            next_failure -= failures.restart
            patience -= 1
            if not patience:
                return None
        next_failure -= length
    saving, training = stretches * failures.save, stretches * interval
    total = training + saving + redone + restarting
    return Shares(training / total, saving / total, redone / total, restarting / total)


def failures_text(
    mtbf_hours: float,
    ranks: int,
    save: float,
    restart: float,
    *,
    step: float | None = None,
    save_interval: int | None = None,
) -> str:
    """Return goodput and the best interval for people.

    Args:
        mtbf_hours: hours between failures of one rank.
        ranks: the job's ranks.
        save: seconds that training waits for a save.
        restart: seconds from a failure until training goes on.
        step: seconds of an iteration; with it intervals are told in iterations, too.
        save_interval: iterations between saves that the configuration has.

    Raises:
        ConfigError: as `Failures.of_ranks`; if `step` is not a number of more than 0.
    """
    if step is not None and not 0 < step < math.inf:
        raise ConfigError(f"--step-seconds {step:g}: use a number of more than 0")
    failures = Failures.of_ranks(mtbf_hours, ranks, save, restart)
    best = best_interval(failures)
    if step is not None:
        below = max(1, math.floor(best / step))  # saves are made between iterations
        best = max((below * step, (below + 1) * step), key=lambda interval: expected(failures, interval).training)
    intervals = {"best": best, "half of it": best / 2, "twice as long": best * 2}
    if save == 0.0 and step is None:
        intervals = {"best": 0.0}
    if step is not None:
        intervals = {name: max(1, round(value / step)) * step for name, value in intervals.items()}
        if save_interval:
            intervals["--save-interval as configured"] = save_interval * step
    return "\n".join(_lines(failures, ranks, mtbf_hours, intervals, step)) + "\n"


def _lines(
    failures: Failures, ranks: int, mtbf_hours: float, intervals: dict[str, float], step: float | None
) -> Iterator[str]:
    yield f"failures: a rank every {mtbf_hours:g} h, so one of {ranks} every {_time(failures.mtbf)}"
    yield f"a save holds training up for {_time(failures.save)}, a restart takes {_time(failures.restart)}"
    if intervals == {"best": 0.0}:
        yield "saves take no time, so none is too many; give --step-seconds for what saving after every step is worth"
        return
    yield ""
    yield "  training between saves                           | goodput | saving | redone | restarting | goodput drawn"
    for name, interval in intervals.items():
        shares, drawn = expected(failures, interval), simulate(failures, interval)
        steps = "" if step is None else f" = --save-interval {round(interval / step)}"
        parts = (shares.training, shares.saving, shares.redone, shares.restarting)
        cells = [f"{_percent(part):>{width}}" for part, width in zip(parts, (7, 6, 6, 10))]
        found = "never done" if drawn is None else _percent(drawn.training)
        yield f"  {f'{name}: {_time(interval)}{steps}':48} | {' | '.join(cells)} | {found:>13}"
    yield ""
    best = expected(failures, intervals["best"]).training
    yield f"goodput {_percent(best)}: of {ranks} ranks as many as {ranks * best:.1f} would do without failures"


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
