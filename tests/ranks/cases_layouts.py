"""Every layout trains the same model: losses, gradient norms, gradients and parameters against one process."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np

from parallel_core.config.experts import MoEConfig
from parallel_core.config.schema import FlashAttentionConfig
from parallel_core.layout.sequence import EXCHANGES
from tests.helpers.cases import CaseContext, case
from tests.ranks.support import (
    LLAMA,
    SampleSource,
    Tiny,
    TinyRun,
    assert_close,
    context_of,
    from_rank_0,
    parallel_context,
)

ITERATIONS = 3
RTOL = 2e-6
"""fp32: sums over ranks and microbatches are made in another order, each off by up to 6e-8 of the largest term. (The
runs have Adam's eps at 1e-3: with 1e-8, gradients that are zero but for rounding, as a key bias's are, would move their
parameters by lr in either direction.)"""


@functools.cache
def reference(tiny: Tiny, source: type[SampleSource] = SampleSource) -> dict[str, Any]:
    """Train on one process."""
    run = TinyRun(tiny, parallel_context(0, 1), source=source)
    initial = run.parameters()
    reports = run.train(ITERATIONS)
    return {
        "initial": initial,
        "losses": [r.losses["lm loss"] for r in reports],
        "norms": [r.grad_norm for r in reports],
        "gradients": run.gradients(),
        "evaluation": run.evaluate()["lm loss"],
    }


def check(
    ctx: CaseContext, common: Tiny, layout: Tiny, rtol: float = RTOL, source: type[SampleSource] = SampleSource
) -> None:
    """Train `layout` on all ranks and `common` on one, and compare."""
    want = from_rank_0(ctx, lambda: reference(common, source))
    run = TinyRun(layout, context_of(ctx, layout), source=source)
    assert_close(run.parameters(), want["initial"], 0.0)  # Every layout starts from the same model
    reports = run.train(ITERATIONS)
    np.testing.assert_allclose([r.losses["lm loss"] for r in reports], want["losses"], rtol=rtol)
    np.testing.assert_allclose([r.grad_norm for r in reports], want["norms"], rtol=10 * rtol)
    assert_close(*map(without_rounding, (run.gradients(), want["gradients"])), 20 * rtol)
    run.parameters()  # replicas agree to the bit
    np.testing.assert_allclose(run.evaluate()["lm loss"], want["evaluation"], rtol=rtol)


def without_rounding(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the gradients without those that are zero but for rounding.

    A bias that all keys share adds the same to every score of a query, and the softmax does not see it; rotary
    positions turn it, and then it counts.
    """
    kept = {}
    for name, values in gradients.items():
        if name.endswith("k_layernorm.bias"):
            beside = np.abs(gradients[name.replace("bias", "weight")]).max()
            values = np.zeros_like(values) if np.abs(values).max() < 1e-4 * beside else values
        kept[name] = values
    return kept


def settings(layout: str) -> Tiny:
    """Return the run of a layout's name."""
    parallel: dict[str, Any] = {}
    training: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    for word in layout.split():
        if word.startswith("tp"):
            parallel["tensor_model_parallel_size"] = int(word[2:])
        elif word.startswith("pp"):
            parallel["pipeline_model_parallel_size"] = int(word[2:])
        elif word.startswith("vpp"):
            parallel["virtual_pipeline_model_parallel_size"] = int(word[3:])
        elif word.startswith("cp"):
            parallel["context_parallel_size"] = int(word[2:])
        elif set(word.split(",")) <= set(EXCHANGES):  # one, or one for each layer
            parallel["cp_comm_type"] = tuple(word.split(","))
            if "a2a+p2p" in word.split(","):
                parallel["hierarchical_context_parallel_sizes"] = (2, parallel["context_parallel_size"] // 2)
        elif word == "sp":
            parallel["sequence_parallel"] = True
        elif word == "distopt":
            training["use_distributed_optimizer"] = True
        elif word == "overlap":
            training |= {"overlap_grad_reduce": True, "bucket_size": 500}
            optimizer["overlap_param_gather"] = training.get("use_distributed_optimizer", False)
    return Tiny(parallel=parallel, training=training, optimizer=optimizer)


LAYOUTS_OF_2 = ["tp2", "tp2 sp", "pp2", "pp2 vpp2", "dp2", "dp2 distopt overlap"]
LAYOUTS_OF_4 = ["tp2 pp2", "tp2 sp pp2 vpp2", "tp4 sp", "pp4", "tp2 sp distopt overlap", "pp2 vpp2 distopt overlap"]
LAYOUTS_OF_8 = ["tp2 sp pp2 distopt overlap", "tp2 pp4"]


# ---- the same bits --------------------------------------------------------------------------------------------------
DETERMINISTIC = Tiny(
    model={
        "hidden_dropout_rate": 0.1,
        "moe": MoEConfig(num_experts=4, moe_layer_freq=(0, 1, 0, 1), moe_aux_loss_coeff=(0.01,)),
    },
    training={"deterministic_mode": True},
    data={"global_batch_size": 12},
)
"""Six microbatches of a model with a tied embedding, which a pipeline has on two stages, and with experts."""


def check_bits(ctx: CaseContext, layout: str, model: Any = None, **training: Any) -> None:
    common = DETERMINISTIC.with_(training=training, model=model or {})
    want = from_rank_0(ctx, lambda: reference(common))
    tiny = settings(layout)
    run = TinyRun(common.with_(**vars(tiny)), context_of(ctx, tiny))
    reports = run.train(ITERATIONS)
    assert [r.losses["lm loss"] for r in reports] == want["losses"]
    assert [r.grad_norm for r in reports] == want["norms"]
    assert_close(run.gradients(), want["gradients"], 0.0)
    assert run.evaluate()["lm loss"] == want["evaluation"]


@case(world_size=2, variants=[{"layout": name} for name in ("dp2", "dp2 distopt overlap", "pp2", "pp2 vpp2")])
def test_two_ranks_sum_in_the_order_of_one(ctx: CaseContext, layout: str) -> None:
    check_bits(ctx, layout)


@case(world_size=2, variants=[{"layout": "pp2"}, {"layout": "dp2"}])
def test_gradients_of_sixteen_bits_are_summed_in_the_order_of_one(ctx: CaseContext, layout: str) -> None:
    """Where a pipeline's ends each round their sum for the tied embedding, one rank does."""
    check_bits(ctx, layout, {"params_dtype": "float16"}, accumulate_allreduce_grads_in_fp32=False)


@case(world_size=3, variants=[{"per_token": False}, {"per_token": True}])
def test_three_ranks_sum_in_the_order_of_one(ctx: CaseContext, per_token: bool) -> None:
    check_bits(ctx, "dp3", calculate_per_token_loss=per_token)


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS_OF_2])
def test_two_ranks_train_like_one(ctx: CaseContext, layout: str) -> None:
    """GPT-2-like model, embedding tied over the stages, uneven loss masks."""
    check(ctx, Tiny(), settings(layout))


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4])
def test_four_ranks_train_like_one(ctx: CaseContext, layout: str) -> None:
    check(ctx, LLAMA, settings(layout).with_(model=LLAMA.model))


@case(world_size=8, variants=[{"layout": name} for name in LAYOUTS_OF_8], slow=True, timeout_s=300.0)
def test_eight_ranks_train_like_one(ctx: CaseContext, layout: str) -> None:
    check(ctx, Tiny(), settings(layout))


@case(world_size=2, variants=[{"layout": name} for name in ("tp2 sp", "pp2", "dp2 distopt")])
def test_per_token_loss_does_not_depend_on_the_layout(ctx: CaseContext, layout: str) -> None:
    """The loss that is reported and the one whose gradient is taken are both the mean over tokens."""
    extra = {"calculate_per_token_loss": True}
    check(ctx, Tiny(training=extra), settings(layout).with_(training=extra))


@case(world_size=2, variants=[{"layout": name} for name in ("tp2", "pp2", "pp2 vpp2", "dp2")])
def test_dropout_of_whole_tensors_does_not_depend_on_the_layout(ctx: CaseContext, layout: str) -> None:
    """The same masks wherever the tensor is whole.

    Attention is whole without tensor parallelism, hidden states without sequence parallelism: then not even the loss of
    a run with dropout changes. Data parallel ranks draw other masks for other samples, as one process does.
    """
    rates = {"hidden_dropout_rate": 0.3, "attention_dropout_rate": 0.0 if layout == "tp2" else 0.3}
    check(ctx, Tiny(model=rates), settings(layout).with_(model=rates))


@case(world_size=2, variants=[{"layout": name} for name in ("tp2 sp", "pp2 vpp2")])
def test_documents_are_kept_apart_in_every_layout(ctx: CaseContext, layout: str) -> None:
    """The mask reaches every stage, and is a lower bound on top of causality."""
    extra = {"reset_attention_mask": True}
    check(ctx, Tiny(data=extra), settings(layout).with_(data=extra))


@case(world_size=4, variants=[{"counts": ((1,), (0,), (2,), (1,))}, {"counts": ((0,), (2,), (2,), (0,))}])
def test_stages_without_layers_pass_on_what_they_get(ctx: CaseContext, counts: Any) -> None:
    """Empty stages, the first and the last among them."""
    check(ctx, Tiny(), settings("pp4").with_(parallel={"num_layer_list": counts}))


@case(world_size=2, variants=[{"layout": name} for name in ("tp2", "pp2", "dp2 distopt")])
def test_layers_that_do_nothing_are_left_out(ctx: CaseContext, layout: str) -> None:
    extra = {"noop_layers": (1,)}
    check(ctx, Tiny(parallel=extra), settings(layout).with_(parallel=extra))


@case(world_size=2, variants=[{"early": True}, {"early": False}])
def test_waiting_late_changes_nothing(ctx: CaseContext, early: bool) -> None:
    check(ctx, Tiny(), settings("pp2 vpp2").with_(parallel={"overlap_p2p_comm": not early}))


# ---- drawn layouts --------------------------------------------------------------------------------------------------
RTOL_OF_DRAWN = 1e-5
"""Some drawn models have six norms in series, which amplify rounding; a wrong sum or mask is off by 1e-2 or more."""


def draw(seed: int, world_size: int) -> tuple[Tiny, Tiny]:
    """Return (model and training options, the same with a layout) that are legal for `world_size` ranks."""
    rng = random.Random(1000 * world_size + seed)
    axes = ("tp", "pp", "cp", "dp")
    factors = [axes[seed % 4], *rng.choices(axes, k=world_size.bit_length() - 2)]  # four seeds have every axis
    tp, pp, cp, dp = (2 ** factors.count(axis) for axis in axes)
    vpp = rng.choice([1, 2]) if pp == 2 else 1
    groups = 4 if tp == 4 else rng.choice([4, 2])
    model: dict[str, Any] = {
        "kernels": "local" if world_size == 2 and seed % 5 == 4 else "auto",
        "hidden_act": rng.choice(["gelu", "gelu_tanh", "openai_gelu", "squared_relu", "swiglu", "relu", "silu"]),
        "normalization": rng.choice(["LayerNorm", "RMSNorm"]),
        "position_embedding_type": rng.choice(["rope", "learned_absolute", "none"]),
        "rotary_percent": rng.choice([1.0, 0.5]),
        "rotary_interleaved": rng.random() < 0.5,
        "kv_channels": rng.choice([4, 8]),
        "group_query_attention": groups != 4,
        "num_query_groups": 0 if groups == 4 else groups,
        "qk_layernorm": rng.random() < 0.4,
        "apply_layernorm_1p": rng.random() < 0.3,
        "use_sandwich_norm": rng.random() < 0.4,
        "attn_post_norm_scale": 0.5,
        "add_bias_linear": rng.random() < 0.5,
        "qkv_has_bias": rng.random() < 0.5,
        "out_proj_has_bias": rng.random() < 0.5,
        "untie_embeddings_and_output_weights": rng.random() < 0.5,
        "apply_residual_connection_post_layernorm": rng.random() < 0.2,
        "label_smoothing": rng.choice([0.0, 0.1]),
        "hidden_dropout_rate": rng.choice([0.0, 0.2]) if cp == 1 else 0.0,  # each part draws its own masks
        "attention_dropout_rate": 0.2 if tp == 1 and rng.random() < 0.5 else 0.0,
        "recompute_granularity": rng.choice(["none", "none", "selective", "full"]),
    }
    if model["recompute_granularity"] == "full":
        model |= {"recompute_method": rng.choice(["uniform", "block"]), "recompute_num_layers": rng.choice([1, 2])}
    if cp > 1:
        model |= {"seq_length": 8 * cp}
        if model["kernels"] == "local":
            model["attention_dropout_rate"] = 0.0  # plain operators draw by block
        if rng.random() < 0.4:
            model["fa_config"] = FlashAttentionConfig(pre_tokens=rng.randrange(1, 8 * cp))
    training = {
        "overlap_grad_reduce": rng.random() < 0.5,
        "average_in_collective": rng.random() < 0.5,
        "use_distributed_optimizer": dp * cp > 1 and rng.random() < 0.6,
        "bucket_size": rng.choice([0, 300, 2000]),
    }
    parallel: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "sequence_parallel": tp > 1 and rng.random() < 0.6 and not model["hidden_dropout_rate"],
        "overlap_p2p_comm": rng.random() < 0.5,
    }
    if cp > 1:
        dealt = ["a2a"] * (4 // tp % cp == 0) + ["a2a+p2p"] * (cp >= 4 and 4 // tp % 2 == 0)
        words = ["p2p", "all_gather", *dealt]
        every = tuple(rng.choice(words) for _ in range(4))
        parallel |= {"context_parallel_size": cp, "cp_comm_type": every if rng.random() < 0.5 else every[:1]}
        if "a2a+p2p" in parallel["cp_comm_type"]:
            parallel["hierarchical_context_parallel_sizes"] = (2, cp // 2)
    if pp > 1 and vpp == 1 and rng.random() < 0.4:
        parallel["num_layer_list"] = {2: ((1,), (3,)), 4: ((1,), (2,), (0,), (1,))}[pp]
    gather = training["use_distributed_optimizer"] and training["overlap_grad_reduce"] and rng.random() < 0.5
    common = Tiny(
        model=model,
        training={"calculate_per_token_loss": rng.random() < 0.3},
        data={"reset_attention_mask": rng.random() < 0.3, "batch_size": rng.choice([1, 2])},
        optimizer={"learning_rate": 1e-3},  # not where a rounding in one update becomes another curve in the next
    )
    return common, common.with_(parallel=parallel, training=training, optimizer={"overlap_param_gather": gather})


@case(world_size=2, variants=[{"seed": seed} for seed in range(6)])
def test_drawn_layouts_of_two_ranks_train_like_one(ctx: CaseContext, seed: int) -> None:
    check(ctx, *draw(seed, 2), RTOL_OF_DRAWN)


@case(world_size=4, variants=[{"seed": seed} for seed in range(4)])
def test_drawn_layouts_of_four_ranks_train_like_one(ctx: CaseContext, seed: int) -> None:
    check(ctx, *draw(seed, 4), RTOL_OF_DRAWN)


@case(world_size=(2, 4), variants=[{"seed": seed} for seed in range(6, 18)], slow=True)
def test_more_drawn_layouts_train_like_one(ctx: CaseContext, seed: int) -> None:
    check(ctx, *draw(seed, ctx.world_size), RTOL_OF_DRAWN)


@case(world_size=8, variants=[{"seed": seed} for seed in range(2)], slow=True, timeout_s=300.0)
def test_drawn_layouts_of_eight_ranks_train_like_one(ctx: CaseContext, seed: int) -> None:
    check(ctx, *draw(seed, 8), RTOL_OF_DRAWN)
