"""Loss scaling for float16: constant, or Megatron-LM's dynamic scale with hysteresis. Pure Python."""

from __future__ import annotations

from typing import Any

from parallel_core.errors import ParallelCoreError


class LossScaler:
    """A constant scale; overflows do not change it."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def update(self, found_inf: bool) -> None:
        """Take note of whether this iteration's gradients overflowed."""

    def require_progress(self) -> None:
        """Never refuse: overflows are skipped because the user asks for that, or are errors already."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save."""
        return {"scale": self.scale}


class DynamicLossScaler(LossScaler):
    """Doubles after `window` iterations without overflow, halves after `hysteresis` iterations with one.

    Args:
        initial_scale: first scale.
        min_scale: the scale never falls below this.
        window: iterations without overflow before it doubles.
        hysteresis: overflows that it takes to halve; counted down until the scale next doubles.
    """

    STUCK_AFTER = 2
    """Overflows in a row at `min_scale`, once `hysteresis` is used up, that end the run: one may be a bad batch."""

    def __init__(self, initial_scale: float, min_scale: float, window: int, hysteresis: int) -> None:
        super().__init__(initial_scale)
        self._min_scale, self._window, self._hysteresis = min_scale, window, hysteresis
        self._clean, self._tolerance, self._stuck = 0, hysteresis, 0

    def update(self, found_inf: bool) -> None:
        """Take note of whether this iteration's gradients overflowed."""
        if found_inf:
            self._clean = 0
            self._tolerance -= 1
            if self._tolerance <= 0:
                self._stuck = self._stuck + 1 if self.scale <= self._min_scale else 0
                self.scale = max(self.scale * 0.5, self._min_scale)
            return
        self._clean, self._stuck = self._clean + 1, 0
        if self._clean == self._window:
            self._clean, self._tolerance = 0, self._hysteresis
            self.scale *= 2.0

    def require_progress(self) -> None:
        """Refuse to go on when gradients overflow again and again and the scale cannot fall: no update is ever made.

        Raises:
            ParallelCoreError: after `STUCK_AFTER` such iterations in a row.
        """
        if self._stuck >= self.STUCK_AFTER:
            raise ParallelCoreError(
                f"the gradients overflow float16 {self._stuck} times in a row at loss scale {self.scale:g}, which "
                f"--min-loss-scale {self._min_scale:g} keeps from falling: no update can be made. Look at the data and "
                "at --lr (a model that has diverged has no finite gradients), or train with --bf16."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save."""
        return {"scale": self.scale, "growth_tracker": self._clean, "hysteresis_tracker": self._tolerance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state."""
        self.scale = float(state["scale"])
        self._clean = int(state["growth_tracker"])
        self._tolerance = int(state.get("hysteresis_tracker", self._hysteresis))
