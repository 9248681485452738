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


REPO = Path(__file__).resolve().parents[3]
EXAMPLES = [
    line.split("#")[0].split() for line in (REPO / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("    ") and "pretrain_gpt." in line and "..." not in line and "pip install" not in line
]


@pytest.mark.parametrize("words", EXAMPLES, ids=" ".join)
def test_the_commands_of_the_readme_are_legal(words, monkeypatch):
    """Each has the layout it says, on the ranks it says."""
    monkeypatch.chdir(REPO)
    program = next(number for number, word in enumerate(words) if word in ("bash", "python"))
    variables = dict(word.split("=") for word in words[:program])
    arguments = words[len(variables) + 2 :]
    loaded = check_configuration(arguments, int(variables.get("NPROC", "0")))
    sizes = loaded.config.parallel_config
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        flag = "--" + name.replace("_", "-")
        if flag in arguments:
            assert str(getattr(sizes, name)) == arguments[arguments.index(flag) + 1]


def test_the_readme_has_commands():
    assert len(EXAMPLES) >= 6
