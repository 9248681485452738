from __future__ import annotations

import os
import pathlib
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_core.data import IndexedDataset, IndexedDatasetBuilder, merge_indexed_datasets
from parallel_core.data.indexed_dataset import DTYPE_CODES, optimal_dtype
from parallel_core.errors import DataError
from tests.unit.data.helpers import write_pair

ANY_FIXTURE = [HealthCheck.function_scoped_fixture]


@settings(max_examples=40, deadline=None, suppress_health_check=ANY_FIXTURE)
@given(
    code=st.sampled_from(sorted(DTYPE_CODES)),
    documents=st.lists(st.lists(st.lists(st.integers(0, 120), max_size=6), max_size=4), max_size=6),
    mmap=st.booleans(),
)
def test_round_trip_of_every_dtype_and_document_shape(tmp_path, code, documents, mmap):
    prefix = str(tmp_path / "any")
    with IndexedDatasetBuilder(prefix + ".bin", DTYPE_CODES[code]) as builder:
        for number, sequences in enumerate(documents):
            if number % 2:
                builder.add_document(sum(sequences, []), [len(sequence) for sequence in sequences])
            else:
                for sequence in sequences:
                    builder.add_item(sequence)
                builder.end_document()
        builder.finalize(prefix + ".idx")
    dataset = IndexedDataset(prefix, mmap=mmap)
    assert dataset.dtype == DTYPE_CODES[code]
    assert [dataset[index].tolist() for index in range(len(dataset))] == sum(documents, [])
    assert np.diff(dataset.document_indices).tolist() == [len(sequences) for sequences in documents]


def test_index_has_exactly_the_documented_bytes(tmp_path):
    with IndexedDatasetBuilder(str(tmp_path / "x.bin"), np.uint16) as builder:
        builder.add_document([1, 2, 3], [1, 2])
        builder.add_document([], [])
        builder.finalize(str(tmp_path / "x.idx"))
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 1, 2, 0, 2, 0, 2, 2)
    assert (tmp_path / "x.idx").read_bytes() == expected
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<3H", 1, 2, 3)


def test_multimodal_modes_are_kept(tmp_path):
    prefix = str(tmp_path / "modes")
    with IndexedDatasetBuilder(prefix + ".bin", np.int32, multimodal=True) as builder:
        builder.add_item([1, 2], mode=1)
        builder.end_document()
        builder.add_document([3, 4, 5], [1, 2], [0, 1])
        builder.finalize(prefix + ".idx")
    dataset = IndexedDataset(prefix, multimodal=True)
    assert [(tokens.tolist(), mode) for tokens, mode in (dataset[index] for index in range(3))] == [
        ([1, 2], 1),
        ([3], 0),
        ([4, 5], 1),
    ]
    with pytest.raises(DataError, match="multimodal=True"):
        IndexedDataset(prefix)


def test_reading_a_mapped_file_does_not_copy(tmp_path):
    dataset = IndexedDataset(write_pair(tmp_path / "x", [[1, 2, 3], [4, 5, 6, 7]]))
    part = dataset.get(1, 1, 2)
    assert part.tolist() == [5, 6] and not part.flags.owndata and not part.flags.writeable
    assert np.shares_memory(part, dataset.get(1))


@pytest.mark.parametrize("mmap", [True, False])
def test_get_refuses_what_the_sequence_does_not_have(tmp_path, mmap):
    dataset = IndexedDataset(write_pair(tmp_path / "x", [[1, 2, 3], [4]]), mmap=mmap)
    with pytest.raises(DataError, match="which has 3"):
        dataset.get(0, 2, 2)
    with pytest.raises(IndexError):
        dataset[2]
    assert dataset[-1].tolist() == [4]


def test_merge_keeps_order_and_document_bounds(tmp_path):
    first = write_pair(tmp_path / "a", [[1, 2], [3]])
    second = str(tmp_path / "b")
    with IndexedDatasetBuilder(second + ".bin", np.int32) as builder:
        builder.add_document([4, 5, 6], [2, 1])
        builder.finalize(second + ".idx")
    merge_indexed_datasets([first, second, first], str(tmp_path / "merged"))
    merged = IndexedDataset(str(tmp_path / "merged"))
    assert [merged[index].tolist() for index in range(len(merged))] == [[1, 2], [3], [4, 5], [6], [1, 2], [3]]
    assert merged.document_indices.tolist() == [0, 1, 2, 4, 5, 6]


def test_an_input_that_shrinks_ends_the_merge(tmp_path, monkeypatch):
    prefix = write_pair(tmp_path / "a", [np.arange(1000)])
    tokens = IndexedDataset.tokens

    def cut_then_read(self, start, stop):
        os.truncate(tmp_path / "a.bin", 10)
        return tokens(self, start, stop)

    monkeypatch.setattr(IndexedDataset, "tokens", cut_then_read)
    with pytest.raises(DataError, match=r"a\.bin had 4000 bytes when it was opened and is shorter now"):
        merge_indexed_datasets([prefix], str(tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_merge_refuses_another_dtype(tmp_path):
    first, second = write_pair(tmp_path / "a", [[1]]), write_pair(tmp_path / "b", [[1]], np.uint16)
    with pytest.raises(DataError, match="it stores uint16, the output int32"):
        merge_indexed_datasets([first, second], str(tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "b.bin", "b.idx"]


def test_nothing_appears_before_finalize(tmp_path):
    with IndexedDatasetBuilder(str(tmp_path / "x.bin"), np.int32) as builder:
        builder.add_document([1], [1])
        assert not (tmp_path / "x.bin").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [-1, 65536])
def test_an_id_that_does_not_fit_is_refused_not_wrapped(tmp_path, value):
    refusal = pytest.raises(DataError, match=f"token id {value} does not fit uint16")
    with IndexedDatasetBuilder(str(tmp_path / "x.bin"), np.uint16) as builder, refusal:
        builder.add_document([3, value], [2])


def test_sequences_outside_documents_are_refused(tmp_path):
    with IndexedDatasetBuilder(str(tmp_path / "x.bin"), np.int32) as builder:
        builder.add_item([1])
        with pytest.raises(DataError, match="end the document"):
            builder.finalize(str(tmp_path / "x.idx"))
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_do_not_add_up_are_refused(tmp_path):
    refusal = pytest.raises(DataError, match="3 tokens cannot have sequences of lengths")
    with IndexedDatasetBuilder(str(tmp_path / "x.bin"), np.int32) as builder, refusal:
        builder.add_document([1, 2, 3], [2])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (None, "int32")])
def test_optimal_dtype(vocab_size, dtype):
    assert optimal_dtype(vocab_size) == np.dtype(dtype)


def damage(path: pathlib.Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(bytes(data))


# three documents of 2, 3 and 4 int32: lengths at 34, pointers at 46, bounds at 70
DAMAGE = {
    "magic": (lambda p: damage(p, 0, b"X"), "not an index file"),
    "version": (lambda p: damage(p, 9, b"\x02"), "version 2"),
    "dtype": (lambda p: damage(p, 17, b"\x63"), "dtype code 99"),
    "count": (lambda p: damage(p, 18, b"\x04"), "truncated or damaged"),
    "huge count": (lambda p: damage(p, 18, b"\xff" * 8), "truncated or damaged"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated or damaged"),
    "header only": (lambda p: p.write_bytes(p.read_bytes()[:20]), "a header alone has 34"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "length": (lambda p: damage(p, 42, struct.pack("<i", 5)), "sequence 2 has 5 tokens"),
    "negative length": (lambda p: damage(p, 34, struct.pack("<i", -1)), "sequence 0 has -1 tokens"),
    "pointer": (lambda p: damage(p, 54, struct.pack("<q", -8)), "at byte -8"),
    "bounds": (lambda p: damage(p, 70, struct.pack("<q", 1)), "document bounds must rise from 0"),
    "falling bounds": (lambda p: damage(p, 78, struct.pack("<q", 3)), "document bounds must rise from 0"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_index_is_named_and_refused(tmp_path, case):
    prefix = write_pair(tmp_path / "x", [[1, 2], [3, 4, 5], [6, 7, 8, 9]])
    change, message = DAMAGE[case]
    change(tmp_path / "x.idx")
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "x.idx" in str(caught.value)


def test_a_truncated_bin_disagrees_with_its_index(tmp_path):
    prefix = write_pair(tmp_path / "x", [[1, 2], [3, 4, 5]])
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"disagree: sequence 1 has 3 tokens of 4 bytes at byte 8, but .* has 18 bytes"):
        IndexedDataset(prefix)


def test_a_missing_file_is_named(tmp_path):
    prefix = write_pair(tmp_path / "x", [[1]])
    (tmp_path / "x.bin").unlink()
    with pytest.raises(DataError, match=r"x\.bin does not exist"):
        IndexedDataset(prefix)
    with pytest.raises(DataError, match="without .bin or .idx"):
        IndexedDataset(prefix + ".idx")
