"""Files and values that nobody means: a named error in no time, whatever they hold."""

from __future__ import annotations

import os
import random

import pytest
from config_helpers import argv, load, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.config import load_config, table
from parallel_core.config.load import resolve
from parallel_core.config.values import Given, Unreadable, convert
from parallel_core.config.yaml_tree import leaves_of_text, read_leaves
from parallel_core.errors import ConfigError

PP2 = "--pipeline-model-parallel-size 2"
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
FILES = {
    "billion laughs": (LAUGHS, "aliases repeat it without end"),
    "list that holds itself": ("a: &a [*a]", "aliases repeat it without end"),
    "mapping that holds itself": ("a: &a {b: *a}", "aliases repeat it without end"),
    "deep list": ("a: " + "[" * 5000 + "]" * 5000, "nested more than 32 deep"),
    "deep mapping": ("\n".join(" " * n + "a:" for n in range(500)), "nested more than 32 deep"),
    "many values": ("a: [" + "1," * 60_000 + "]", "has more than 50000 parts"),
    "large": ("# " + "x" * 2**19, "has 524290 bytes; a configuration has at most 262144"),
    "two documents": ("num_layers: 2\n---\nnum_layers: 3\n", ":2: not YAML"),
    "tabs": ("a:\n\t b: 1\n", ":2: not YAML"),
    "list": ("- 1\n", "holds no keys"),
    "key of several words": ("? {a: b}\n: 1\n? [1, 2]\n: 2\n", ":1: a key must be one word"),
    "a key twice": ("num_layers: 2\nnum_layers: 3\n", ":2: num_layers: given before, on line 1; keep one"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_configuration_is_refused(what, tmp_path):
    text, message = FILES[what]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="c.yaml") as error:
        load_config(["--config", str(tmp_path / "c.yaml")])
    assert message in str(error.value) and len(str(error.value)) < 3000


@pytest.mark.parametrize(("content", "message"), [
    (b"\xff\xfen\x00", "is not UTF-8 text"), ("num_layers: é".encode("latin-1"), "is not UTF-8 text"),
    (b"num_layers: \x00 2", "not YAML"),
])  # fmt: skip
def test_bytes_that_are_no_text_are_refused(content, message, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"c.yaml: {message}"):
        read_leaves(str(tmp_path / "c.yaml"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfnum_layers: 2\n")
    assert [leaf.path for leaf in read_leaves(str(tmp_path / "c.yaml"))[0]] == [("num_layers",)]


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        with pytest.raises(ConfigError, match="is no file; give a YAML file"):
            read_leaves(name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_leaves("a\0b")


@pytest.mark.parametrize("word", [
    "!!int ''", "!!float ''", "!!bool maybe", "!!timestamp x", "!!binary '*'", "0x" + "f" * 5000, "9" * 400, "1:99:99",
    "!!python/name:os.system", "!!python/object/apply:os.system ['touch x']", "[[1", "&a", "''", "2001-99-99",
])  # fmt: skip
def test_a_word_of_any_tag_is_a_number_or_a_named_mistake(word, tmp_path):
    (tmp_path / "c.yaml").write_text(f"num_layers: {word}\n")
    with pytest.raises(ConfigError, match="c.yaml:|num_layers"):
        load("--config", str(tmp_path / "c.yaml"), without=("num_layers",))
    assert os.listdir(tmp_path) == ["c.yaml"]


@pytest.mark.parametrize("value", ["hunter2", "[1, 2]", "{a: &a [1], b: *a}", "*a", "!!bool maybe", "\x1b[2J"])
def test_a_variable_is_not_shown(value, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("num_layers: ${SECRET}\nnum_layer_list: '[[${SECRET}]]'\n")
    monkeypatch.setenv("SECRET", value)
    text = problems("--config", str(tmp_path / "c.yaml"), without=("num_layers",))
    assert "num_layers is '${SECRET}'; it takes a whole number" in text and value not in text


def test_a_variable_that_is_used_is_named_by_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "7")
    (tmp_path / "c.yaml").write_text("num_layers: ${SECRET}\n")
    assert load("--config", str(tmp_path / "c.yaml"), without=("num_layers",)).config.model_config.num_layers == 7
    text = problems("--config", str(tmp_path / "c.yaml"), *PP2.split(), without=("num_layers",))
    assert text.startswith(f"{tmp_path}/c.yaml:1: num_layers: ${{SECRET}}: ")


LINES = {
    f"--num-layers {10**12}": "must be at most 100000",
    f"--num-layers 1{'0' * 5000}": "finite number",
    f"--num-layers {10**300}": "at most 18 digits",
    f"--pipeline-model-parallel-size {10**12}": "must be at most 65536",
    f"--virtual-pipeline-model-parallel-size {10**12} {PP2}": "must be at most 65536",
    f"--tensor-model-parallel-size {10**12}": "must be at most 65536",
    f"--global-batch-size {2 * 10**15}": "must be at most 1000000",
    f"--seed {2**32}": "must be at most 4294967295",
    f"--num-layer-list={'-' * 50_000}1 {PP2}": "it takes a whole number",
    f"--{'x' * 50_000} 1": "unknown argument",
    f"--num-layer-list {'[' * 50_000} {PP2}": "it takes a whole number",
    f"--num-layer-list {{[]:1}} {PP2}": "it takes a whole number",
    f"--num-layer-list __import__('os').system('x') {PP2}": "it takes a whole number",
    f"--window-size {'(' * 9000}": "it takes a whole number",
    f"--pipeline-model-parallel-layout Et*{'9' * 5000}|L {PP2}": "more than",
    f"--pipeline-model-parallel-layout Et*9999999999|L {PP2}": "more than",
    f"--pipeline-model-parallel-layout {'(' * 5000} {PP2}": "parenthesis",
    f"--pipeline-model-parallel-layout {'(tt|)*99' * 99} {PP2}": "",
    "--num-experts 4 --moe-layer-freq ([0]*1000000000000)": "it takes a number N above zero",
    "--make-vocab-size-divisible-by 0": "must be above zero",
    "--lr 1e400": "finite number",
    f"--rampup-batch-size 1 1 {10**18} --global-batch-size {10**9} --train-samples 100": "choose a larger increment",
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:50])
def test_a_value_of_any_size_is_answered_at_once(line):
    words = line.split()
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"} | {"train_iters"}
    text = problems(*words, without=tuple(names))
    assert LINES[line] in text and len(text) < 3000


def test_a_ramp_up_of_any_length_is_answered_at_once():
    words = ["--rampup-batch-size", "2", "2", str(10**17), "--global-batch-size", "8", "--train-samples", str(10**17)]
    assert load(*words, without=("train_iters",)).config.training_config.training_iters > 10**16


def test_integers_too_long_to_write_are_named():
    for value in (10**5000, [10**5000], -(10**5000)):
        with pytest.raises(ConfigError, match="it takes"):
            resolve([[Given("num_layers", value, "args", "num_layers", value)]])


GOOD = "\n".join(f"{flag[2:].replace('-', '_')}: {value}" for flag, value in zip(argv()[::2], argv()[1::2]))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_damaged_files_are_read_or_refused(seed, cuts):
    """Bytes of a good file replaced, doubled and left out, by what means something in YAML."""
    draw = random.Random(seed)
    text = GOOD + "\nnum_layer_list: [[2, 2]]\nsave: ${HOME:-x}\nmodel_config: {num_query_groups: 2}\n"
    for _ in range(cuts):
        at = draw.randrange(len(text))
        piece = draw.choice(["", "\n", ": ", "- ", "&a ", "*a", "[", "]", "{", "}", "!!int ", "<<: ", "'", '"', "${",
                             "\t", "\x85", "1e999", "? ", "|\n", "%YAML 9\n", "---\n", text[at : at + 9]])
        text = text[:at] + piece + text[at + draw.randrange(4) :]
    try:
        leaves, _ = leaves_of_text(text, "c.yaml", {})
    except ConfigError:
        return
    for leaf in leaves:
        found = table.find(leaf.path[-1])
        if found:
            try:
                convert(found[0], leaf.value)
            except Unreadable as error:
                assert len(str(error)) < 1000
