"""Whatever a user writes, the answer is a configuration or a ConfigError, never another exception."""

from __future__ import annotations

import contextlib

import yaml
from config_helpers import argv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_core.config import init_configs_from_args, load_config, table
from parallel_core.config.forms import NESTED, SECTIONS
from parallel_core.errors import ConfigError

NAMES = st.sampled_from([argument.name for argument in table.TABLE] + list(table.DIRECT) + list(NESTED) + ["nonsense"])
MAPPED = st.sampled_from([argument.name for argument in table.TABLE if argument.fields])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=6),
    st.sampled_from(["rope", "full", "block", "selective", "bf16", "float16", "WSD", "null", "4", "0", "-1", "1e-5",
                     "[[1]]"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.lists(st.lists(SCALARS, max_size=2), max_size=2),
                   st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUIET
@given(values=st.dictionaries(st.one_of(MAPPED, NAMES), VALUES, max_size=6))
def test_any_values_in_a_file(tmp_path, values):
    tree: dict = {}
    for name, value in values.items():
        node = tree
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_config(["--config", str(tmp_path / "c.yaml"), *argv()])


@QUIET
@given(text=st.text(alphabet="abn: \n-[]{}${}&*!|>'\"#,1.e_%@\t", max_size=60))
def test_any_text_as_a_file(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with contextlib.suppress(ConfigError):
        load_config(["--config", str(tmp_path / "c.yaml"), *argv()])


@QUIET
@given(words=st.lists(st.one_of(
    st.one_of(MAPPED, NAMES).map(lambda name: "--" + name.replace("_", "-")), SCALARS.map(str)), max_size=8))
def test_any_words_on_the_command_line(words):
    with contextlib.suppress(ConfigError):
        load_config([*argv(), *words])


@QUIET
@given(values=st.dictionaries(st.one_of(MAPPED, NAMES, st.just("world_size")), VALUES, max_size=6))
def test_any_namespace(values):
    base = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "padded_vocab_size": 256,
            "micro_batch_size": 2, "lr": 1e-3, "train_iters": 10}
    with contextlib.suppress(ConfigError):
        init_configs_from_args({**base, **values})


@given(section=st.sampled_from(SECTIONS), value=VALUES)
@QUIET
def test_any_section(tmp_path, section, value):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({section: value}, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_config(["--config", str(tmp_path / "c.yaml"), *argv()])
