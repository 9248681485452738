"""Every Megatron argument has one fate; every seed row and every field is in the table."""

from __future__ import annotations

import ast
import csv
import dataclasses
import re
from collections import Counter

import pytest
from config_helpers import GOLDEN, ROOT

from parallel_core.config import schema, table
from parallel_core.config.argument import IGNORED, MAPPED, REFUSED
from parallel_core.config.rules import asks_for_nothing

ROWS = list(csv.DictReader((GOLDEN / "megatron_args.tsv").open(encoding="utf-8"), delimiter="\t", quotechar="\0"))
SEED = [line.split("\t") for line in (GOLDEN / "seed_rows.tsv").read_text().splitlines()]
DEFAULTS = [column for column in ROWS[0] if column.startswith("default_")]


def literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def test_every_megatron_argument_has_exactly_one_fate():
    assert len(ROWS) == 895
    for row in ROWS:
        fates = [a.status for a in table.TABLE if row["dest"] in (a.name, *a.aliases)]
        assert len(fates) == 1 and fates[0] in (MAPPED, IGNORED, REFUSED), row["dest"]


def test_every_megatron_flag_is_known():
    for row in ROWS:
        for flag in row["flags"].split():
            assert table.find(flag), flag
            assert table.find(flag.replace("-", "_").replace("__", "--", 1)), flag


def test_switches_read_as_megatron_reads_them():
    shared = {"--disable-msc", "--disable-mamba-mem-eff-path", "--disable-gloo-process-groups"}
    for row in ROWS:
        for flag in row["flags"].split():
            argument, negated = table.find(flag)
            if row["action"] in ("StoreTrue", "StoreFalse") and flag not in shared and "msc" not in flag:
                assert argument.is_switch and negated == (row["action"] == "StoreFalse"), flag


def test_the_tables_are_packaged():
    """Everything beside the code that it reads is in the wheel: each file matches a pattern of package-data."""
    patterns = re.search(r"^parallel_core = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    package = ROOT / "parallel_core"
    packaged = {file for pattern in ast.literal_eval(patterns) for file in package.glob(pattern)}
    beside = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert len(list((package / "config" / "arguments").glob("*.txt"))) == 15
    assert beside <= packaged


def test_names_and_spellings_are_unique():
    assert max(Counter(a.name for a in table.TABLE).values()) == 1
    spellings = Counter(s for a in table.TABLE for s in {a.name, *a.aliases})
    assert [s for s, n in spellings.items() if n > 1] == []


def test_reasons_are_stated():
    for argument in table.TABLE:
        assert (argument.help if argument.status == MAPPED else argument.reason), argument.name


@pytest.mark.parametrize("column", DEFAULTS)
def test_defaults_of_every_version_ask_for_nothing(column):
    for row in ROWS:
        argument, _ = table.find(row["dest"])
        if argument.status == REFUSED and row[column] != "-":
            assert asks_for_nothing(argument.name, literal(row[column])), (row["dest"], row[column])


def test_mapped_defaults_are_megatrons():
    own = {"eval_interval", "use_flash_attn"}
    for row in ROWS:
        argument, _ = table.find(row["dest"])
        if argument.status == MAPPED and argument.name == row["dest"] and row["default_core0.12"] != "-":
            theirs = literal(row["default_core0.12"])
            ours = argument.default
            if argument.name == "attention_backend":
                theirs = "auto"
            ours = list(ours) if isinstance(ours, tuple) else ours
            assert ours == theirs or (theirs is None and ours is False) or argument.name in own, row["dest"]


def all_fields(kind: type = schema.AllConfig, prefix: str = "") -> list[str]:
    paths = []
    for field in dataclasses.fields(kind):
        section = getattr(schema, str(field.type), None)
        if dataclasses.is_dataclass(section):
            paths += all_fields(section, f"{prefix}{field.name}.")
        else:
            paths.append(prefix + field.name)
    return paths


def test_every_field_has_one_direct_argument():
    direct = [a.fields[0] for a in table.TABLE if a.direct]
    assert sorted(direct) == sorted(all_fields())


def test_fields_named_by_rows_exist():
    fields = set(all_fields())
    for argument in table.TABLE:
        assert set(argument.fields) <= fields, argument.name


SEED_TARGETS = {
    # The guide's target -> where the value lives here, where the names differ.
    "model_config.use_rotary_embedding": "model_config.position_embedding_type",
    "training_config.loss_scale_factor": "training_config.hysteresis",
    "parallel_config.context_parallel_algo": "parallel_config.cp_comm_type",
    "parallel_config.ulysses_degree_in_cp": "parallel_config.hierarchical_context_parallel_sizes",
    **{f"training_config.profile_{name}": f"training_config.profile.{name}" for name in (
        "save_path", "step_start", "step_end", "level", "with_stack", "memory", "framework", "communication",
        "parallel_strategy", "aicore_metrics", "l2_cache", "hbm_ddr", "pcie", "data_process", "data_simplification",
        "op_time", "offline_analyse", "dynamic_profiler_config_path")},
    "training_config.profile": "training_config.profile.enabled",
}


@pytest.mark.parametrize(("name", "target"), SEED)
def test_every_seed_row_is_there(name, target):
    argument, negated = table.find(name)
    if name == "transformer_impl":  # whose values compute the same; which kernels run is said by `kernels`
        assert argument.status == IGNORED
        return
    assert not negated and SEED_TARGETS.get(target, target) in argument.fields
    written = target.split(".")[-1]
    assert table.find(written) or target in table.DIRECT


@pytest.mark.parametrize(("one", "other"), [
    ("virtual_pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size_ms"),
    ("profile_memory", "profile_with_memory"), ("pre_tockens", "pre_tokens"), ("next_tockens", "next-tokens"),
    ("use_flash_attn", "use-flash-attention"), ("load", "load_checkpoint"), ("norm_epsilon", "layernorm_epsilon"),
    ("override_opt_param_scheduler", "--override-opt_param-scheduler"),
])
def test_spellings_in_circulation(one, other):
    assert table.find(one)[0] is table.find(other)[0]


@pytest.mark.parametrize(("typed", "meant"), [
    ("--tensor-model-paralel-size", "--tensor-model-parallel-size"), ("num_layer", "num_layers"),
    ("learning_rat", "learning_rate"), ("--swigluu", "--swiglu"),
])
def test_misspelled_names_get_a_suggestion(typed, meant):
    assert table.suggestion(typed).endswith(f"did you mean {meant}?")
