"""The plan's numbers against models counted by hand and by Megatron's own weights, and its speed at scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from config_helpers import ROOT, argv, load
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.config import load_config
from parallel_core.config.expert_plan import exchanged_bytes
from parallel_core.config.multi_token import MTPConfig
from parallel_core.config.plan import (
    active_parameters,
    in_flight,
    make_plan,
    model_parameters,
    num_floating_point_operations,
    rank_memory,
)
from parallel_core.config.plan_text import plan_text
from parallel_core.errors import ConfigError
from parallel_core.layout.derived import BatchSizes
from parallel_core.layout.stages import stage_layout
from parallel_core.pipeline.figures import peak_in_flight
from parallel_core.pipeline.schedule import make_schedule

LLAMA = [
    "--normalization", "RMSNorm", "--position-embedding-type", "rope", "--swiglu", "--ffn-hidden-size", "176",
    "--disable-bias-linear", "--group-query-attention", "--num-query-groups", "2",
    "--untie-embeddings-and-output-weights",
]


def test_parameters_of_gpt2_by_hand():
    config = load_config(["--config", str(ROOT / "configs" / "gpt2_124m.yaml")]).config
    layer = 12 * 768 * 768 + (4 + 9) * 768  # two norms of 2h; biases 3h + h + 4h + h
    assert model_parameters(config.model_config) == 50304 * 768 + 1024 * 768 + 12 * layer + 2 * 768


@pytest.mark.parametrize(("name", "words"), [("gpt2", []), ("llama", LLAMA)])
def test_parameters_of_megatrons_own_models(name, words):
    file = ROOT / "tests" / "golden" / "checkpoint" / name / "params_0010.npz"
    if not file.exists():
        pytest.skip(f"{file.name} of {name} is not in this checkout")
    arrays = np.load(file)
    assert model_parameters(load(*words).config.model_config) == sum(arrays[key].size for key in arrays.files)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
                                  ("qwen3_30b_a3b", 30_532_122_624, 3_353_032_704)]
)  # fmt: skip
def test_parameters_of_public_mixtures_of_experts(name, total, active):
    """The published numbers; what the ranks hold adds up to them."""
    loaded = load_config(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    config = loaded.config
    assert model_parameters(config.model_config) == total and active_parameters(config.model_config) == active
    plan = make_plan(config, loaded.world_size)
    parallel, expert = config.parallel_config, sum(stage.experts for stage in plan.parameters)
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    one = config.model_config.moe.moe_ffn_hidden_size * config.model_config.hidden_size * 3
    assert expert * ranks == config.model_config.num_layers * config.model_config.moe.num_experts * one
    text = plan_text(plan)
    assert f"of them active for a token: {active:,}" in text and "exchange (alltoall): " in text


def test_parameters_of_megatrons_own_mixture_of_experts():
    words = [*LLAMA, "--num-experts", "4", "--moe-ffn-hidden-size", "96"]
    with np.load(ROOT / "tests" / "golden" / "parity" / "moe_mixtral" / "params_0000.npz") as arrays:
        assert model_parameters(load(*words).config.model_config) == sum(arrays[key].size for key in arrays.files)


def test_what_ranks_exchange():
    """Rows of 64 float32 elements: 3 of 4 copies leave the rank; gathered, every token goes to the 3 others."""
    words = ["--num-experts", "4", "--expert-model-parallel-size", "4", "--micro-batch-size", "1"]
    config = load(*words, "--moe-token-dispatcher-type", "alltoall", without=("micro_batch_size",)).config
    assert exchanged_bytes(config, 4) == 4 * 32 * 2 * 64 * 4 * 3 // 4
    assert exchanged_bytes(load(*words, without=("micro_batch_size",)).config, 4) == 4 * 32 * 3 * 64 * 4
    assert exchanged_bytes(load("--num-experts", "4").config, 4) == 0


LATENT = """
    --normalization RMSNorm --position-embedding-type rope --swiglu --ffn-hidden-size 64 --disable-bias-linear
    --untie-embeddings-and-output-weights --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16
    --qk-pos-emb-head-dim 8 --v-head-dim 12 --qk-layernorm
""".split()


def test_parameters_of_megatrons_own_multi_latent_attention():
    with np.load(ROOT / "tests" / "golden" / "parity" / "mla_dense" / "params_0000.npz") as arrays:
        elements = sum(arrays[key].size for key in arrays.files)
    words = ["16" if word == "12" else word for word in LATENT]
    assert model_parameters(load(*words).config.model_config) == elements


@pytest.mark.parametrize(("name", "billions"), [("deepseek_v2_lite", 15.7065), ("deepseek_v3", 671.0264)])
def test_parameters_of_published_models(name, billions):
    """As many as the published models have, V3 without its prediction layer."""
    model = load_config(["--config", str(ROOT / "configs" / f"{name}.yaml")]).config.model_config
    assert round(model_parameters(replace(model, mtp=MTPConfig())) / 1e9, 4) == billions


def test_multi_latent_attention_over_tensor_parallel_ranks():
    config = load(*LATENT, "--tensor-model-parallel-size", "2").config
    plan = make_plan(config, 2)
    down = 64 * (24 + 16 + 8) + 24 + 16  # projections to latents and their norms, whole on every rank
    up = 4 * ((16 + 8) * 24 + (16 + 12) * 16 + 12 * 64)
    assert plan.parameters[0].layers == 4 * (2 * 64 + 3 * 64 * 64 // 2 + down + up // 2)


def test_operations_of_multi_latent_attention_by_hand():
    config = load(*LATENT).config
    products = 64 * (24 + 16 + 8) + 4 * ((16 + 8) * 24 + (16 + 12) * 16 + 12 * 64)
    scores = 4 * (32 // 2) * (16 + 8 + 12)  # causal: half of the keys
    forward = 2 * (4 * (products + scores + 3 * 64 * 64) + 64 * 256)
    assert num_floating_point_operations(config, 8) == 3 * 8 * 32 * forward


@pytest.mark.parametrize("words", [[], LLAMA, ["--use-sandwich-norm", "--qk-layernorm"]])
@pytest.mark.parametrize("layout", ["2 1", "1 2", "2 2", "2 4"])
def test_stages_add_up_to_the_model(words, layout):
    tp, pp = layout.split()
    config = load(*words, "--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp,
                  "--sequence-parallel").config
    plan = make_plan(config, int(tp) * int(pp))
    model = config.model_config
    held = int(tp) * sum(stage.total - stage.tied_copy for stage in plan.parameters)
    h, norm = model.hidden_size, model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    per_layer = norm * (4 if model.use_sandwich_norm else 2) + (2 * h if model.add_bias_linear else 0)
    per_layer += 4 * model.kv_channels if model.qk_layernorm else 0
    positions = model.max_position_embeddings * h if model.position_embedding_type == "learned_absolute" else 0
    repeated = (int(tp) - 1) * (model.num_layers * per_layer + norm + positions)  # what every tensor rank holds
    assert held == model_parameters(model) + repeated


def test_operations_by_hand():
    config = load(*LLAMA).config
    layers, h, ffn, seq, vocab, batch = 4, 64, 176, 32, 256, 8
    projections = h * h + 2 * h * 32 + h * h  # query, key and value of 2 groups of 16, output
    scores = seq * h  # causal: half of 2 * s * h
    forward = 2 * (layers * (projections + 3 * h * ffn + scores) + h * vocab)
    assert num_floating_point_operations(config, batch) == 3 * batch * seq * forward


@pytest.mark.parametrize("words", [
    "", "--pipeline-model-parallel-size 4", "--pipeline-model-parallel-size 2 --virtual-pipeline-model-parallel-size 2",
    "--pipeline-model-parallel-size 4 --virtual-pipeline-model-parallel-size 2",
    "--pipeline-model-parallel-size 4 --pipeline-schedule zero-bubble",
    "--pipeline-model-parallel-size 4 --virtual-pipeline-model-parallel-size 2 --enable-zero-bubble",
])
@pytest.mark.parametrize("number", [4, 8, 16])
def test_activations_in_flight_are_the_schedules(words, number):
    config = load(*words.split(), "--num-layers", "8", "--global-batch-size", str(2 * number),
                  without=("num_layers",)).config
    parallel = config.parallel_config
    steps = make_schedule(parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size, number,
                          name=parallel.pipeline_schedule)
    for rank, actions in enumerate(steps):
        assert in_flight(config, rank) == peak_in_flight(actions)


def test_memory_by_hand():
    words = ["--bf16", "--attention-dropout", "0", "--hidden-dropout", "0", "--use-flash-attn",
             "--use-distributed-optimizer"]
    config = load(*words, "--global-batch-size", "8", world_size=4).config
    memory = rank_memory(config, stage_layout(4, config.parallel_config), 0, dp=4)
    count = model_parameters(config.model_config)
    assert memory.weights == 2 * count and memory.gradients == 4 * count and memory.optimizer == 12 * count // 4
    tokens, h = 2 * 32, 64
    kept = 2 * (4 * h + 2 * h + 2 * h + 2 * 4 * h)  # bytes per token and layer
    assert memory.activations == 4 * tokens * kept + tokens * 256 * 4
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


@pytest.mark.parametrize(("chunks", "late"), [("1", 3), ("2", 2)])
def test_late_gradients_of_the_output_layer_by_hand(chunks, late):
    """The last of 4 ranks keeps the logits' gradients of the passes whose weights' part is late; 1F1B keeps none."""
    words = ["--pipeline-model-parallel-size", "4", "--virtual-pipeline-model-parallel-size", chunks, "--num-layers",
             "8", "--global-batch-size", "32"]
    wide, narrow = (load(*words, "--padded-vocab-size", str(vocab), "--enable-zero-bubble",
                         without=("num_layers", "padded_vocab_size")).config for vocab in (512, 256))
    layout, tokens = stage_layout(8, wide.parallel_config), 2 * 32
    more = [rank_memory(config, layout, 3, 1).activations for config in (wide, narrow)]
    assert more[0] - more[1] == (1 + late) * tokens * 256 * 4


def smaller(*pair):
    (less, more) = (rank_memory(c, stage_layout(c.model_config.num_layers, c.parallel_config), 0, 2) for c in pair)
    return less.activations < more.activations


def test_what_saves_memory_saves_it_in_the_plan():
    scores = "--global-batch-size", "8", "--no-use-flash-attn"
    plain, selective = load(*scores).config, load(*scores, "--recompute-activations").config
    assert smaller(load("--global-batch-size", "8").config, plain)
    full = load("--global-batch-size", "8", "--recompute-granularity", "full", "--recompute-method", "uniform",
                "--recompute-num-layers", "1").config
    assert smaller(full, selective) and smaller(selective, plain)
    tp = ["--tensor-model-parallel-size", "2", *scores]
    assert smaller(load(*tp).config, plain) and smaller(load(*tp, "--sequence-parallel").config, load(*tp).config)


def test_text_of_a_small_plan():
    loaded = load("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                  "--global-batch-size", "8", world_size=8)
    text = plan_text(make_plan(loaded.config, 8))
    for part in ("ranks: 8 = tp 2 x cp 1 x dp 2 x pp 2", "layers per pipeline rank: 2, 2", "[embedding, 0-1]",
                 "[2-3, norm, head, loss]", "1F1B, 2 microbatches", "F1.0"):
        assert part in text
    assert "      5 |    1 |    0 |    0 |    1" in text  # rank 5: second of its tensor group, second stage


def test_ten_thousand_ranks():
    words = ["--config", str(ROOT / "configs" / "pangu_38b.yaml"), "--global-batch-size", "10240"]
    loaded = load_config(words, world_size=10240)
    text = plan_text(make_plan(loaded.config, 10240))
    assert "ranks: 10240 = tp 8 x cp 1 x dp 320 x pp 4" in text and len(text.splitlines()) < 40
    assert "layers per pipeline rank: 16, 16, 16, 14" in text and "interleaved 1F1B, 4 chunks per rank" in text
    everything = plan_text(make_plan(loaded.config, 10240), every_rank=True)
    assert len(everything.splitlines()) > 10240


@settings(max_examples=150, deadline=None)
@given(
    pp=st.integers(2, 3), dp=st.integers(1, 2), start=st.integers(1, 8), increment=st.integers(1, 5),
    steps=st.integers(1, 4), extra=st.none() | st.integers(0, 3),
)
def test_every_size_of_a_ramp_up_has_a_schedule_or_the_configuration_is_refused(
    pp, dp, start, increment, steps, extra
):
    """The plan and the run ask the same rules: nothing that passes them ends a run in its middle."""
    group = None if extra is None else pp + extra
    counts = [start + increment * step for step in range(steps + 1)]
    words = argv(
        "--num-layers", str(2 * pp), "--pipeline-model-parallel-size", str(pp),
        "--num-layers-per-virtual-pipeline-stage", "1", "--train-samples", "1000",
        "--global-batch-size", str(2 * dp * counts[-1]),
        "--rampup-batch-size", str(2 * dp * start), str(2 * dp * increment), "100",
        *([] if group is None else ["--microbatch-group-size-per-virtual-pipeline-stage", str(group)]),
        without=("num_layers", "train_iters"),
    )
    try:
        loaded = load_config(words, world_size=pp * dp)
    except ConfigError as error:
        assert "the interleaved schedule takes microbatches in groups" in str(error)
        with pytest.raises(ConfigError):
            [make_schedule(pp, 2, count, group_size=group or 0) for count in counts]
        return
    data = loaded.config.dataset_config
    sizes = BatchSizes(data.global_batch_size, data.batch_size, dp, data.rampup_batch_size)
    for size in sizes.sizes():
        make_schedule(pp, 2, sizes.microbatches_of(size), group_size=group or 0)
    assert loaded.config.training_config.training_iters == sizes.iterations_of(1000)
    make_plan(loaded.config, pp * dp)
