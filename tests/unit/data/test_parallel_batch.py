from __future__ import annotations

import numpy as np
import pytest

from parallel_core.data import TensorParallelBatches, stage_needs_data
from parallel_core.data.parallel_batch import pack_batch, unpack_batch
from parallel_core.errors import DataError


def batch(value, document_start=True):
    ids = np.full((2, 3), value, np.int32)
    content = {"tokens": ids, "labels": ids + 1, "loss_mask": np.full((2, 3), 0.5, np.float32), "position_ids": ids + 2}
    return {**content, "document_start": ids + 3} if document_start else content


def group(source, size, has_document_start):
    """The readers of a tensor parallel group, driven in lockstep: the first rank's message goes to all."""
    sent = []

    def send(message):
        sent.append(message.copy())
        return message

    def receive(message):
        assert message.shape == sent[-1].shape and message.dtype == np.int32
        return sent[-1]

    shape = {"micro_batch_size": 2, "sequence_length": 3, "has_document_start": has_document_start}
    return [TensorParallelBatches(source, send, **shape)] + [
        TensorParallelBatches(None, receive, **shape) for _ in range(size - 1)
    ]


@pytest.mark.parametrize("has_document_start", [True, False])
def test_every_rank_gets_what_the_first_one_read(has_document_start):
    readers = group(iter([batch(5, has_document_start), batch(9, has_document_start)]), 3, has_document_start)
    for value in (5, 9):
        for received in [next(reader) for reader in readers]:
            expected = batch(value, has_document_start)
            assert received.keys() == expected.keys()
            for name in expected:
                assert received[name].dtype == expected[name].dtype and np.array_equal(received[name], expected[name])
    for reader in readers:
        with pytest.raises(StopIteration):
            next(reader)


def test_a_failure_to_read_reaches_every_rank():
    def failing():
        raise OSError("disk gone")
        yield

    first, second = group(failing(), 2, False)
    with pytest.raises(OSError, match="disk gone"):
        next(first)
    with pytest.raises(DataError, match="could not read"):
        next(second)


def test_a_batch_of_another_shape_is_refused():
    with pytest.raises(DataError, match="is not 4 arrays of 2 x 4"):
        unpack_batch(pack_batch(batch(1, False)), 2, 4, False)


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True), (True, True), (False, False)])
def test_stages_that_read_data(first, last):
    assert stage_needs_data(first, last) is (first or last)
    assert stage_needs_data(first, last, reset_attention_mask=True)
