"""A wrong configuration gets its exact message: setting, value, rule, what to write. Never a traceback."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import SMALL, Run, config_file, pretrain_gpt, working_directory
from tests.helpers.launching import REPO, launcher_environment

CONFIG_STATUS = 2


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return working_directory(tmp_path_factory.mktemp("wrong"))


def small(**changes: str) -> list[str]:
    """The small run's flags with some of them changed or added."""
    flags = list(SMALL)
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if flag in flags:
            flags[flags.index(flag) + 1] = value
        else:
            flags += [flag, value]
    return ["--config", "empty.yaml", *flags]


TP2 = {"tensor_model_parallel_size": "2"}
REFUSED = {
    "heads": (
        small(**TP2, num_attention_heads="3", kv_channels="8"), {},
        "--num-attention-heads 3, --tensor-model-parallel-size 2: 3 is not a multiple of 2; write 2 or 4",
    ),
    "layers": (
        small(num_layers="5", pipeline_model_parallel_size="2"), {},
        "--num-layers 5: num_layers=5 cannot be split over pipeline_model_parallel_size=2 x "
        "virtual_pipeline_model_parallel_size=1 = 2 chunks: 5 is not a multiple of 2. Use 4 or 6 layers, or give "
        "num_layer_list.",
    ),
    "vocabulary": (
        small(**TP2, padded_vocab_size="257"), {},
        "--padded-vocab-size 257, --tensor-model-parallel-size 2: 257 is not a multiple of 2; write 256 or 258",
    ),
    "world size": (
        small(**TP2), {"NPROC": "3"},
        "NPROC=3 asks for 3 ranks, but tensor_model_parallel_size=2 needs a multiple of 2: use NPROC=2 (data parallel "
        "1) or NPROC=4 (data parallel 2), or keep 3 and choose sizes whose product divides it",
    ),
    "batch": (
        small(), {"NPROC": "3"},
        "--global-batch-size 8, --micro-batch-size 2: 8 is not a multiple of micro batch size 2 x data parallel size "
        "3 = 6 (world size 3)",
    ),
    "sequence parallel without tensor parallel": (
        [*small(), "--sequence-parallel"], {},
        "--sequence-parallel, tensor_model_parallel_size=1 (default): splits the sequence over tensor parallel ranks, "
        "and there is one; add --tensor-model-parallel-size 2, or leave it out",
    ),
    "unknown flag": (
        small(hiden_size="32"), {},
        "--hiden-size: unknown argument; did you mean --hidden-size?",
    ),
    "unknown key": (
        ["--config", "typo.yaml", *SMALL], {},
        "typo.yaml:2: hiden_size: unknown argument; did you mean hidden_size?",
    ),
    "missing file": (
        ["--config", "none.yaml", *SMALL], {},
        "none.yaml: no such file; . has empty.yaml, typo.yaml",
    ),
    "wrong type": (
        small(num_layers="four"), {},
        "--num-layers is 'four'; it takes a whole number",
    ),
    "learning rate that is no number": (
        small(lr="nan"), {},
        "--lr is 'nan'; it takes a finite number",
    ),
    "too few ranks": (
        small(**TP2, pipeline_model_parallel_size="2"), {"NPROC": "2"},
        "NPROC=2 asks for 2 ranks, but tensor_model_parallel_size=2 x pipeline_model_parallel_size=2 needs a multiple "
        "of 4: use NPROC=4 (data parallel 1), or keep 2 and choose sizes whose product divides it",
    ),
}  # fmt: skip


def assert_clean(run: Run) -> None:
    assert "Traceback" not in run.console + run.logs
    assert run.rows == []


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_any_rank_starts(what: str, workplace: Path, tmp_path):
    arguments, variables, message = REFUSED[what]
    config_file(workplace / "typo.yaml", "seed: 1234\nhiden_size: 32\n")
    run = pretrain_gpt(tmp_path / "logs", arguments, cwd=workplace, status=CONFIG_STATUS, **variables)
    assert run.console == message + "\n"
    assert_clean(run)


def test_all_mistakes_at_once(workplace: Path, tmp_path):
    arguments = small(**TP2, num_layers="four", lr="nan", hiden_size="32", padded_vocab_size="257")
    run = pretrain_gpt(tmp_path / "logs", arguments, cwd=workplace, status=CONFIG_STATUS)
    assert run.console.splitlines() == [
        "4 problems in the configuration:",
        "  --hiden-size: unknown argument; did you mean --hidden-size?",
        "  --num-layers is 'four'; it takes a whole number",
        "  --lr is 'nan'; it takes a finite number",
        "  --padded-vocab-size 257, --tensor-model-parallel-size 2: 257 is not a multiple of 2; write 256 or 258",
    ]


def test_port_in_use(workplace: Path, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        run = pretrain_gpt(
            tmp_path / "logs", small(**TP2), cwd=workplace, status=CONFIG_STATUS, MASTER_PORT=str(port)
        )
    assert run.console == (
        f"MASTER_PORT={port}: port {port} is in use on this machine, perhaps by a scheduler that is still closing; "
        "give another, or unset MASTER_PORT and a free one is chosen\n"
    )
    assert_clean(run)


# What only the ranks can find; each names the first rank that failed.
UNREADABLE = {
    "damaged index": (
        {"data_path": "bad"},
        "DataError: bad.idx is damaged: 12 bytes, a header alone has 34. Preprocess again.",
    ),
    "no such data": (
        {"data_path": "nothere"},
        "DataError: data path 'nothere': nothere.idx does not exist. Give the path without .bin or .idx; "
        "python -m parallel_core.prepare.preprocess_data writes both files.",
    ),
    "no such checkpoint": (
        {"load": "nowhere", "ckpt_step": "3"},  # without a step, the run begins
        "CheckpointError: --load nowhere: there is no such directory",
    ),
    "no checkpoint there": (
        {"load": "."},
        "CheckpointError: --load .: latest_checkpointed_iteration.txt is missing; there is no iter_XXXXXXX directory "
        "in it",
    ),
    "token outside the vocabulary": (
        {"vocab_size": "120", "padded_vocab_size": "128"},
        "DataError: corpus_a: token id 217 in sample 0 is outside the vocabulary of 121 ids. The data was made with "
        "another tokenizer than this run's: give the one it was preprocessed with.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREADABLE)
def test_refused_by_the_ranks(what: str, workplace: Path, tmp_path):
    changes, message = UNREADABLE[what]
    (workplace / "bad.bin").write_bytes(b"x" * 100)
    (workplace / "bad.idx").write_bytes(b"not an index")
    run = pretrain_gpt(tmp_path / "logs", small(**changes), cwd=workplace, status=1)
    errors = [line for line in run.console.splitlines() if line.startswith("ERROR")]
    assert errors == [f"ERROR - rank 0 failed first, of 1 ranks: {message}"]
    assert_clean(run)


def test_unreadable_data_ends_every_rank_at_once(workplace: Path, tmp_path):
    """Two ranks find the same; each says it, none waits for the other."""
    run = pretrain_gpt(tmp_path / "logs", small(**TP2, data_path="nothere"), cwd=workplace, status=1)
    assert re.search(r"ERROR - rank [01] failed first, of 2 ranks: DataError: data path 'nothere'", run.console)
    assert_clean(run)


def test_without_msrun(workplace: Path, tmp_path):
    """`python pretrain_gpt.py` alone answers in the same words."""
    done = subprocess.run(
        [sys.executable, str(REPO / "pretrain_gpt.py"), *small(hiden_size="32")],
        cwd=workplace, env=launcher_environment(tmp_path / "logs"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == CONFIG_STATUS
    assert done.stderr.splitlines()[-1] == "--hiden-size: unknown argument; did you mean --hidden-size?"
    assert "Traceback" not in done.stderr
