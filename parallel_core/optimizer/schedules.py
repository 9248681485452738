"""Learning rate and weight decay as functions of the samples seen. Pure Python.

Source: Megatron-LM's OptimizerParamScheduler. All lengths count samples, not iterations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from parallel_core.errors import ConfigError

LR_STYLES = ("constant", "linear", "cosine", "cosine-from-zero", "inverse-square-root", "WSD")
WSD_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")
WEIGHT_DECAY_STYLES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class ScheduleShape:
    """The definition of both schedules.

    Attributes:
        init_lr: learning rate at the first sample of the warm-up.
        max_lr: learning rate at its end.
        min_lr: learning rate that the decay ends at.
        warmup_samples: length of the warm-up.
        decay_samples: where the decay ends, counted from sample 0.
        lr_style: constant, linear, cosine, cosine-from-zero (PanGu-alpha's, whose cosine begins with the warm-up),
            inverse-square-root or WSD.
        wsd_samples: length of the WSD tail.
        wsd_style: shape of the WSD tail: linear, cosine, exponential or minus_sqrt.
        start_wd: weight decay at sample 0.
        end_wd: weight decay at `wd_samples`.
        wd_samples: length of the weight decay's change.
        wd_style: constant, linear or cosine.
    """

    init_lr: float
    max_lr: float
    min_lr: float
    warmup_samples: float
    decay_samples: int
    lr_style: str = "linear"
    wsd_samples: int = 0
    wsd_style: str = "exponential"
    start_wd: float = 0.0
    end_wd: float = 0.0
    wd_samples: int = 1
    wd_style: str = "constant"

    def __post_init__(self) -> None:
        for value, allowed, key in (
            (self.lr_style, LR_STYLES, "lr_decay_style"),
            (self.wsd_style, WSD_STYLES, "lr_wsd_decay_style"),
            (self.wd_style, WEIGHT_DECAY_STYLES, "weight_decay_incr_style"),
        ):
            if value not in allowed:
                raise ConfigError(f"{key}={value!r} does not exist; use {', '.join(allowed)}")

    def lr(self, samples: int, max_lr: float | None = None, min_lr: float | None = None) -> float:
        """Return the learning rate of the update after `samples` samples, for groups with limits of their own too."""
        high = self.max_lr if max_lr is None else max_lr
        low = self.min_lr if min_lr is None else min_lr
        warmup = self.warmup_samples
        # The other styles are at their maximum where the warm-up ends; this one has come down by then.
        from_zero = self.lr_style == "cosine-from-zero"
        if warmup > 0 and (samples < warmup or (samples == warmup and not from_zero)):
            return self.init_lr + (high - self.init_lr) * samples / warmup
        if self.lr_style == "constant":
            return high
        if samples > self.decay_samples:
            return low
        if self.lr_style == "inverse-square-root":
            return max(low, high * math.sqrt(max(warmup, 1)) / math.sqrt(max(samples, 1)))
        return low + self._decay(samples) * (high - low)

    def weight_decay(self, samples: int) -> float:
        """Return the weight decay of the update after `samples` samples."""
        if samples >= self.wd_samples:
            return self.end_wd
        if self.wd_style == "constant":
            return self.end_wd
        ratio = samples / self.wd_samples
        share = ratio if self.wd_style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1)
        return self.start_wd + share * (self.end_wd - self.start_wd)

    def _decay(self, samples: int) -> float:
        if self.lr_style == "WSD":
            start = self.decay_samples - self.wsd_samples
            if samples <= start:
                return 1.0
            done = (samples - start) / self.wsd_samples
            return {
                "linear": 1 - done,
                "cosine": 0.5 * (math.cos(math.pi * done) + 1),
                "exponential": 2 * 0.5**done - 1,
                "minus_sqrt": 1 - math.sqrt(done),
            }[self.wsd_style]
        first = 0 if self.lr_style == "cosine-from-zero" else self.warmup_samples
        length = self.decay_samples - first
        done = (samples - first) / length if length else 1.0
        return 1 - done if self.lr_style == "linear" else 0.5 * (math.cos(math.pi * done) + 1)


class OptimizerParamScheduler:
    """A `ScheduleShape` and a position in it; advances only after updates that were made."""

    def __init__(self, shape: ScheduleShape) -> None:
        self.shape = shape
        self.num_samples = 0

    def step(self, samples: int) -> None:
        """Advance by the samples of one iteration."""
        self.num_samples += samples

    def get_lr(self, max_lr: float | None = None, min_lr: float | None = None) -> float:
        """Return the learning rate of the next update."""
        return self.shape.lr(self.num_samples, max_lr, min_lr)

    def get_wd(self) -> float:
        """Return the weight decay of the next update."""
        return self.shape.weight_decay(self.num_samples)

    def state_dict(self) -> dict[str, Any]:
        """Return the definition and the position, under the keys of Megatron-LM's checkpoints."""
        definition = {key: getattr(self.shape, field) for field, key in _STATE_KEYS.items()}
        return {**definition, "num_steps": self.num_samples}

    def load_state_dict(self, state: dict[str, Any], *, use_checkpoint: bool = False, override: bool = False) -> None:
        """Take the position of a checkpoint.

        Args:
            state: what `state_dict` returned, or Megatron-LM's (which lacks some keys; those are not compared).
            use_checkpoint: take its definition too (--use-checkpoint-opt_param-scheduler).
            override: keep this run's definition (--override-opt_param-scheduler).

        Raises:
            ConfigError: if neither is set and the definitions differ; every difference is named.
        """
        saved = {field: state[key] for field, key in _STATE_KEYS.items() if key in state}
        here = asdict(self.shape)
        different = [field for field, value in saved.items() if here[field] != value]
        if use_checkpoint:
            self.shape = ScheduleShape(**{**here, **saved})
        elif different and not override:
            lines = [f"  {_STATE_KEYS[f]}: checkpoint {saved[f]!r}, this run {here[f]!r}" for f in different]
            raise ConfigError(
                "the schedule differs from the checkpoint's:\n" + "\n".join(lines) + "\n"
                "use --override-opt_param-scheduler to take this run's, or --use-checkpoint-opt_param-scheduler to "
                "take the checkpoint's"
            )
        self.num_samples = int(state["num_steps"])


_STATE_KEYS = {
    "init_lr": "init_lr",
    "max_lr": "max_lr",
    "min_lr": "min_lr",
    "warmup_samples": "lr_warmup_steps",
    "decay_samples": "lr_decay_steps",
    "lr_style": "lr_decay_style",
    "wsd_samples": "wsd_decay_steps",
    "wsd_style": "lr_wsd_decay_style",
    "start_wd": "start_wd",
    "end_wd": "end_wd",
    "wd_samples": "wd_incr_steps",
    "wd_style": "wd_incr_style",
}
"""Field of `ScheduleShape` -> its key in a checkpoint; Megatron-LM calls samples steps."""
