"""What layers are called with, refused where a kernel would read other numbers without a word."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.errors import ConfigError

_FLOATS = ms.float32, ms.bfloat16, ms.float16, ms.float64


def check_features(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Refuse an input that a linear layer's weight cannot be multiplied by.

    Raises:
        ConfigError: there is no weight, or its columns (or the bias) are of another number than the features.
    """
    if weight is None:
        raise ConfigError(
            "a linear layer with skip_weight_param_allocation=True owns no weight: call it as layer(x, weight)"
        )
    shard = getattr(weight, "shard", None)
    name = "the given weight" if shard is None else shard.name
    if x.dtype not in _FLOATS:
        raise ConfigError(f"{name}: the input is {x.dtype}; give floating-point numbers")
    shape = weight.shape
    if len(shape) != 2 or x.shape[-1:] != shape[-1:]:
        raise ConfigError(
            f"{name} is {list(shape)} on this rank, so the layer takes [.., {shape[-1]}]; it is given {list(x.shape)}"
        )
    if bias is not None and bias.shape[0] != shape[0]:
        raise ConfigError(f"{name} has {shape[0]} rows on this rank, the layer's bias has {bias.shape[0]}")


def check_ids(ids: Tensor, rows: int, table: str) -> None:
    """Refuse ids that a table has no row for, which would give zeros; on CPU, where looking costs no wait for a device.

    Raises:
        ConfigError: there are such ids.
    """
    if ms.get_context("device_target") != "CPU" or not ids.size:
        return
    outside = id_outside(ids.asnumpy(), rows)
    if outside is not None:
        raise ConfigError(f"{table} has the rows 0 to {rows - 1}; it is asked for {outside}")


def id_outside(ids: np.ndarray, rows: int) -> int | None:
    """Return an id that a table of so many rows has no row for; None: there is none. `ids` is not empty."""
    low, high = int(ids.min()), int(ids.max())
    return high if high >= rows else low if low < 0 else None


def check_targets(logits: Tensor, target: Tensor, label_smoothing: float) -> None:
    """Refuse targets in another order than the logits, such as [B, S] for [S, B, V].

    Raises:
        ConfigError: the shapes do not belong together, or the smoothing is outside of [0, 1).
    """
    if target.shape != logits.shape[:-1]:
        raise ConfigError(
            f"the targets of logits {list(logits.shape)} have the shape {list(logits.shape[:-1])}; they are given as "
            f"{list(target.shape)}"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"label_smoothing={label_smoothing}: give a number from 0 up to, but not, 1")


def equal_part(x: Tensor, size: int, dim: int) -> int:
    """Return the length of one of `size` equal parts of `x` along `dim`.

    Raises:
        ConfigError: there are no equal parts.
    """
    length = x.shape[dim]
    if length % size:
        raise ConfigError(f"dim {dim} of a tensor {list(x.shape)} cannot be cut over {size} ranks: give a multiple")
    return int(length // size)
