from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.data.blending import (
    _GreedyBlend,
    build_blending_indices,
    build_exhaustive_blending_indices,
    sample_numbers,
)
from parallel_core.errors import DataError


def stepwise(weights, size, available=None):
    """The definition, one Python float at a time."""
    counts, chosen = [0] * len(weights), []
    for step in range(size):
        best, best_error = -1, -float("inf")
        for dataset, weight in enumerate(weights):
            error = weight * max(float(step), 1.0) - float(counts[dataset])
            if (available is None or counts[dataset] < available[dataset]) and error > best_error:
                best, best_error = dataset, error
        chosen.append(best)
        counts[best] += 1
    return chosen


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 3000), st.booleans())
def test_blend_equals_the_definition(parts, size, irrational):
    weights = np.sqrt(parts) if irrational else np.array(parts, float)
    weights = (weights / weights.sum()).tolist()
    dataset_index, sample_index = build_blending_indices(weights, size)
    assert dataset_index.tolist() == stepwise(weights, size)
    assert sample_index.tolist() == sample_numbers(dataset_index, len(weights)).tolist()


@pytest.mark.parametrize("count", [39, 41, 90])
def test_blends_of_many_datasets(count):
    weights = np.sqrt(np.arange(2, count + 2))
    weights = (weights / weights.sum()).tolist()
    assert build_blending_indices(weights, 2000)[0].tolist() == stepwise(weights, 2000)


def test_a_zero_weight_is_never_chosen_after_all_have_had_a_turn():
    weights = [0.5, 0.0, 0.5]
    assert build_blending_indices(weights, 500)[0].tolist() == stepwise(weights, 500)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_exhaustive_blend_takes_every_sample_once(sizes):
    total = sum(sizes)
    dataset_index, sample_index = build_exhaustive_blending_indices(sizes)
    assert dataset_index.tolist() == stepwise([size / max(total, 1) for size in sizes], total, sizes)
    for dataset, size in enumerate(sizes):
        assert sample_index[dataset_index == dataset].tolist() == list(range(size))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 300)), min_size=1, max_size=6))
def test_a_used_up_dataset_is_not_chosen_again(parts):
    weights = np.array([weight for weight, _ in parts], float)
    weights = (weights / weights.sum()).tolist()
    available = [count for _, count in parts]
    chosen = _GreedyBlend(np.array(weights), sum(available), np.array(available, np.int64)).run()
    assert chosen.tolist() == stepwise(weights, sum(available), available)


def test_too_many_datasets_for_int16_are_refused():
    with pytest.raises(DataError, match="at most 32767"):
        build_blending_indices([1 / 40000] * 40000, 1)
