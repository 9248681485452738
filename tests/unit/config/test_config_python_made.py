"""A configuration made in Python is the command line's with the same inputs, field by field."""

from __future__ import annotations

import re
from typing import Any

import pytest
from config_helpers import ROOT, argv
from test_config_mapped import PIPE, ROWS, SPECIAL, WITHOUT, setting

from parallel_core.config import AllConfig, load_config, schema, table
from parallel_core.config.argument import parse_rows
from parallel_core.config.dump import field_value
from parallel_core.config.flags import UserArguments, read_flags
from parallel_core.config.values import convert

TABLES = ROOT / "parallel_core" / "config" / "arguments"
KINDS: dict[str, Any] = {
    "model_config": schema.TransformerConfig, "parallel_config": schema.ModelParallelConfig,
    "training_config": schema.TrainingConfig, "dataset_config": schema.DatasetConfig,
    "optimizer_config": schema.OptimizerConfig,
}
NESTED: dict[str, Any] = {"profile": schema.ProfileConfig, "tracking": schema.TrackingConfig,
                          "diagnosis": schema.DiagnosisConfig,
                          "fa_config": schema.FlashAttentionConfig, "mla": schema.MLAConfig, "moe": schema.MoEConfig,
                          "mtp": schema.MTPConfig, "bert": schema.BertConfig, "lora": schema.LoraConfig}
# What a flag says that Python says in the model's own section.
TYPES = {"bf16": "bfloat16", "fp16": "float16"}


def made_in_python(words: list[str], world_size: int) -> AllConfig:
    """Return a tree of sections with nothing but what `words` give; the batch is completed for `world_size` ranks."""
    given, _, problems = read_flags(words, UserArguments(None))
    assert not problems
    inputs: dict[str, Any] = {}
    for entry in given:
        argument = table.BY_NAME[entry.name]
        value = convert(argument, entry.value)
        assert argument.direct, f"{entry.written} has no field of its own"
        if value is not None:
            inputs[argument.fields[0]] = value
        if entry.name in TYPES:
            for name in ("compute_dtype", "params_dtype"):
                inputs.setdefault(f"model_config.{name}", TYPES[entry.name])
    resolved = load_config(words, world_size=world_size).config
    for name in ("global_batch_size", "micro_batch_num"):  # Python does not know the number of ranks
        inputs.setdefault(f"dataset_config.{name}", getattr(resolved.dataset_config, name))
    sections: dict[str, dict[str, Any]] = {name: {} for name in KINDS}
    for path, value in inputs.items():
        section, *outer, last = path.split(".")
        place = sections[section]
        if outer:
            place = place.setdefault(outer[0], {})
        place[last] = value
    for values in sections.values():
        for outer, kind in NESTED.items():
            if isinstance(values.get(outer), dict):
                values[outer] = kind(**values[outer])
    return AllConfig(**{name: KINDS[name](**values) for name, values in sections.items()})


def argv_names(words: list[str]) -> set[str]:
    return {word[2:].replace("-", "_") for word in words if word.startswith("--")}


def with_base(words: list[str]) -> list[str]:
    names = argv_names(words)
    return argv(*words, without=tuple(names | ({"train_iters"} if "train_samples" in names else set())))


def all_direct(words: list[str]) -> bool:
    return all(table.find(word)[0].direct for word in words if word.startswith("--"))


CASES = {"nothing but what is required": []}
for row in ROWS:
    words = [*SPECIAL.get(row.name, ("", ""))[0].split(), *setting(row)]
    if row.direct and all_direct(words):
        CASES[row.name] = words
    before = WITHOUT.get(row.name, "").split()
    if before and all_direct(before):
        CASES[f"without {row.name}"] = before
CASES |= {
    "no biases": ["--disable-bias-linear"],
    "interleaved rope": ["--position-embedding-type", "rope", "--rotary-interleaved"],
    "layer scaling": ["--apply-query-key-layer-scaling"],
    "a list of two chunks": [*PIPE.split(), "--num-layer-list", "[[3,1],[2,2]]"],
    "sequence parallel off at one rank": ["--sequence-parallel", "--tensor-model-parallel-size", "1"],
    "float16 sums": ["--fp16"], "bfloat16 with float16 sums kept": ["--bf16", "--accumulate-allreduce-grads-in-fp32"],
    "samples": ["--train-samples", "100", "--global-batch-size", "8", "--rampup-batch-size", "4", "4", "10"],
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_a_configuration_made_in_python_equals_the_command_lines(words):
    everything = with_base(words)
    loaded = load_config(everything)
    made = made_in_python(everything, loaded.world_size)
    different = {
        path: (field_value(made, path), field_value(loaded.config, path))
        for path in table.DIRECT if field_value(made, path) != field_value(loaded.config, path)
    }
    assert not different


def test_every_argument_with_a_field_is_compared():
    assert {row.name for row in ROWS if row.direct} <= set(CASES)


def test_rows_state_a_default_only_where_it_is_not_their_fields():
    for line in "".join(file.read_text(encoding="utf-8") for file in TABLES.glob("*.txt")).splitlines():
        stated = re.match(r"(\w+)( [^=]*)? = (\S+)((?: --\S+)*)( -> .*)", line)
        if stated and "|" not in line.partition(" -> ")[0]:
            header = "[Group]\n"
            name, kind, _, flags, rest = (part or "" for part in stated.groups())
            with_it, without = (parse_rows(header + text)[0] for text in (line, name + kind + flags + rest))
            assert with_it.default != without.default, line
