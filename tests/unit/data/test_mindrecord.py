from __future__ import annotations

import dataclasses
import multiprocessing
from unittest import mock

import numpy as np
import pytest

from parallel_core.data import (
    GPTDatasetConfig,
    IndexedDataset,
    build_train_valid_test_datasets,
    data_order_fingerprint,
    describe_data_order,
    explain_data_order_change,
    parse_blend,
    record_dataset,
)
from parallel_core.data.record_dataset import open_records
from parallel_core.data.tokenizer import NullTokenizer
from parallel_core.errors import ConfigError, DataError
from tests.unit.data.helpers import write_pair

pytest.importorskip("mindspore.mindrecord")
from parallel_core.data.mindrecord_reader import read_mindrecord  # noqa: E402
from parallel_core.prepare.mindrecord import indexed_to_mindrecord, mindrecord_to_indexed  # noqa: E402


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


# ---- training from them ---------------------------------------------------------------------------------------------
def config(path, length=4, split="100,0,0", **options):
    return GPTDatasetConfig(
        random_seed=1, sequence_length=length, tokenizer=NullTokenizer(100), blend=parse_blend([str(path)]),
        split=split, **options,
    )  # fmt: skip


def test_a_folder_is_trained_from_in_the_order_of_its_files_and_records(tmp_path):
    """What MindSpore wrote, read without its order by name being that of writing, and once only."""
    for name, first in (("b.mindrecord", 100), ("a.mindrecord", 0)):
        pair = write_pair(tmp_path / f"from{first}", [np.arange(first, first + 15) % 97])
        (tmp_path / "records").mkdir(exist_ok=True)
        indexed_to_mindrecord(pair, str(tmp_path / "records" / name), 5)
    train, valid, test = build_train_valid_test_datasets(config(tmp_path / "records"), (8, 0, 0))
    assert (len(train), train.samples_per_epoch, valid, test) == (8, 6, None, None)
    rows = np.concatenate([np.arange(15).reshape(3, 5), np.arange(100, 115).reshape(3, 5) % 97])
    for i in range(8):  # after the last record comes the first again
        assert train[i]["tokens"].tolist() == rows[i % 6, :-1].tolist()
        assert train[i]["labels"].tolist() == rows[i % 6, 1:].tolist()
    with mock.patch.object(record_dataset, "read_mindrecord", None):
        again, _, _ = build_train_valid_test_datasets(config(tmp_path / "records"), (8, 0, 0))
    assert data_order_fingerprint(describe_data_order(again)) == data_order_fingerprint(describe_data_order(train))


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Return a function that makes a file of records, which are read as MindSpore's would be."""

    def read(files, column):
        assert column == "input_ids"
        for file in files:
            yield from np.load(file).astype(np.int64)

    def make(name, rows):
        with (tmp_path / name).open("wb") as file:
            np.save(file, np.array(rows))
        (tmp_path / f"{name}.db").write_bytes(b"")
        return tmp_path / name

    monkeypatch.setattr(record_dataset, "read_mindrecord", read)
    return make


def test_documents_inside_a_record_are_told_apart_and_their_end_is_not_trained_at(records):
    """Positions of the published reader: the end of a document belongs to the one it ends."""
    file = records("t.mindrecord", [[1, 4, 6, 9, 2, 10, 3], [7, 6, 6, 5, 8, 0, 6]])
    options = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True, "eos_token_id": 6}
    train, _, _ = build_train_valid_test_datasets(config(file, 6, **options), (2, 0, 0))
    assert [train[i]["position_ids"].tolist() for i in range(2)] == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2]]
    assert [train[i]["document_start"].tolist() for i in range(2)] == [[0, 0, 0, 3, 3, 3], [0, 0, 2, 3, 3, 3]]
    assert [train[i]["loss_mask"].tolist() for i in range(2)] == [[1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1]]
    assert train[1]["labels"].tolist() == [6, 6, 5, 8, 0, 6]


def test_splits_are_shares_of_the_records(records):
    file = records("a.mindrecord", np.arange(30).reshape(6, 5))
    datasets = build_train_valid_test_datasets(config(file, split="3,2,1"), (None, None, None))
    assert [len(dataset) for dataset in datasets] == [3, 2, 1]
    assert datasets[1][0]["tokens"].tolist() == [15, 16, 17, 18]


def test_changed_files_are_read_again_and_another_order_is_told(records, tmp_path):
    records("a.mindrecord", np.arange(15).reshape(3, 5))
    before, _, _ = build_train_valid_test_datasets(config(tmp_path), (3, 0, 0))
    records("0.mindrecord", np.arange(20).reshape(4, 5) + 20)
    after, _, _ = build_train_valid_test_datasets(config(tmp_path), (3, 0, 0))
    assert (after.samples_per_epoch, after[0]["tokens"][0]) == (7, 20)
    changed = explain_data_order_change(describe_data_order(before), describe_data_order(after))
    assert any("records_sha256" in line for line in changed)


def test_records_that_cannot_be_trained_from_are_named(records, tmp_path):
    file = records("a.mindrecord", np.arange(15).reshape(3, 5))
    with pytest.raises(DataError, match=r"record 0 has 5 ids, and a sequence of 7 needs 8; give --seq-length"):
        open_records(str(file), config(file, 7))
    with pytest.raises(DataError, match=r"record 0 has an id that no vocabulary has"):
        open_records(str(records("b.mindrecord", [[0, -1, 2, 3, 4]])), config(file))
    with pytest.raises(DataError, match=r"no records in .*c.mindrecord"):
        open_records(str(records("c.mindrecord", np.zeros((0, 5)))), config(file))
    wide = records("d.mindrecord", [[1, 2, 3, 4, 200]])
    with pytest.raises(DataError, match="token id 200 in sample 0 is outside the vocabulary of 101 ids"):
        build_train_valid_test_datasets(config(wide), (1, 0, 0))[0][0]
    for words in ([str(file), "other", "third"], ["1", str(file)]):
        blend = dataclasses.replace(config(file), blend=parse_blend(words))
        with pytest.raises(ConfigError, match="read in their own order and not blended"):
            build_train_valid_test_datasets(blend, (1, 0, 0))
