"""Layouts that a run goes on in with fewer ranks."""

from __future__ import annotations

import os

import pytest

from parallel_core.config.load import load_config
from parallel_core.planner.fewer_ranks import find_layouts
from tests.e2e.runs import SMALL
from tests.helpers.launching import REPO

WORDS = [*SMALL, "--data-path", os.fspath(REPO / "tests/golden/data/corpus_a")]


def found(layout: str, ranks: int, fewer: int):
    words = [*WORDS, *layout.split()]
    loaded = load_config(words, world_size=ranks)
    layouts = find_layouts(words, loaded, fewer, "CPU")
    return words, [load_config([*words, *one.flags], world_size=fewer).config for one in layouts], layouts


def test_the_configurations_own_layout_comes_first():
    _, configs, layouts = found("--tensor-model-parallel-size 2", 4, 2)
    assert layouts[0].words.startswith("tensor 2 (") and layouts[0].flags == ("--global-batch-size", "8")
    assert len(configs) > 1 and {config.dataset_config.global_batch_size for config in configs} == {8}


def test_a_layout_that_is_too_large_gives_way_to_those_of_the_search():
    sizes = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    _, configs, layouts = found(sizes, 4, 2)
    assert layouts and {config.dataset_config.global_batch_size for config in configs} == {8}
    for config in configs:
        p = config.parallel_config
        assert p.tensor_model_parallel_size * p.pipeline_model_parallel_size <= 2


def test_samples_of_an_iteration_stay_where_they_followed_from_the_ranks():
    words = [word for word in WORDS if word not in ("--global-batch-size", "8")]
    loaded = load_config(words, world_size=4)
    batch = loaded.config.dataset_config.global_batch_size
    first = find_layouts(words, loaded, 2, "CPU")[0]
    assert load_config([*words, *first.flags], world_size=2).config.dataset_config.global_batch_size == batch


@pytest.mark.parametrize("target", ["CPU", "Ascend"])
def test_where_nothing_fits_there_is_nothing(target):
    words = [*WORDS, "--global-batch-size", "7", "--micro-batch-size", "7", "--num-layers", "1",
             "--num-attention-heads", "1", "--kv-channels", "32"]  # fmt: skip
    loaded = load_config(words, world_size=1)
    assert find_layouts(words, loaded, 5, target) == []
