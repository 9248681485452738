"""Memory: the meter, the closed formulas against real runs, and what recomputation saves."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.config.plan import Memory, layer_activations, rank_memory
from parallel_core.context import ParallelContext
from parallel_core.errors import ConfigError
from parallel_core.report.memory import StageMemory, compare, layout_flags, main, memory_table
from parallel_core.report.memory_meter import MemoryMeter, _accessed_pool_bytes
from tests.helpers.session import session_module
from tests.ranks.support import Tiny, TinyRun, kernels

MIB = 2**20
# Attention scores outweigh everything else, as in a real model with long sequences: 1 MiB for each microbatch.
MODEL = {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "seq_length": 128, "vocab_size": 64,
         "kernels": "local"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    session_module().set_up(0, 1)
    with kernels("local"):
        yield


def run_of(num_layers: int, model: dict, num_microbatches: int = 1) -> TinyRun:
    data = {"batch_size": 4, "global_batch_size": 4 * num_microbatches, "micro_batch_num": num_microbatches}
    tiny = Tiny(model={**MODEL, "num_layers": num_layers, **model}, data=data)
    return TinyRun(tiny, ParallelContext.solo())


def peak_of(run: TinyRun) -> int:
    run.train(2)
    meter = MemoryMeter()
    meter.start()
    run.train(1)
    return meter.stop()


def test_the_meter_counts_pool_tensors_and_arrays_at_their_peak():
    x = Tensor(np.ones((256, 1024), np.float32))  # 1 MiB
    _ = x + 1
    meter = MemoryMeter()
    for held in (0, 8):
        meter.start()
        tensors = [x + i for i in range(held)]
        arrays = [np.ones((256, 1024), np.float32) for _ in range(held // 2)]
        del tensors, arrays
        for i in range(20):  # freed at once, so it counts once
            _ = x + i
        peak = meter.stop() / MIB
        assert held * 1.5 <= peak <= held * 1.5 + 4, peak


def test_the_pool_is_the_large_anonymous_mappings():
    smaps = (
        "7f0000000000-7f0040401000 rw-p 00000000 00:00 0\nRss:  9 kB\nReferenced:      12 kB\nVmFlags: rd wr\n"
        "7f1000000000-7f1000401000 rw-p 00000000 00:00 0 \nReferenced:      100 kB\n"
        "7f2000000000-7f2040401000 rw-s 00000000 00:01 7  /dev/shm/x\nReferenced:      1000 kB\n"
        "7f3000000000-7f3080000000 rw-p 00000000 00:00 0 \nReferenced:      4 kB\n"
    )
    assert _accessed_pool_bytes(smaps) == 16 * 1024


def peak_kept_formula(name: str, model: dict) -> tuple[float, float, float]:
    """Return the peak of 12 layers, and what a layer keeps as measured and by the formula.

    What a layer keeps is the difference of 12 and 4 layers: the temporaries of running operators cancel.
    """
    small, large = run_of(4, model), run_of(12, model)
    peak = peak_of(large)
    return peak, (peak - peak_of(small)) / 8, layer_activations(large.config, name)


def test_recomputation_of_whole_layers_keeps_their_inputs_only():
    """The fused kernels keep arrays, which are counted to the byte, and never scores."""
    with kernels("auto") as sentence:
        if not sentence.startswith("fused"):
            pytest.skip(sentence)
        fused = {"kernels": "auto", "use_flash_attention": True}
        peak, kept, formula = zip(*(peak_kept_formula(n, {**m, **fused}) for n, m in (("none", {}), ("full", FULL))))
    scatter = MIB // 20  # of the pages of MindSpore's pool; a layer's input is 2.5 times that
    assert abs(kept[0] - formula[0]) < 0.1 * formula[0] + scatter
    assert abs(kept[1] - formula[1]) < scatter
    assert formula[1] < 0.1 * formula[0]
    assert peak[1] < 0.25 * peak[0]


@pytest.mark.slow  # MindSpore's operators live in its pool, whose pages a busy machine scatters
def test_recomputation_of_core_attention_keeps_no_scores():
    (peak, kept, formula), (selective, selective_kept, selective_formula) = (
        peak_kept_formula(n, m) for n, m in (("none", {}), ("selective", SELECTIVE))
    )
    # The formula counts what a method has to keep; MindSpore's own operators keep some of it twice.
    assert formula < kept < 1.5 * formula
    assert 0.8 * selective_formula < selective_kept < 1.7 * selective_formula
    assert selective < 0.7 * peak


def test_block_recomputation_frees_the_first_layers_only():
    none, two, all_four = (
        peak_of(run_of(4, model))
        for model in (
            {},
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4},
        )
    )
    assert all_four < two < none
    assert none - two > MIB


def test_microbatches_one_after_the_other_cost_no_more_than_one():
    one, four = peak_of(run_of(4, {})), peak_of(run_of(4, {}, num_microbatches=4))
    assert four < 1.25 * one


def test_parameters_gradients_and_optimizer_are_the_formula_exactly():
    run = run_of(3, {"position_embedding_type": "rope", "untie_embeddings_and_output_weights": True})
    run.train(1)
    formula = rank_memory(run.config, run.step.model.layout, 0, 1)
    assert run.step.ddp.memory_bytes() == {"parameters": formula.weights, "gradients": formula.gradients}
    assert run.step.optimizer.memory_bytes() == formula.optimizer


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
