from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from parallel_core.data import IndexedDataset
from parallel_core.data.tokenizer import NullTokenizer
from parallel_core.errors import ConfigError, DataError
from tests.unit.data.helpers import write_pair

pytest.importorskip("mindspore.mindrecord")
from parallel_core.prepare.mindrecord import (  # noqa: E402
    indexed_to_mindrecord,
    mindrecord_to_indexed,
    read_mindrecord,
)


@pytest.fixture
def source(tmp_path):
    return write_pair(tmp_path / "source", [np.arange(0, 7), np.arange(7, 8), np.arange(8, 23)])


def test_there_and_back_through_mindspores_own_files(source, tmp_path):
    output = str(tmp_path / "x.mindrecord")
    columns = ("input_ids", "attention_mask", "labels")
    assert indexed_to_mindrecord(source, output, 5, columns=columns) == 4
    expected = np.arange(20).reshape(4, 5)
    assert np.array_equal(list(read_mindrecord([output])), expected)
    assert np.array_equal(list(read_mindrecord([output], "labels")), expected)
    assert np.array_equal(list(read_mindrecord([output], "attention_mask")), np.ones((4, 5)))
    assert mindrecord_to_indexed([output], str(tmp_path / "back"), NullTokenizer(100)) == (4, 20)
    back = IndexedDataset(str(tmp_path / "back"))
    assert [back[index].tolist() for index in range(4)] == expected.tolist() and back.dtype == np.uint16
    with pytest.raises(DataError, match="exists; remove it first"):
        indexed_to_mindrecord(source, output, 5)
    with pytest.raises(DataError, match="'nope'"):
        list(read_mindrecord([output], "nope"))
    with pytest.raises(DataError, match="token id 14, outside the vocabulary of 11 ids"):
        mindrecord_to_indexed([output], str(tmp_path / "bad"), NullTokenizer(10))
    assert not (tmp_path / "bad.idx").exists()


def test_split_files_are_each_read_once(source, tmp_path):
    assert indexed_to_mindrecord(source, str(tmp_path / "s.mindrecord"), 5, num_splits=2) == 4
    records = list(read_mindrecord([str(tmp_path / f"s.mindrecord{number}") for number in range(2)]))
    assert sorted(record[0] for record in records) == [0, 5, 10, 15]


def test_wrong_requests_are_named(source, tmp_path):
    output = str(tmp_path / "x.mindrecord")
    with pytest.raises(DataError, match="not enough for one record of 24"):
        indexed_to_mindrecord(source, output, 24)
    with pytest.raises(ConfigError, match="length=1"):
        indexed_to_mindrecord(source, output, 1)
    with pytest.raises(ConfigError, match="columns="):
        indexed_to_mindrecord(source, output, 5, columns=("input_ids", "tokens"))
    with pytest.raises(DataError, match="does not exist"):
        list(read_mindrecord([output]))
    (tmp_path / "x.mindrecord").write_bytes(b"x")
    with pytest.raises(DataError, match="no index file"):
        list(read_mindrecord([output]))
    (tmp_path / "x.mindrecord.db").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be read as a MindRecord"):
        list(read_mindrecord([output]))


def test_an_abort_inside_mindspore_is_named(source, tmp_path):
    output = tmp_path / "x.mindrecord"
    indexed_to_mindrecord(source, str(output), 5)
    output.write_bytes(output.read_bytes().replace(b'"page_id":0', b'"pagx_id":0', 1))
    with pytest.raises(DataError, match=r"x\.mindrecord is damaged: the process .* ended with signal 6"):
        list(read_mindrecord([str(output)]))
    with pytest.raises(DataError, match=r"is damaged"):
        mindrecord_to_indexed([str(output)], str(tmp_path / "out"), NullTokenizer(100))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_reader_that_is_left_early_ends(source, tmp_path):
    output = str(tmp_path / "x.mindrecord")
    indexed_to_mindrecord(source, output, 5)
    assert next(read_mindrecord([output])).tolist() == [0, 1, 2, 3, 4]
    assert not multiprocessing.active_children()
