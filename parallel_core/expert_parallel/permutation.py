"""Rows in the order of experts, and back. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Permutation:
    """How assignments of tokens to experts stand in rows, those of one expert together, tokens in order.

    Attributes:
        tokens: int32 [N], the token of each row; -1: an empty row.
        slots: int32 [N], the assignment of each row, token * K + k; -1: an empty row.
        rows: int32 [T, K], the row of each assignment; -1: it has none.
        counts: int64 [E], rows of each expert.
    """

    tokens: np.ndarray
    slots: np.ndarray
    rows: np.ndarray
    counts: np.ndarray


def permute(experts: np.ndarray, kept: np.ndarray, first: int, number: int, capacity: int | None = None) -> Permutation:
    """Return the rows of experts [first, first + number).

    Args:
        experts: int [T, K].
        kept: bool [T, K]; the others have no row.
        first: number of the first expert.
        number: how many.
        capacity: give every expert so many rows, empty ones at the end; None: as many as it has.
    """
    T, K = experts.shape
    here = kept & (experts >= first) & (experts < first + number)
    key = np.where(here, experts - first, number).astype(np.int16 if number < 2**15 else np.int64).reshape(-1)
    counts = np.bincount(key, minlength=number + 1)[:number].astype(np.int64)
    order = np.argsort(key, kind="stable")[: int(counts.sum())].astype(np.int32)
    places = np.arange(len(order), dtype=np.int32)
    slots = order
    if capacity is not None:
        shift = np.arange(number) * capacity - np.concatenate(([0], np.cumsum(counts)[:-1]))
        places = (places + np.repeat(shift, counts)).astype(np.int32)
        slots = np.full(number * capacity, -1, np.int32)
        slots[places] = order
        counts = np.full(number, capacity, np.int64)
    rows = np.full(T * K, -1, np.int32)
    rows[order] = places
    tokens = np.where(slots < 0, -1, slots // K).astype(np.int32)
    return Permutation(tokens, slots, rows.reshape(T, K), counts)


def for_ranks(order: Permutation, ranks: int, copies: int) -> Permutation:
    """Return the rows for `ranks` x `copies` ranks: those of each share of the experts, `copies` times in a row.

    Args:
        order: rows in the order of all experts.
        ranks: shares that the experts are cut into.
        copies: ranks of each expert, all of which get its rows.
    """
    if copies == 1:
        return order
    lengths = order.counts.reshape(ranks, -1).sum(1)
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    rows = np.full((*order.rows.shape, copies), -1, np.int32)
    there = order.rows >= 0
    share = np.searchsorted(np.cumsum(lengths), order.rows, side="right")
    share = np.minimum(share, ranks - 1)
    for copy in range(copies):
        moved = order.rows + starts[share] * (copies - 1) + copy * lengths[share]
        rows[..., copy] = np.where(there, moved, -1)
    pieces = [slice(start, start + length) for start, length in zip(starts, lengths)]
    tokens, slots = (
        np.concatenate([np.tile(array[piece], copies) for piece in pieces]) for array in (order.tokens, order.slots)
    )
    counts = np.repeat(order.counts.reshape(ranks, 1, -1), copies, 1).reshape(-1)
    return Permutation(tokens, slots, rows.reshape(len(order.rows), -1), counts)


def by_expert(counts: np.ndarray) -> np.ndarray:
    """Return which row stands where when rows by (rank, expert) are put in the order (expert, rank), int32 [N].

    Args:
        counts: int64 [ranks, experts].
    """
    expert = np.repeat(np.tile(np.arange(counts.shape[1]), counts.shape[0]), counts.reshape(-1))
    return np.argsort(expert, kind="stable").astype(np.int32)
