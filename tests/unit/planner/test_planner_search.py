"""The search against every layout tried one by one, the clock against the simulator, and published layouts on paper."""

from __future__ import annotations

import itertools
import random
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.config.load import LoadedConfig, load_config
from parallel_core.config.plan import num_floating_point_operations
from parallel_core.errors import ConfigError
from parallel_core.pipeline.schedule import Action, Op, make_schedule
from parallel_core.planner import step_time
from parallel_core.planner.command import search_text
from parallel_core.planner.device import load_device
from parallel_core.planner.layer_time import ARITHMETIC, BACKWARD_OF_ATTENTION
from parallel_core.planner.layouts import Candidate, Layouts, command_line
from parallel_core.planner.search import GIB, Found, Searcher
from parallel_core.planner.step_time import StageTimes, pipeline_bound, pipeline_seconds
from parallel_core.report.simulate import simulate

A100 = str(Path(__file__).parent / "a100.yaml")
SMALL = """
    --num-layers 6 --hidden-size 256 --num-attention-heads 8 --seq-length 64 --padded-vocab-size 1024
    --micro-batch-size 1 --global-batch-size 16 --lr 1e-4 --train-iters 2 --bf16
"""
EXPERTS = SMALL + "--num-experts 4 --moe-router-topk 2 --disable-bias-linear"


# ---- the clock ------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    ranks=st.sampled_from([2, 3, 4, 8]), chunks=st.integers(1, 3), rounds=st.integers(1, 5),
    name=st.sampled_from(["auto", "zero-bubble"]), transfer=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_pipelines_clock_is_the_simulators(
    ranks: int, chunks: int, rounds: int, name: str, transfer: float, seed: int
) -> None:
    """And the bound is below; where passes take as long on every stage, so is what is extrapolated."""
    draw, number = random.Random(seed), rounds * ranks
    forward = np.array([[draw.uniform(0.9, 1.2) for _ in range(chunks)] for _ in range(ranks)])
    times = StageTimes(forward, draw.uniform(0.9, 1.6) * forward, draw.uniform(0.5, 1.1) * forward,
                       np.zeros((ranks, 5)), np.zeros(ranks))  # fmt: skip

    def duration(rank: int, action: Action) -> float:
        whole = times.input_grad + times.weight_grad
        of = {Op.FORWARD: times.forward, Op.BACKWARD: whole, Op.INPUT_GRAD: times.input_grad,
              Op.WEIGHT_GRAD: times.weight_grad}  # fmt: skip
        return float(of[action.op][rank, action.chunk])

    want = simulate(make_schedule(ranks, chunks, number, name=name), duration, transfer_time=transfer).end
    assert step_time._run(step_time._orders(name, ranks, chunks, number, 0), times, number, transfer) == \
        pytest.approx(want, rel=1e-12)  # fmt: skip
    assert pipeline_seconds(name, times, number, 0, transfer) == pytest.approx(want, rel=0.03)
    assert pipeline_bound(times, number, name == "zero-bubble") <= want * (1 + 1e-12)


# ---- what is computed ----------------------------------------------------------------------------------------------
IDEAL = replace(
    load_device(A100), product_half=(0.0, 0.0, 0.0), attention_half=0.0, memory_gb_per_s=1e12, fused_attention=True,
    product_tflops=dict.fromkeys(("float32", "float16", "bfloat16"), 1.0), asynchronous=False,
    attention_tflops=dict.fromkeys(("float32", "float16", "bfloat16"), 1.0),
)  # fmt: skip


@pytest.mark.parametrize("layout", ["", "--context-parallel-size 2", "--pipeline-model-parallel-size 2",
                                    "--tensor-model-parallel-size 2 --sequence-parallel"])  # fmt: skip
@pytest.mark.parametrize("model", [SMALL, EXPERTS, SMALL + "--swiglu --group-query-attention --num-query-groups 2"])
def test_operations_are_those_that_the_plan_counts(model: str, layout: str) -> None:
    """On all ranks together, at one operation a picosecond; attention's backward pass computes its scores again."""
    config = load_config(shlex.split(f"{model} {layout}"), world_size=4).config
    pricer = Searcher(4, IDEAL, 1e99).pricer(config)
    samples = config.dataset_config.batch_size * config.dataset_config.micro_batch_num
    ranks = 4 * samples // config.dataset_config.global_batch_size  # of one data parallel replica
    stages = config.parallel_config.pipeline_model_parallel_size
    computed = pricer.times.causes[:, ARITHMETIC].sum() * config.dataset_config.micro_batch_num * ranks / stages
    scores = samples * 64 * 6 * 2 * 64 * 256  # forward: samples, tokens, layers, 2 operations, half of two products
    again = (BACKWARD_OF_ATTENTION - 2) * scores
    assert computed * 1e12 == pytest.approx(num_floating_point_operations(config, samples) + again, rel=1e-3)


# ---- the search -----------------------------------------------------------------------------------------------------
def searched(words: str, world_size: int, device: str = A100, top: int = 10, memory_gb: float = 80.0) -> tuple[
    LoadedConfig, Layouts, Searcher, list[Found]
]:  # fmt: skip
    machine, loaded = load_device(device), load_config(shlex.split(words), world_size=world_size)
    layouts = Layouts(loaded, world_size, machine.fused_attention)
    searcher = Searcher(world_size, machine, memory_gb * GIB)
    return loaded, layouts, searcher, searcher.search(layouts, top).best


def every_layout(layouts: Layouts) -> list[Candidate]:
    found = []
    for shape in layouts.shapes():
        for sized in layouts.microbatches({**shape, "pipeline_schedule": "auto"}):
            for spread in layouts.with_experts(sized):
                for pipeline in layouts.pipelines(spread):
                    found += [layouts.candidate(pipeline, *choice) for choice in layouts.choices(pipeline)]
    return found


@pytest.mark.parametrize(("words", "world_size"), [(SMALL, 4), (EXPERTS, 4)])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_best_are_the_best_of_all(words: str, world_size: int, share: float) -> None:
    """With memory for a share of the layouts. Where one fits, the search leaves out the slower that recompute more."""
    _, layouts, searcher, _ = searched(words, world_size)
    every = [searcher.found(candidate.config, candidate.values) for candidate in every_layout(layouts)]
    searcher.memory_bytes = float(np.quantile([found.memory.total for found in every], share))
    fitting = [found for found in every if found.memory.total <= searcher.memory_bytes]
    best = searcher.search(layouts, 10).best
    assert len(every) > 100 and len(best) == 10
    least: dict[str, float] = {}
    for found in fitting:
        key = {k: v for k, v in found.values.items() if not k.startswith("recompute")}
        if not key["use_distributed_optimizer"] or world_size > key["tensor_model_parallel_size"] * \
                key["pipeline_model_parallel_size"]:  # fmt: skip
            least[str(sorted(key.items()))] = min(found.price.seconds, least.get(str(sorted(key.items())), 1e9))
    assert [found.price.seconds for found in best] == pytest.approx(sorted(least.values())[: len(best)])
    for found in best:
        assert sum(found.price.parts.values()) == pytest.approx(found.price.seconds)


def test_legal_sizes_are_those_that_a_run_would_accept() -> None:
    """All sizes of four axes and of the microbatch, tried with the whole of the rules."""
    _, layouts, _, _ = searched(SMALL, 8)
    names = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size", "micro_batch_size")
    found = {
        (*(sized[name] for name in names), sized["sequence_parallel"])
        for shape in layouts.shapes() if "num_layer_list" not in shape for sized in layouts.microbatches(shape)
    }  # fmt: skip
    legal = set()
    for tp, cp, pp, micro in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 8), (1, 2, 3, 4, 6, 8), range(1, 17)):
        for sequence in (True, False) if tp > 1 else (False,):
            flags = f"--tensor-model-parallel-size {tp} --context-parallel-size {cp} --pipeline-model-parallel-size " \
                    f"{pp} --micro-batch-size {micro} {'--sequence-parallel' if sequence else ''}"  # fmt: skip
            try:
                load_config(shlex.split(SMALL + flags), world_size=8)
            except ConfigError:
                continue
            legal.add((tp, cp, pp, micro, sequence))
    assert found == legal and len(legal) > 50


@pytest.mark.parametrize(
    ("words", "world_size"),
    [("--config configs/pangu_38b.yaml", 128), ("--config configs/mixtral_8x7b.yaml", 32),
     ("--config configs/pangu_alpha_2.6b.yaml", 8), (EXPERTS, 8),
     (SMALL + "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --micro-batch-num 4 "
              "--microbatch-group-size-per-virtual-pipeline-stage 4", 8)],
)  # fmt: skip
def test_a_command_line_is_the_layout_that_was_priced(words: str, world_size: int) -> None:
    loaded, layouts, _, best = searched(words, world_size, "ascend910b", top=6)
    for found in best:
        line = command_line(loaded, shlex.split(words), layouts, found.values)
        assert line.startswith(f"NPROC={world_size} bash pretrain_")
        config = load_config(shlex.split(line)[3:], world_size=world_size).config
        auto = {"auto": "interleaved" if config.parallel_config.virtual_pipeline_model_parallel_size > 1 else "1f1b"}
        name = config.parallel_config.pipeline_schedule
        assert auto.get(name, name) == found.config.parallel_config.pipeline_schedule
        for section in ("model_config", "training_config", "dataset_config", "optimizer_config"):
            assert getattr(config, section) == getattr(found.config, section)


def test_a_layout_that_cannot_run_on_so_many_ranks_is_replaced() -> None:
    text = search_text(["--config", "configs/pangu_38b.yaml"], 64 * 3, memory_gb=64.0, top=2)
    assert "192 processes" not in text and "512 is not a multiple of micro batch size 1 x data parallel size 6" in text
    line = next(line for line in text.splitlines() if "NPROC=192" in line)
    load_config(shlex.split(line)[3:], world_size=192)


def test_a_layout_that_does_not_fit_is_told_so_and_so_is_one_that_is_among_the_best() -> None:
    text = search_text(shlex.split(SMALL), 2, device="cpu", memory_gb=0.06, top=3)
    assert "your layout is not among them because it does not fit: pipeline rank 0 needs 0." in text
    best = next(line for line in text.splitlines() if "NPROC=2" in line)
    again = search_text(shlex.split(best)[3:], 2, device="cpu", memory_gb=0.06, top=3)
    assert again.endswith("your layout is number 1\n")
    one = search_text(shlex.split(SMALL + "--recompute-granularity full --recompute-method uniform "
                                  "--recompute-num-layers 1"), 2, device="cpu", top=1)  # fmt: skip
    assert "% more than number 1; against number 1: " in one and "recomputation +" in one


def test_a_wrong_layout_does_not_hide_what_is_right() -> None:
    text = search_text(["--config", "configs/gpt2_52b.yaml", "--tensor-model-parallel-size", "3"], 64, memory_gb=64.0)
    assert text.count(" why: ") == 10 and "your layout cannot run on so many ranks:" in text
    assert "tensor-model-parallel-size 3" in text


# ---- on paper -------------------------------------------------------------------------------------------------------
# Narayanan et al. 2021 (arXiv:2104.04473), table 1: billions of parameters, heads, hidden size, layers, tensor and
# pipeline parallel size, GPUs, samples, TFLOP/s of a GPU with recomputation counted.
MEGATRON = [
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 137), (3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
    (7.5, 32, 4096, 36, 4, 1, 128, 512, 142), (18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
    (39.1, 64, 8192, 48, 8, 2, 512, 1536, 138), (76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
    (145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148), (310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
    (529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163), (1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163),
]  # fmt: skip


def published(row: tuple[float, ...]) -> list[str]:
    _, heads, hidden, layers, tp, pp, _, samples, _ = row
    return f"""
        --num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --seq-length 2048 --fp16
        --padded-vocab-size 51200 --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}
        --micro-batch-size 1 --global-batch-size {samples} --recompute-granularity full --recompute-method uniform
        --recompute-num-layers 1 --lr 1e-4 --train-iters 10 --attention-backend unfused
    """.split()


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: f"{row[0]}B")
def test_megatrons_table_is_legal_and_fits_and_takes_as_long_as_published(row: tuple[float, ...]) -> None:
    _, _, hidden, layers, _, _, ranks, samples, teraflops = row
    searcher = Searcher(int(ranks), load_device(A100), 80 * GIB)
    found = searcher.found(load_config(published(row), world_size=int(ranks)).config, {})
    operations = 96 * samples * 2048 * layers * hidden**2 * (1 + 2048 / 6 / hidden + 51200 / 16 / layers / hidden)
    assert found.memory.total < 80 * GIB
    assert operations / ranks / found.price.seconds / 1e12 == pytest.approx(teraflops, rel=0.25)


def own_layout(text: str) -> str:
    """Return what a text says of the user's own layout, and see that it says why it is not among the best."""
    own = text[text.rindex("your layout") :]
    reasons = ("against number 1: ", "does not fit: ", "is number ")
    assert any(reason in own for reason in reasons), own
    return own


@pytest.mark.slow
@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: f"{row[0]}B")
def test_megatrons_table_is_among_the_best_or_told_why_not(row: tuple[float, ...]) -> None:
    own = own_layout(search_text(published(row), int(row[6]), device=A100))
    assert "recomputation +" in own or "is number" in own


SEEDS = [
    ("configs/gpt2_13b.yaml --global-batch-size 96 --micro-batch-size 1 --tensor-model-parallel-size 2 "
     "--pipeline-model-parallel-size 4", 32),
    ("configs/pangu_38b.yaml", 128),
    ("configs/pangu_alpha_2.6b.yaml", 8),
]  # fmt: skip
"""13B as data 4 x tensor 2 x pipeline 4 with 24 microbatches, 38B on 16 nodes, 2.6B on one."""


@pytest.mark.parametrize(("words", "ranks"), SEEDS)
def test_seeds_layouts_are_legal_and_fit_and_are_told_where_they_stand(words: str, ranks: int) -> None:
    arguments = ["--config", *words.split()]
    searcher = Searcher(ranks, load_device("ascend910b"), 64 * GIB)
    assert searcher.found(load_config(arguments, world_size=ranks).config, {}).memory.total < 64 * GIB
    text = search_text(arguments, ranks)
    own_layout(text)
    assert text.count(" why: ") == 10 == text.count(f"NPROC={ranks} bash pretrain_")


@pytest.mark.slow
@pytest.mark.parametrize("words", ["configs/pangu_38b.yaml --global-batch-size 10000",
                                   "configs/deepseek_v3.yaml --global-batch-size 40000"])  # fmt: skip
def test_ten_thousand_ranks(words: str) -> None:
    text = search_text(["--config", *words.split()], 10000, top=10)
    assert text.count(" why: ") == 10 and "your layout cannot run on so many ranks" in text
