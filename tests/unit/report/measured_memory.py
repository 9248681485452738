"""Memory as it is measured: the meter, the closed formulas, and what recomputation saves.

`test_memory` runs this file in a process of its own: what other tests leave in MindSpore's pool scatters its pages.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.config.plan import layer_activations, layer_deferred, rank_memory
from parallel_core.context import ParallelContext
from parallel_core.deferral import deferring
from parallel_core.report.memory_meter import MemoryMeter
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


@pytest.mark.parametrize("model", [{}, {"hidden_dropout_rate": 0.1, "recompute_granularity": "selective"}])
def test_what_waits_for_the_gradients_of_weights_is_the_formula(model: dict):
    """Beside inputs of linear layers and gradients of their outputs nothing of a layer waits."""
    fused = {"kernels": "auto", "use_flash_attention": True, **model}
    with kernels("auto") as sentence:
        if not sentence.startswith("fused"):
            pytest.skip(sentence)
        waits = [waiting_in(run_of(num_layers, fused)) for num_layers in (4, 12)]
    formula = layer_deferred(run_of(4, fused).config)
    assert abs((waits[1] - waits[0]) / 8 - formula) < 0.03 * formula, (waits, formula)


def waiting_in(run: TinyRun) -> int:
    """Return the bytes of one microbatch after its backward pass, before the gradients of weights are computed."""
    (stage,) = run.step._stages
    whole, held = stage.backward, list[int]()

    def split(*args: Any) -> Any:
        with deferring() as late:
            result = whole(*args)
        held.append(tracemalloc.get_traced_memory()[0])
        for work in late:
            work()
        return result

    stage.backward = split
    run.train(2)
    tracemalloc.start()
    run.train(1)
    tracemalloc.stop()
    return held[-1]
