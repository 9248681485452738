"""Memory: the closed formulas against jobs, the table, and what is measured in `measured_memory`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mindspore as ms
import pytest

from parallel_core.config.plan import Memory
from parallel_core.errors import ConfigError
from parallel_core.report.memory import StageMemory, compare, layout_flags, main, memory_table
from parallel_core.report.memory_meter import _accessed_pool_bytes

MIB = 2**20


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_what_is_measured(marked):
    file = str(Path(__file__).with_name("measured_memory.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marked, file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


def test_the_pool_is_the_large_anonymous_mappings():
    smaps = (
        "7f0000000000-7f0040401000 rw-p 00000000 00:00 0\nRss:  9 kB\nReferenced:      12 kB\nVmFlags: rd wr\n"
        "7f1000000000-7f1000401000 rw-p 00000000 00:00 0 \nReferenced:      100 kB\n"
        "7f2000000000-7f2040401000 rw-s 00000000 00:01 7  /dev/shm/x\nReferenced:      1000 kB\n"
        "7f3000000000-7f3080000000 rw-p 00000000 00:00 0 \nReferenced:      4 kB\n"
    )
    assert _accessed_pool_bytes(smaps) == 16 * 1024


FLAGS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 8 --train-iters 5 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 63 --make-vocab-size-divisible-by 64 --kernels local
"""


def test_a_job_of_two_ranks_holds_half_of_the_optimizer_state_each():
    (row,) = compare("dp2+distopt", FLAGS.split())
    assert (row.layout, row.pp_rank, row.in_flight) == ("dp2+distopt", 0, 1)
    padding = 64 * 4 * 2  # the distributed optimizer aligns parameters in their bucket
    for name in ("weights", "gradients", "optimizer"):
        formula, measured = getattr(row.formula, name), getattr(row.measured, name)
        assert 0 <= measured - formula <= padding * 2 * 20, name
    assert row.measured.optimizer == row.measured.weights  # two moments, shared by two ranks
    assert row.measured.activations > row.formula.activations / 2


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["p2p", "all_gather", "a2a"])
def test_activations_of_a_rank_fall_with_the_ranks_that_share_a_sequence(exchange):
    flags = [*FLAGS.split(), "--seq-length", "1024", "--max-position-embeddings", "1024", "--micro-batch-size", "1"]
    flags[flags.index("local")] = "auto"
    (one,), (two,) = (compare(layout, flags) for layout in ("single", f"cp2+{exchange}"))
    assert two.formula.activations == one.formula.activations // 2
    assert two.measured.activations < 0.7 * one.measured.activations  # pages of the pool do not halve
    assert two.measured.activations > two.formula.activations / 2


def test_layouts_by_word():
    flags, ranks = layout_flags("cp2+a2a")
    assert ranks == 2 and "--context-parallel-size 2 --cp-comm-type a2a" in " ".join(flags)
    flags, ranks = layout_flags("dp4+ep2+etp1")
    assert ranks == 4 and "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1" in " ".join(flags)
    flags, ranks = layout_flags("tp2+sp+pp4+vpp2+dp3+distopt+full")
    assert ranks == 24
    words = " ".join(flags)
    assert "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4" in words
    assert "--virtual-pipeline-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer" in words
    assert words.endswith("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    assert layout_flags("single")[1] == 1
    with pytest.raises(ConfigError, match=r"'tp2\+zero3' has the word 'zero3'; use single, tpN"):
        layout_flags("tp2+zero3")


def test_table():
    rows = [StageMemory("tp2", 0, 3, Memory(MIB, 2 * MIB, 3 * MIB, 4 * MIB), Memory(MIB, MIB, MIB, 10 * MIB))]
    assert memory_table(rows).splitlines() == [
        "MiB per rank: closed formula / measured",
        "layout | stage | in flight |     weights |   gradients |   optimizer |  activations",
        "-------+-------+-----------+-------------+-------------+-------------+-------------",
        "tp2    |     0 |         3 | 1.00 / 1.00 | 2.00 / 1.00 | 3.00 / 1.00 | 4.00 / 10.00",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layouts"], "--layouts needs a value"),
        (["--layouts", "tp0"], "has the word 'tp0'"),
        (["--layouts", "single", "--num-layer", "2"], "num-layer"),
    ],
)
def test_mistakes_start_nothing(capsys, argv, message):
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert ms.get_context("device_target") == "CPU"
