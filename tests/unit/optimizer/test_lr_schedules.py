"""Learning rate and weight decay against the formulas, written down a second time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.errors import ConfigError
from parallel_core.optimizer.loss_scaler import DynamicLossScaler, LossScaler
from parallel_core.optimizer.schedules import (
    LR_STYLES,
    WEIGHT_DECAY_STYLES,
    WSD_STYLES,
    OptimizerParamScheduler,
    ScheduleShape,
)

INIT, HIGH, LOW = 1e-6, 1e-3, 1e-4


def shape(style: str, warmup: float = 20, decay: int = 100, wsd: int = 30, wsd_style: str = "linear") -> ScheduleShape:
    return ScheduleShape(
        init_lr=INIT,
        max_lr=HIGH,
        min_lr=LOW,
        warmup_samples=warmup,
        decay_samples=decay,
        lr_style=style,
        wsd_samples=wsd,
        wsd_style=wsd_style,
    )


def expected(style: str, n: int, W: float, D: int, wsd: int, wsd_style: str) -> float:
    """The table of OptimizerParamScheduler, line by line."""
    if W > 0 and (n < W or (n == W and style != "cosine-from-zero")):
        return INIT + (HIGH - INIT) * n / W
    if style == "constant":
        return HIGH
    if n > D:
        return LOW
    if style == "inverse-square-root":
        return max(LOW, HIGH * max(W, 1) ** 0.5 / max(n, 1) ** 0.5)
    if style == "cosine-from-zero":
        return LOW + 0.5 * (math.cos(math.pi * n / D) + 1) * (HIGH - LOW)
    r = (n - W) / (D - W)
    if style == "linear":
        share = 1 - r
    elif style == "cosine":
        share = 0.5 * (math.cos(math.pi * r) + 1)
    elif n <= D - wsd:
        share = 1.0
    else:
        q = (n - (D - wsd)) / wsd
        share = {
            "linear": 1 - q,
            "cosine": 0.5 * (math.cos(math.pi * q) + 1),
            "exponential": 2 * 0.5**q - 1,
            "minus_sqrt": 1 - q**0.5,
        }[wsd_style]
    return LOW + share * (HIGH - LOW)


@pytest.mark.parametrize("style", LR_STYLES)
@pytest.mark.parametrize("warmup", [0, 20, 12.5])
def test_every_style_follows_its_formula(style: str, warmup: float) -> None:
    for wsd_style in WSD_STYLES if style == "WSD" else ("linear",):
        for n in range(0, 131):
            got = shape(style, warmup, wsd_style=wsd_style).lr(n)
            assert got == pytest.approx(expected(style, n, warmup, 100, 30, wsd_style), rel=1e-12), (n, wsd_style)


def test_the_corners_have_the_values_one_expects() -> None:
    for style in ("linear", "cosine", "WSD"):
        of = shape(style)
        assert (of.lr(0), of.lr(20), of.lr(101)) == (INIT, HIGH, LOW)
        assert of.lr(100) == pytest.approx(LOW)
    assert shape("linear").lr(60) == pytest.approx((HIGH + LOW) / 2)
    assert shape("WSD").lr(70) == HIGH
    assert shape("constant").lr(10**9) == HIGH


def test_a_group_with_limits_of_its_own_has_its_own_curve() -> None:
    """Decoupled learning rates share the warm-up's first value."""
    of = shape("linear")
    assert of.lr(0, 3e-3, 1e-3) == INIT
    assert of.lr(60, 3e-3, 1e-3) == pytest.approx(2e-3)


@pytest.mark.parametrize("style", WEIGHT_DECAY_STYLES)
def test_weight_decay_follows_its_formula(style: str) -> None:
    of = ScheduleShape(0, HIGH, LOW, 0, 100, start_wd=0.02, end_wd=0.1, wd_samples=50, wd_style=style)
    for n in range(0, 70):
        ratio = min(n / 50, 1.0)
        share = {"constant": 1.0, "linear": ratio, "cosine": 0.5 * (math.cos(math.pi * (1 - ratio)) + 1)}[style]
        assert of.weight_decay(n) == pytest.approx(0.02 + share * 0.08, rel=1e-12)


@settings(deadline=None)
@given(st.sampled_from(LR_STYLES), st.integers(0, 50), st.integers(1, 200), st.integers(0, 400))
def test_the_learning_rate_stays_between_its_limits(style: str, warmup: int, rest: int, n: int) -> None:
    of = shape(style, warmup, warmup + rest, wsd=max(1, rest // 2))
    assert min(INIT, LOW) <= of.lr(n) <= HIGH * (1 + 1e-12)


def test_unknown_styles_are_refused_by_key() -> None:
    for name, options in (
        ("lr_decay_style='exp'", {"lr_style": "exp"}),
        ("lr_wsd_decay_style='sqrt'", {"wsd_style": "sqrt"}),
        ("weight_decay_incr_style='up'", {"wd_style": "up"}),
    ):
        with pytest.raises(ConfigError, match=name):
            ScheduleShape(0, 1, 0, 0, 1, **options)  # type: ignore[arg-type]


def test_the_scheduler_counts_samples_and_resumes() -> None:
    """From weights alone, too; a definition that differs from the checkpoint's is named, field by field."""
    scheduler = OptimizerParamScheduler(shape("linear"))
    assert scheduler.get_lr() == INIT
    for _ in range(3):
        scheduler.step(8)
    assert scheduler.get_lr() == shape("linear").lr(24)
    state = scheduler.state_dict()
    again = OptimizerParamScheduler(shape("linear"))
    again.load_state_dict(state)
    assert (again.num_samples, again.get_lr()) == (24, scheduler.get_lr())
    other = OptimizerParamScheduler(shape("cosine", decay=200))
    with pytest.raises(ConfigError, match=r"(?s)lr_decay_steps: checkpoint 100, this run 200.*lr_decay_style"):
        other.load_state_dict(state)
    other.load_state_dict(state, override=True)
    assert (other.num_samples, other.shape.lr_style) == (24, "cosine")
    other.load_state_dict(state, use_checkpoint=True)
    assert other.shape == scheduler.shape
    few = {"num_steps": 5, "max_lr": HIGH}
    again.load_state_dict(few)
    assert again.num_samples == 5


# ---- loss scale -----------------------------------------------------------------------------------------------------
class MegatronScaler:
    """The rule of Megatron-LM's dynamic scaler, as described: growth after a clean interval, hysteresis on overflow."""

    def __init__(self, scale: float, low: float, interval: int, hysteresis: int) -> None:
        self.scale, self.low, self.interval, self.hysteresis = scale, low, interval, hysteresis
        self.growth, self.left = 0, hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self.growth = 0
            self.left -= 1
            if self.left <= 0:
                self.scale = max(self.scale / 2, self.low)
        else:
            self.growth += 1
            if self.growth == self.interval:
                self.growth, self.left = 0, self.hysteresis
                self.scale *= 2


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_the_dynamic_scale_is_megatrons(overflows: list[bool], window: int, hysteresis: int) -> None:
    """Growth, back-off, hysteresis and the minimum, update by update; a scale that never moves is no dynamic one."""
    mine, theirs = DynamicLossScaler(16.0, 1.0, window, hysteresis), MegatronScaler(16.0, 1.0, window, hysteresis)
    for place, found_inf in enumerate(overflows):
        mine.update(found_inf)
        theirs.update(found_inf)
        assert mine.scale == theirs.scale
        if place == len(overflows) // 2:
            state = mine.state_dict()
            mine = DynamicLossScaler(1.0, 1.0, window, hysteresis)
            mine.load_state_dict(state)


def test_hysteresis_is_not_refilled_by_a_clean_iteration() -> None:
    """Two overflows far apart halve the scale, unless it has doubled in between."""
    scaler = DynamicLossScaler(16.0, 1.0, 1000, 2)
    for found_inf in (True, False, False, True):
        scaler.update(found_inf)
    assert scaler.scale == 8.0


def test_a_constant_scale_stays() -> None:
    scaler = LossScaler(8.0)
    for found_inf in (True, False):
        scaler.update(found_inf)
    assert scaler.scale == 8.0
