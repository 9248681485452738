"""MindFormers' learning rates in Megatron's words."""

from __future__ import annotations

from typing import Any

from parallel_core.errors import ConfigError

_STYLES = {
    "polynomial": "linear", "PolynomialWithWarmUpLR": "linear", "linear": "linear", "LinearWithWarmUpLR": "linear",
    "cosine": "cosine", "CosineWithWarmUpLR": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "ConstantWarmUpLR": "constant",
}  # fmt: skip
_LAST = {"polynomial": 1e-7, "PolynomialWithWarmUpLR": 1e-7}
"""What `lr_end` is where nothing says it; of the others 0."""


def schedule_arguments(
    kind: str,
    learning_rate: float,
    lr_end: float | None = None,
    warmup_steps: int = 0,
    warmup_ratio: float | None = None,
    warmup_lr_init: float = 0.0,
    total_steps: int | None = None,
    power: float = 1.0,
    num_cycles: float = 0.5,
) -> dict[str, Any]:
    """Return the arguments by name of one of their schedules.

    There the warm-up has at least one step, so that the first update is made with learning rate 0 (or
    `warmup_lr_init`), and a polynomial falls over as many steps as are left without it.

    Args:
        kind: `lr_schedule.type`.
        learning_rate: the highest.
        lr_end: the last; None: their default.
        warmup_steps: steps in which it grows.
        warmup_ratio: of all steps, those in which it grows; in place of `warmup_steps`.
        warmup_lr_init: the first.
        total_steps: at which it ends; None: those of the run, which are not known yet.
        power: of a polynomial; 1.
        num_cycles: of a cosine; half a wave.

    Raises:
        ConfigError: there is no such schedule here.
    """
    style = _STYLES.get(kind)
    if style is None:
        raise ConfigError(f"lr_schedule.type {kind!r}: give one of {', '.join(_STYLES)}")
    if power != 1.0:
        raise ConfigError(f"lr_schedule.power {power}: not built: polynomials other than straight lines")
    if num_cycles != 0.5:
        raise ConfigError(f"lr_schedule.num_cycles {num_cycles}: not built: cosines of other than half a wave")
    is_polynomial = kind in _LAST
    found: dict[str, Any] = {"lr": learning_rate, "lr_decay_style": style}
    if warmup_lr_init:
        found["lr_warmup_init"] = warmup_lr_init
    if style != "constant":
        ends_at = _LAST.get(kind, 0.0) if lr_end is None else lr_end
        found["min_lr"] = 0.0 if style == "linear" and not is_polynomial else ends_at
    if warmup_ratio is not None and total_steps is None:
        return {**found, "lr_warmup_fraction": warmup_ratio}
    if warmup_ratio is not None and total_steps is not None:
        warmup_steps = int(total_steps * warmup_ratio)
    grows = max(1, warmup_steps)
    if total_steps is None or total_steps > grows:
        found["lr_warmup_iters"] = grows
    if total_steps is not None:
        found["lr_decay_iters"] = total_steps + (grows - warmup_steps if is_polynomial else 0)
    return found
