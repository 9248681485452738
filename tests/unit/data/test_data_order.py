from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from parallel_core.data import (
    Blend,
    build_train_valid_test_datasets,
    data_order_fingerprint,
    describe_data_order,
    explain_data_order_change,
)
from tests.unit.data.helpers import make_config, numbered_documents, write_pair


def described(config, num_samples, **sampler):
    dataset = build_train_valid_test_datasets(config, (num_samples, 0, 0))[0]
    return describe_data_order(dataset, **sampler), dataset


@pytest.fixture
def prefixes(tmp_path):
    return tuple(write_pair(tmp_path / name, numbered_documents([25] * 20)) for name in "ab")


CHANGES = {
    "seed": ({"random_seed": 8}, 100, "dataset.random_seed: saved 7, now 8"),
    "sequence length": ({"sequence_length": 16}, 30, "dataset.sequence_length: saved 8, now 16"),
    "split": ({"split": "8,2,0"}, 60, "dataset.end_sequence: saved 20, now 16"),
    "epochs": ({}, 140, "dataset.num_epochs: saved 2, now 3"),
    "final epoch": ({}, 75, "dataset.separate_final_epoch: saved False, now True"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_of_order_is_noticed_and_explained(prefixes, case):
    options, num_samples, message = CHANGES[case]
    saved, before = described(make_config(prefixes[0]), 120)
    current, after = described(make_config(prefixes[0], **options), num_samples)
    assert data_order_fingerprint(saved) != data_order_fingerprint(current)
    assert message in explain_data_order_change(saved, current)
    count = min(len(before), len(after))
    orders = [[dataset[index]["tokens"].tolist() for index in range(count)] for dataset in (before, after)]
    assert orders[0] != orders[1]


def test_more_samples_within_the_same_epochs_leave_the_order_and_the_hash(prefixes):
    saved, before = described(make_config(prefixes[0]), 118)
    current, after = described(make_config(prefixes[0]), 124)
    assert before.unique_description_hash != after.unique_description_hash
    assert np.array_equal(before.shuffle_index, after.shuffle_index)
    assert data_order_fingerprint(saved) == data_order_fingerprint(current)
    assert explain_data_order_change(saved, current) == []


def test_a_description_survives_json_and_a_move_of_the_data(prefixes, tmp_path):
    saved, _ = described(make_config(prefixes[0]), 120)
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(prefixes[0] + suffix, tmp_path / "elsewhere" / ("c" + suffix))
    current, _ = described(make_config(tmp_path / "elsewhere" / "c"), 120)
    loaded = json.loads(json.dumps(saved))
    assert data_order_fingerprint(loaded) == data_order_fingerprint(saved) == data_order_fingerprint(current)
    assert explain_data_order_change(loaded, current) == [] and saved["dataset"]["path"] == prefixes[0]


def test_other_tokens_under_the_same_lengths_are_noticed(prefixes, tmp_path):
    other = write_pair(tmp_path / "other", [document + 1 for document in numbered_documents([25] * 20)])
    saved, _ = described(make_config(prefixes[0]), 120)
    current, _ = described(make_config(other), 120)
    (line,) = explain_data_order_change(saved, current)
    assert line.startswith("dataset.tokens_sha256")


def test_blends_count_by_weights_and_parts(prefixes):
    saved, _ = described(make_config(blend=Blend(prefixes, (1, 3))), 40)
    same, _ = described(make_config(blend=Blend(prefixes, (2, 6))), 44)
    other, _ = described(make_config(blend=Blend(prefixes, (2, 3))), 40)
    assert data_order_fingerprint(saved) == data_order_fingerprint(same)
    assert "dataset.weights[0]: saved 0.25, now 0.4" in explain_data_order_change(saved, other)


def test_the_layout_counts_for_the_cyclic_sampler_only(prefixes):
    config = make_config(prefixes[0])
    dataset = build_train_valid_test_datasets(config, (60, 0, 0))[0]

    def fingerprint(kind, dp, sharding=True):
        description = describe_data_order(
            dataset, dataloader_type=kind, micro_batch_size=2, data_parallel_size=dp, data_sharding=sharding
        )
        return data_order_fingerprint(description)

    assert fingerprint("single", 1) == fingerprint("single", 4)
    assert fingerprint("cyclic", 1) != fingerprint("cyclic", 4)
    assert fingerprint("cyclic", 1) != fingerprint("cyclic", 1, False) != fingerprint("single", 1)


def test_mock_and_foreign_datasets_can_be_described():
    mock, _ = described(make_config(mock=True), 10)
    assert mock["dataset"]["tokens_sha256"] is None
    assert describe_data_order([1, 2, 3])["dataset"] == {"class": "list", "length": 3}
    assert describe_data_order(None)["dataset"] == {"class": "NoneType", "length": None}
