"""What the host knows of a tensor of document starts: kernels that want numbers need not ask the device for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from mindspore import Tensor

_NAME = "seen_by_host"


class Seen(NamedTuple):
    """What positions see, in numbers.

    Attributes:
        starts: int32 [B, S], the array that the tensor was made of.
        window: how many positions before its own each sees, from the sequence's first on; None: documents.
    """

    starts: np.ndarray
    window: int | None


def remember(start_BS: Tensor, starts: np.ndarray, window: int | None = None) -> Tensor:
    """Return `start_BS`, the first position that each position sees, with what it was made of."""
    setattr(start_BS, _NAME, Seen(starts, window))
    return start_BS


def starts_of(start_BS: Tensor) -> np.ndarray:
    """Return the numbers of a tensor, for which the device is asked where the host does not know them."""
    seen: Seen | None = getattr(start_BS, _NAME, None)
    return start_BS.asnumpy() if seen is None else seen.starts


def window_of(start_BS: Tensor) -> int | None:
    """Return the window that a tensor stands for, or None."""
    seen: Seen | None = getattr(start_BS, _NAME, None)
    return None if seen is None else seen.window


def ends_of(start_BS: Tensor) -> tuple[int, ...] | None:
    """Return where documents end, samples one behind another: n numbers up to B * S, for n documents.

    None where the host does not know, or where what is seen does not begin with a document's first position.
    """
    seen: Seen | None = getattr(start_BS, _NAME, None)
    return None if seen is None or seen.window is not None else _ends(seen.starts)


_last: tuple[np.ndarray, tuple[int, ...] | None] | None = None


def _ends(starts: np.ndarray) -> tuple[int, ...] | None:
    """Return the ends, worked out once for the layers of a microbatch."""
    global _last
    if _last is None or _last[0] is not starts:
        at = np.arange(starts.shape[1], dtype=np.int64)
        begins = starts == at
        right = bool((np.maximum.accumulate(np.where(begins, at, 0), 1) == starts).all())
        firsts = np.flatnonzero(begins)
        _last = starts, (*firsts[1:].tolist(), starts.size) if right else None
    return _last[1]
