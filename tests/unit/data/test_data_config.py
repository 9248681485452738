from __future__ import annotations

import json

import pytest

from parallel_core.data import Blend, blends_from_arguments, parse_blend, train_valid_test_num_samples
from parallel_core.data.builder import sizes_per_dataset
from parallel_core.data.config import parse_and_normalize_split, split_matrix
from parallel_core.errors import ConfigError, DataError
from tests.unit.data.helpers import make_config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], Blend(("a",))),
        (["a", "b"], Blend(("a", "b"))),
        (["0.3", "a", "0.7", "b"], Blend(("a", "b"), (0.3, 0.7))),
        (["1", "a"], Blend(("a",), (1.0,))),
        (["a", "b", "c"], Blend(("a", "b", "c"))),
        ([" a ", "b", "c"], Blend(("a", "b", "c"))),
        ([], None),
        (None, None),
    ],
)
def test_parse_blend(words, expected):
    assert parse_blend(words) == expected


@pytest.mark.parametrize("words", [["0.3", "a", "b", "c"], ["-1", "a", "2", "b"], ["0", "a"], ["nan", "a"]])
def test_wrong_blends_are_refused(words):
    with pytest.raises(ConfigError, match="data_path"):
        parse_blend(words)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("100,0,0", [1.0, 0.0, 0.0]),
        ("8", [1.0, 0.0, 0.0]),
        ("3/1", [0.75, 0.25, 0.0]),
        ("[.5, .25, .25]", [0.5, 0.25, 0.25]),
    ],
)
def test_split(split, expected):
    assert parse_and_normalize_split(split) == expected


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0,0,0", "1.2.3,4"])
def test_wrong_splits_are_refused(split):
    with pytest.raises(ConfigError, match="split="):
        make_config("p", split=split)


def test_split_matrix():
    assert split_matrix([0.5, 0.0, 0.5]) == ((0.0, 0.5), None, (0.5, 1.0))


def test_sizes_of_a_blend_round_up_twice():
    assert sizes_per_dataset([0.3, 0.7], (400, None, 0)) == [(120, None, 0), (280, None, 0)]
    assert sizes_per_dataset([0.3, 0.7], (400, None, 0), 0.005) == [(121, None, 0), (282, None, 0)]
    # 10.1 becomes 11, and 11.055 becomes 12; rounding once would give 11
    assert sizes_per_dataset([0.101], (100, 0, 0), 0.005) == [(12, 0, 0)]


def test_arguments_name_the_data_in_one_way(tmp_path):
    (tmp_path / "blend.txt").write_text("0.3 a\n0.7 b\n")
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["1", "a"], "valid": ["b"]}))
    blend = Blend(("a", "b"), (0.3, 0.7))
    assert blends_from_arguments(data_path=["0.3", "a", "0.7", "b"]) == (blend, None)
    assert blends_from_arguments(data_args_path=str(tmp_path / "blend.txt")) == (blend, None)
    per_split = (Blend(("a",), (1.0,)), Blend(("b",)), None)
    assert blends_from_arguments(train_data_path=["1", "a"], valid_data_path=["b"]) == (None, per_split)
    assert blends_from_arguments(per_split_data_args_path=str(tmp_path / "splits.json")) == (None, per_split)
    assert blends_from_arguments() == (None, None)
    with pytest.raises(ConfigError, match="data_path and train/valid/test_data_path are given together"):
        blends_from_arguments(data_path=["a"], test_data_path=["b"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_args_path", "", "is empty"),
        ("per_split_data_args_path", "{", "is not JSON"),
        ("per_split_data_args_path", '{"tain": ["a"]}', "expected"),
        ("per_split_data_args_path", '{"train": "a"}', "must be a list"),
    ],
)
def test_wrong_data_files_are_named(tmp_path, name, content, message):
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match=message):
        blends_from_arguments(**{name: str(tmp_path / "file")})
    with pytest.raises(DataError, match="missing"):
        blends_from_arguments(**{name: str(tmp_path / "missing")})


def test_config_wants_exactly_one_source():
    with pytest.raises(ConfigError, match="one of mock, blend and blend_per_split"):
        make_config()
    with pytest.raises(ConfigError, match="one of mock, blend and blend_per_split"):
        make_config("p", mock=True)
    with pytest.raises(ConfigError, match="divides --data-path"):
        make_config(blend_per_split=(Blend(("a",)), None, None), split="1,0,0")
    with pytest.raises(ConfigError, match="sequence_length=0"):
        make_config("p", sequence_length=0)
    with pytest.raises(ConfigError, match="random_seed=-1"):
        make_config("p", random_seed=-1)


def test_numbers_of_samples_a_run_asks_for():
    numbers = train_valid_test_num_samples(global_batch_size=8, train_iters=100, eval_interval=30, eval_iters=5)
    assert numbers == (800, 4 * 5 * 8, 40)
    numbers = train_valid_test_num_samples(
        global_batch_size=8, train_iters=None, train_samples=1000, eval_interval=50, eval_iters=1
    )
    assert numbers == (1000, 3 * 8, 8)
    with pytest.raises(ConfigError, match="neither train_iters nor train_samples"):
        train_valid_test_num_samples(global_batch_size=8, train_iters=None, eval_interval=1, eval_iters=1)
