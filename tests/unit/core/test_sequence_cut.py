"""Which positions a context parallel rank holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.errors import ConfigError
from parallel_core.layout.sequence import chunk_ids, cut, held_order, positions, sequence_order

SIZES, LENGTHS = st.integers(1, 8), st.integers(1, 5)


@settings(deadline=None)
@given(SIZES, LENGTHS)
def test_every_position_is_on_one_rank_and_all_have_equal_work(cp: int, each: int) -> None:
    S = 2 * cp * each
    held = [positions(S, cp, rank) for rank in range(cp)]
    assert sorted(np.concatenate(held)) == list(range(S))
    assert len({len(part) for part in held}) == 1
    assert len({int((part + 1).sum()) for part in held}) == 1  # keys that causal attention shows to its queries


@settings(deadline=None)
@given(SIZES, LENGTHS)
def test_what_the_ranks_hold_is_put_in_order_and_back(cp: int, each: int) -> None:
    S = 2 * cp * each
    sequence = np.arange(S)
    held = np.concatenate([cut(sequence, cp, rank, 0) for rank in range(cp)]).reshape(len(held_order(cp)), -1)
    np.testing.assert_array_equal(held[list(sequence_order(cp))].reshape(-1), sequence)
    chunks = sequence.reshape(len(held_order(cp)), -1)
    np.testing.assert_array_equal(chunks[list(held_order(cp))], held)


@settings(deadline=None)
@given(st.sampled_from([(4, 2), (8, 2), (8, 4), (6, 3)]), LENGTHS)
def test_runs_of_ranks_hold_the_zigzag_of_the_ring_over_them(sizes: tuple[int, int], each: int) -> None:
    """A hierarchical exchange needs no cut of its own: a run's chunks, in order, are one rank's of the outer ring."""
    cp, inner = sizes
    S = 2 * cp * each
    for run in range(cp // inner):
        held = np.concatenate([positions(S, cp, run * inner + place) for place in range(inner)])
        in_order = held.reshape(2 * inner, -1)[list(sequence_order(inner))].reshape(-1)
        np.testing.assert_array_equal(in_order, positions(S, cp // inner, run))


def test_the_two_chunks_of_a_rank() -> None:
    assert [chunk_ids(4, rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert positions(8, 2, 0).tolist() == [0, 1, 6, 7] and positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert positions(5, 1, 0).tolist() == [0, 1, 2, 3, 4]


def test_labels_are_shifted_before_the_cut() -> None:
    """A label of a chunk's last token is the first token of the chunk that follows in the sequence, not on the rank."""
    text = np.arange(17)[None]
    tokens, labels = text[:, :-1], text[:, 1:]
    for rank in range(4):
        np.testing.assert_array_equal(cut(labels, 4, rank), cut(tokens, 4, rank) + 1)


@pytest.mark.parametrize(("length", "cp", "near"), [(10, 2, "8 or 12"), (2, 2, "use 4"), (100, 8, "96 or 112")])
def test_a_length_that_does_not_divide_is_refused_with_the_nearest_two(length: int, cp: int, near: str) -> None:
    """Nothing is left out silently at the end of a sequence."""
    with pytest.raises(ConfigError, match=f"seq_length={length} is not a multiple of 2 x .*={cp} = {2 * cp}.*{near}"):
        positions(length, cp, 0)
