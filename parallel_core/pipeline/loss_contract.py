"""What a user's loss function may return: every form of Megatron-LM, brought into one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core.errors import ConfigError

LossResult = tuple[Tensor, Tensor, dict[str, tuple[Any, Any]]]
"""Sum of the loss, number of tokens (float32), and {name: (sum, number)} to report."""

_FORMS = (
    "loss_func must return (sum of the loss, number of tokens, {name: (sum, number)}) or (mean loss, {name: value})"
)


def checked_loss(result: Any) -> LossResult:
    """Return a loss function's result in its three-part form.

    Args:
        result: `(sum, number of tokens, report)`, or `(mean, report)`, whose number is 1. A reported value is a pair
            (sum, number), a tensor of these two, or one number, which counts once.

    Raises:
        ConfigError: if it is anything else; the part and its shape or type are named.
    """
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        length = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise ConfigError(f"{_FORMS}, got {_kind(result)}{length}")
    loss, report = result[0], result[-1]
    if not isinstance(loss, Tensor) or loss.size != 1:
        raise ConfigError(f"{_FORMS}; its loss is {_kind(loss)}, not one number: sum it, as in (loss * mask).sum()")
    if not isinstance(report, Mapping):
        raise ConfigError(f"{_FORMS}; its report is {_kind(report)}")
    tokens = _number(result[1], "number of tokens") if len(result) == 3 else 1.0
    if not isinstance(tokens, Tensor):
        tokens = Tensor(np.float32(tokens))
    pairs = {str(name): _pair(value, f"report[{name!r}]") for name, value in report.items()}
    tokens = tokens if tokens.dtype == ms.float32 else tokens.astype(ms.float32)
    return (loss if loss.shape == () else loss.reshape(())), tokens, pairs


def collects_non_loss_data(loss_func: Callable[..., Any]) -> bool:
    """Tell whether a loss function takes `non_loss_data`, as Megatron-LM's contract for such data has it."""
    if isinstance(loss_func, nn.Cell):  # any Cell seems to take anything
        return "non_loss_data" in inspect.signature(loss_func.construct).parameters
    accepted = inspect.signature(loss_func).parameters
    return "non_loss_data" in accepted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())


def _pair(value: Any, what: str) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return _number(value[0], f"{what}[0]"), _number(value[1], f"{what}[1]")
    if isinstance(value, Tensor) and value.size == 2:
        flat = value.reshape(-1)
        return flat[0], flat[1]
    return _number(value, what), 1.0


def _number(value: Any, what: str) -> Any:
    if (isinstance(value, Tensor) and value.size == 1) or isinstance(value, (int, float, np.number)):
        return value if not isinstance(value, Tensor) or value.shape == () else value.reshape(())
    raise ConfigError(f"{_FORMS}; its {what} is {_kind(value)}, not one number")


def _kind(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
