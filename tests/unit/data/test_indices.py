from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.data import indices as module
from parallel_core.data.indices import (
    EpochPlan,
    build_document_index,
    build_sample_index,
    build_shuffle_index,
    plan_epochs,
)
from parallel_core.errors import DataError


def walked_sample_index(lengths, order, seq, num_tokens, drop_last, extra):
    """The same index by walking token by token through the documents, as Megatron's helper does."""
    count = (num_tokens - extra) // seq if drop_last else math.ceil((num_tokens - extra) / seq)
    rows, position, offset = [(0, 0)], 0, 0
    while len(rows) <= count:
        remaining = seq + extra
        while True:
            available = lengths[order[position]] - offset
            if remaining <= available:
                offset += remaining - extra
                break
            remaining -= available
            if position == len(order) - 1:
                offset = lengths[order[position]] - extra
                break
            position, offset = position + 1, 0
        rows.append((position, offset))
    return rows


lengths_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda values: values[-1] > 0)


@settings(max_examples=300, deadline=None)
@given(
    lengths=lengths_strategy,
    seq=st.integers(1, 7),
    epochs=st.integers(1, 3),
    extra=st.integers(0, 1),
    drop_last=st.booleans(),
    block=st.sampled_from([1, 3, 1 << 20]),
)
def test_sample_index_equals_the_walk(lengths, seq, epochs, extra, drop_last, block):
    lengths = np.array(lengths, np.int32)
    order = np.tile(np.arange(len(lengths), dtype=np.int32), epochs)
    total = int(lengths.sum())
    if epochs * total <= extra:
        return
    plan = EpochPlan(epochs, total, False, 0)
    original, module._BLOCK = module._BLOCK, block
    try:
        index = build_sample_index(lengths, order, seq, plan, drop_last, extra)
    finally:
        module._BLOCK = original
    assert index.dtype == np.int32
    walked = walked_sample_index(lengths, order, seq, epochs * total, drop_last, extra)
    assert index.tolist() == [list(row) for row in walked]


@given(st.integers(1, 400), st.one_of(st.none(), st.integers(0, 400)), st.integers(1, 40), st.integers(0, 1))
def test_epochs_are_the_fewest_that_suffice(tokens, num_samples, seq, extra):
    try:
        plan = plan_epochs(tokens, num_samples, seq, extra)
    except DataError:
        return
    wanted = 0 if num_samples is None else num_samples * seq + extra
    epochs = 1
    while epochs * tokens < wanted:
        epochs += 1
    assert plan.num_epochs == epochs
    if plan.separate_final_epoch:
        per_epoch = (tokens - extra) // seq
        assert num_samples - ((epochs - 1) * tokens - extra) // seq < int(0.8 * per_epoch)


@pytest.mark.parametrize(("num_samples", "separate"), [(277, True), (278, False)])
def test_separate_final_epoch_threshold(num_samples, separate):
    # 1000 tokens of 10: 99 samples an epoch, int(0.8 * 99) = 79; two epochs hold 199 whole samples
    plan = plan_epochs(1000, num_samples, 10)
    assert plan.num_epochs == 3 and plan.separate_final_epoch is separate
    assert (num_samples - 199 < 79) is separate


def test_no_tokens_is_an_error():
    with pytest.raises(DataError, match="every document of this split is empty"):
        plan_epochs(0, 10, 8)


def test_separate_epoch_is_shuffled_on_its_own():
    documents = np.arange(5, 25, dtype=np.int32)
    index = build_document_index(documents, 3, np.random.RandomState(1), True)
    assert sorted(index[:40]) == sorted([*documents, *documents]) and sorted(index[40:]) == documents.tolist()
    state = np.random.RandomState(1)
    joined, last = np.tile(documents, 2), documents.copy()
    state.shuffle(joined)
    state.shuffle(last)
    assert index.tolist() == [*joined, *last]


def test_shuffle_index_keeps_the_two_ranges_apart():
    index = build_shuffle_index(30, 50, np.random.RandomState(0))
    assert index.dtype == np.uint32
    assert sorted(index[:30]) == list(range(30)) and sorted(index[30:]) == list(range(30, 50))


def test_float32_rounding_of_the_partial_last_sample_is_megatrons():
    # 2^24 + 1 is not a float32: Megatron's helper rounds it to 2^24 before dividing by 1
    assert module.num_samples_in(2**24 + 2, 1, False, 1) == 2**24
    assert module.num_samples_in(2**24 + 2, 1, True, 1) == 2**24 + 1


def test_more_samples_than_tokens_end_at_the_last_token():
    # the walk stops at the last document; further rows repeat its end
    lengths, order = np.array([4, 3], np.int32), np.array([0, 1], np.int32)
    index = build_sample_index(lengths, order, 4, EpochPlan(1, 7, False, 0), False, 1)
    assert index.tolist() == [[0, 0], [1, 0], [1, 2]]
