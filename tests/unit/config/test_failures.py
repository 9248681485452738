"""Failures on paper: the closed form against drawn failures, and the best interval against its neighbours."""

from __future__ import annotations

import math

import pytest

from parallel_core.config.__main__ import main
from parallel_core.config.failures import Failures, best_interval, expected, failures_text, simulate
from parallel_core.errors import ConfigError

CASES = [
    Failures(mtbf=18000.0, save=30.0, restart=420.0),
    Failures(mtbf=3600.0, save=60.0, restart=600.0),
    Failures(mtbf=600.0, save=120.0, restart=300.0),
    Failures(mtbf=5e3, save=1.0, restart=10.0),
]


@pytest.mark.parametrize("failures", CASES)
@pytest.mark.parametrize("times", [0.3, 1.0, 3.0])
def test_drawn_failures_follow_the_formula(failures, times):
    interval = times * best_interval(failures)
    want, found = expected(failures, interval), simulate(failures, interval, stretches=40_000)
    assert sum(vars(want).values()) == pytest.approx(1.0)
    for name, share in vars(want).items():
        # Of n failures the number is off by 1/sqrt(n) of itself; the fewest here are some hundreds.
        assert getattr(found, name) == pytest.approx(share, rel=0.02 if name in ("training", "saving") else 0.15), name


@pytest.mark.parametrize("failures", CASES)
def test_no_interval_is_better_than_the_best(failures):
    best = best_interval(failures)
    goodput = expected(failures, best).training
    for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert expected(failures, factor * best).training < goodput
    x = best / failures.mtbf
    assert (1 - x) * math.exp(x + failures.save / failures.mtbf) == pytest.approx(1.0)


def test_short_saves_come_near_to_youngs_rule():
    failures = Failures(mtbf=1e6, save=0.5, restart=100.0)
    assert best_interval(failures) == pytest.approx(math.sqrt(2 * failures.save * failures.mtbf), rel=1e-3)
    assert best_interval(Failures(mtbf=1e6, save=0.0, restart=100.0)) == 0.0


def test_a_job_without_failures_pays_for_saves_alone():
    shares = expected(Failures(mtbf=1e15, save=10.0, restart=100.0), 990.0)
    assert shares.training == pytest.approx(0.99) and shares.saving == pytest.approx(0.01)


def test_a_job_that_never_gets_through_says_so():
    hopeless = Failures(mtbf=1.0, save=1000.0, restart=1000.0)
    assert expected(hopeless, 1.0).training == 0.0
    assert simulate(hopeless, 1.0, stretches=10) is None
    assert "never done" in failures_text(1.0, 3600, 1000.0, 1000.0)


def test_one_rank_in_ten_thousand():
    text = failures_text(50_000.0, 10_000, 30.0, 420.0, step=12.0, save_interval=1000)
    assert "so one of 10000 every 5.0 h" in text
    # Of the equation: x = 0.05663 of 18,000 s are 84.9 steps.
    assert "best: 17.0 min = --save-interval 85" in text
    assert "--save-interval as configured: 3.3 h = --save-interval 1000" in text


def test_saves_that_take_no_time_have_no_best_interval():
    assert "none is too many" in failures_text(100.0, 8, 0.0, 60.0)
    assert "--save-interval 1 " in failures_text(100.0, 8, 0.0, 60.0, step=2.0)


@pytest.mark.parametrize(("numbers", "message"), [
    ((0.0, 8, 1.0, 1.0), "mtbf-hours=0"), ((math.nan, 8, 1.0, 1.0), "mtbf-hours=nan"),
    ((1.0, 8, -1.0, 1.0), "--save-seconds -1"), ((1.0, 8, 1.0, math.inf), "--restart-seconds inf"),
])
def test_impossible_numbers_are_refused(numbers, message):
    with pytest.raises(ConfigError, match=message):
        failures_text(*numbers)
    with pytest.raises(ConfigError, match="--step-seconds 0"):
        failures_text(1.0, 8, 1.0, 1.0, step=0.0)


PLAN = ["plan", "configs/gpt_tiny.yaml", "--world-size", "4"]


def test_the_command(capsys):
    words = [*PLAN, "--simulate-failures", "1000", "--save-seconds", "20", "--restart-seconds", "90"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "one of 4 every 10.4 d" in out and "goodput drawn" in out
    assert main(words[:-2]) == 2
    assert "needs --restart-seconds" in capsys.readouterr().err
    assert main([*PLAN, "--save-seconds", "3"]) == 2
    assert "without --simulate-failures, no --save-seconds" in capsys.readouterr().err
