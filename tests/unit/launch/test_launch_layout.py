"""How many ranks are started for a configuration, and what is said when NPROC disagrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_core.config.load import load_config
from parallel_core.errors import ConfigError
from parallel_core.launch.layout import check_configuration, describe_layout

TINY = ["--config", str(Path(__file__).resolve().parents[3] / "configs/gpt_tiny.yaml")]


@pytest.mark.parametrize(
    ("flags", "asked", "expected", "words"),
    [
        ([], 0, 4, "tensor 2 x pipeline 2"),
        ([], 8, 8, "tensor 2 x data 2 x pipeline 2"),
        (["--pipeline-model-parallel-size", "1"], 0, 2, "tensor 2"),
        (["--tensor-model-parallel-size", "1", "--sequence-parallel", "false"], 0, 2, "pipeline 2"),
    ],
)
def test_ranks_follow_from_the_layout_or_are_a_multiple_of_it(flags, asked, expected, words):
    loaded = check_configuration([*TINY, *flags], asked)
    assert loaded.world_size == expected == load_config([*TINY, *flags], world_size=expected).world_size
    assert loaded.config == load_config([*TINY, *flags], world_size=expected).config
    assert describe_layout(loaded.config, expected) == words


@pytest.mark.parametrize(
    ("asked", "choices"),
    [
        (2, "NPROC=4 (data parallel 1)"),
        (6, "NPROC=4 (data parallel 1) or NPROC=8 (data parallel 2)"),
    ],
)
def test_a_number_of_ranks_the_layout_does_not_divide_is_refused(asked, choices):
    with pytest.raises(ConfigError) as caught:
        check_configuration(TINY, asked)
    assert str(caught.value) == (
        f"NPROC={asked} asks for {asked} ranks, but tensor_model_parallel_size=2 x pipeline_model_parallel_size=2 "
        f"needs a multiple of 4: use {choices}, or keep {asked} and choose sizes whose product divides it"
    )
