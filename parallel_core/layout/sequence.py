"""Which positions of a sequence a context parallel rank holds. Pure NumPy; the only place that knows the cut.

Megatron-LM's zigzag: S positions in 2 * CP equal chunks, of which rank r holds numbers r and 2 * CP - 1 - r, in that
order. Under a causal mask every rank then has equal work. The cut is the same for every exchange of keys and values,
for the batch, the rotary tables, the learned positions and attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parallel_core.errors import ConfigError

EXCHANGES = ("p2p", "all_gather", "a2a", "a2a+p2p")
"""How a rank's queries meet the other ranks' keys (see `context_parallel.attention`), in Megatron-LM's words."""


def check_length(seq_length: int, cp_size: int) -> None:
    """Return if a sequence can be cut.

    Raises:
        ConfigError: if it cannot; the two nearest lengths that can are named.
    """
    step = 2 * cp_size
    if cp_size > 1 and seq_length % step:
        below, above = seq_length // step * step, (seq_length // step + 1) * step
        raise ConfigError(
            f"seq_length={seq_length} is not a multiple of 2 x context_parallel_size={cp_size} = {step}: each rank "
            f"holds two of {step} equal chunks; use {f'{below} or {above}' if below else above}"
        )


def chunk_ids(cp_size: int, cp_rank: int) -> tuple[int, ...]:
    """Return the chunks that a rank holds, in its order, of the `2 * cp_size` that there are (of one without a cut)."""
    return (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,)


def chunk_length(local_length: int, cp_size: int) -> int:
    """Return the length of one chunk, where each rank holds `local_length` positions."""
    return local_length // 2 if cp_size > 1 else local_length


def positions(seq_length: int, cp_size: int, cp_rank: int) -> np.ndarray:
    """Return the positions that a rank holds, int64 [S / CP], in its order.

    >>> positions(8, 2, 0), positions(8, 2, 1)
    (array([0, 1, 6, 7]), array([2, 3, 4, 5]))
    """
    check_length(seq_length, cp_size)
    length = chunk_length(seq_length // cp_size, cp_size)
    return np.concatenate([np.arange(i * length, (i + 1) * length) for i in chunk_ids(cp_size, cp_rank)])


def cut(array: np.ndarray, cp_size: int, cp_rank: int, dim: int = 1) -> np.ndarray:
    """Return a rank's part of `array`, whose dim `dim` is the sequence."""
    if cp_size == 1:
        return array
    return np.ascontiguousarray(np.take(array, positions(array.shape[dim], cp_size, cp_rank), dim))


def sequence_order(cp_size: int) -> tuple[int, ...]:
    """Return where the chunks of the sequence, first to last, stand when the ranks' parts are put one behind the other.

    >>> sequence_order(2)  # the ranks hold chunks 0, 3 and 1, 2
    (0, 2, 3, 1)
    """
    held = held_order(cp_size)
    return tuple(held.index(chunk) for chunk in range(len(held)))


def held_order(cp_size: int) -> tuple[int, ...]:
    """Return the chunks in the order in which ranks 0..CP-1 hold them: the inverse of `sequence_order`."""
    return tuple(chunk for rank in range(cp_size) for chunk in chunk_ids(cp_size, rank))


def reorder(array: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Return `array` with its rows, cut into `len(order)` equal chunks, in another order (NumPy arrays and views)."""
    length = array.shape[0] // len(order)
    return np.concatenate([array[i * length : (i + 1) * length] for i in order])
