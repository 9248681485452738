"""What has gone wrong where sequences are cut over ranks, each situation by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.autograd import backward
from parallel_core.config.schema import FlashAttentionConfig
from parallel_core.context_parallel.attention import ContextAttention
from parallel_core.layout.sequence import cut, positions
from parallel_core.training.batches import get_batch_on_this_cp_rank
from parallel_core.training.model import get_model
from parallel_core.transformer.rope import RotaryEmbedding
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_context_parallel import MANY_KEYS, SIXTEEN, Attend, D, groups_of, run
from tests.ranks.cases_layouts import check, settings
from tests.ranks.support import (
    LLAMA,
    SampleSource,
    Tiny,
    TinyRun,
    context_of,
    gather_values,
    provide_model,
    world_group,
)

EXCHANGES = [{"exchange": exchange} for exchange in ("p2p", "all_gather", "a2a")]
CUT_IN_TWO = [{"layout": f"cp2 {exchange}"} for exchange in ("p2p", "all_gather", "a2a")]


# ---- tokens that count ----------------------------------------------------------------------------------------------
class OnOneRank(SampleSource):
    """All tokens that count are between a quarter and three quarters of a sequence: on one of two ranks."""

    def _mask(self, rng: np.random.Generator, number: int, shape: tuple[int, int]) -> np.ndarray:
        S = shape[1]
        place = np.arange(S)
        return (place >= S // 4) & (place < 3 * S // 4) & (rng.random(shape) < 0.7) | (place == S // 2)


class OneToken(SampleSource):
    """One token of the whole batch counts."""

    def _mask(self, rng: np.random.Generator, number: int, shape: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(shape, bool)
        mask[-1, shape[1] // 2] = number == 1
        return mask


class NoToken(SampleSource):
    """No token of the whole batch counts."""

    def _mask(self, rng: np.random.Generator, number: int, shape: tuple[int, int]) -> np.ndarray:
        return np.zeros(shape, bool)


class PaddedTail(SampleSource):
    """Sequences of other lengths, padded at the end."""

    def _mask(self, rng: np.random.Generator, number: int, shape: tuple[int, int]) -> np.ndarray:
        return np.arange(shape[1]) < rng.integers(1, shape[1], (shape[0], 1))


LAYOUTS = ["cp2 p2p", "cp2 a2a"]
LAYOUTS_OF_4 = ["cp4 p2p", "cp2 all_gather pp2", "cp2 p2p distopt", "cp2 a2a tp2 sp"]
PER_TOKEN = {"calculate_per_token_loss": True}


def losses_and_gradients(ctx: CaseContext, layout: str, source: type[SampleSource], training: Any = None) -> None:
    common = Tiny(model=SIXTEEN, training=training or {})
    check(ctx, common, settings(layout).with_(model=SIXTEEN, training=training or {}), source=source)


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS])
def test_all_tokens_of_one_rank_are_masked(ctx: CaseContext, layout: str) -> None:
    """Dividing by the local number would be a division by zero on the one rank, and by too little on the other."""
    losses_and_gradients(ctx, layout, OnOneRank)


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS])
def test_one_token_of_the_batch_counts(ctx: CaseContext, layout: str) -> None:
    losses_and_gradients(ctx, layout, OneToken)


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS])
def test_tails_of_sequences_are_padding(ctx: CaseContext, layout: str) -> None:
    losses_and_gradients(ctx, layout, PaddedTail)


@case(world_size=2, variants=[{"source": "OnOneRank"}, {"source": "OneToken"}])
def test_unequal_masks_under_a_loss_per_token(ctx: CaseContext, source: str) -> None:
    losses_and_gradients(ctx, "cp2 p2p", {"OnOneRank": OnOneRank, "OneToken": OneToken}[source], PER_TOKEN)


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4])
def test_one_token_of_the_batch_counts_on_four_ranks(ctx: CaseContext, layout: str) -> None:
    losses_and_gradients(ctx, layout, OneToken, PER_TOKEN if "distopt" in layout else None)


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4])
def test_all_tokens_of_some_ranks_are_masked_on_four_ranks(ctx: CaseContext, layout: str) -> None:
    losses_and_gradients(ctx, layout, OnOneRank)


@case(world_size=2, variants=[{"layout": name, "training": each} for name in LAYOUTS for each in ({}, PER_TOKEN)])
def test_no_token_of_the_batch_counts(ctx: CaseContext, layout: str, training: Any) -> None:
    """Nothing is learned, nothing is reported, and no number becomes NaN."""
    tiny = settings(layout).with_(model=SIXTEEN, training=training)
    run = TinyRun(tiny, context_of(ctx, tiny), source=NoToken)
    before = run.parameters()
    (report,) = run.train()
    assert report.skipped and report.losses == {"lm loss": None} and report.grad_norm == 0.0
    assert all(not values.any() for values in run.gradients().values())
    after = run.parameters()
    assert all(np.array_equal(after[name], values) for name, values in before.items())
    assert run.evaluate() == {"lm loss": None}


@case(world_size=2, variants=[{"training": {}}, {"training": PER_TOKEN}])
def test_tokens_and_losses_are_counted_once_not_once_a_rank(ctx: CaseContext, training: Any) -> None:
    """Neither the loss nor the number of tokens is multiplied by the number of ranks that share a sequence."""
    counted: list[int] = []

    class Counted(SampleSource):
        def _mask(self, rng: np.random.Generator, number: int, shape: tuple[int, int]) -> np.ndarray:
            mask = super()._mask(rng, number, shape)
            counted.append(int(mask.sum()))
            return mask

    tiny = settings("cp2 p2p").with_(model=SIXTEEN, training=training)
    run = TinyRun(tiny, context_of(ctx, tiny), source=Counted)
    found: list[Any] = []
    reduce = run.step._reduce_scalars
    run.step._reduce_scalars = lambda *arguments: found.append(reduce(*arguments)) or found[-1]  # type: ignore
    (report,) = run.train()
    assert found[-1].tokens == sum(counted)
    loss = report.losses["lm loss"]
    assert loss is not None and abs(loss - np.log(32)) < 1.0  # of a model that knows nothing; not twice that


# ---- positions ------------------------------------------------------------------------------------------------------
@case(world_size=2)
def test_labels_are_shifted_before_the_cut_and_position_ids_are_the_sequences(ctx: CaseContext) -> None:
    text = np.arange(100, 117)[None]
    batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "position_ids": np.arange(16)[None]}
    part = get_batch_on_this_cp_rank(batch, world_group(ctx))
    np.testing.assert_array_equal(part["labels"], part["tokens"] + 1)
    np.testing.assert_array_equal(part["position_ids"], part["tokens"] - 100)
    parts = gather_values(world_group(ctx), part["tokens"])
    assert sorted(np.concatenate(parts, 1)[0]) == list(range(100, 116))


@case(world_size=2)
def test_rotary_tables_are_those_of_the_positions_that_a_rank_holds(ctx: CaseContext) -> None:
    config = LLAMA.with_(model=SIXTEEN).config().model_config
    rotary, mixed = RotaryEmbedding(config), np.random.default_rng(0).standard_normal((16, 1, 4, 8)).astype(np.float32)
    whole = rotary(Tensor(mixed), config.kv_channels, None).asnumpy()
    mine = positions(16, 2, ctx.rank)
    part = rotary(Tensor(mixed[mine]), config.kv_channels, mine).asnumpy()
    np.testing.assert_array_equal(part, whole[mine])


@case(world_size=2, variants=[{"kind": kind, "layout": "cp2 p2p"} for kind in ("rope", "learned_absolute")])
def test_position_ids_that_begin_again_reach_learned_positions_and_not_rotary_ones(
    ctx: CaseContext, kind: str, layout: str
) -> None:
    model = {**SIXTEEN, "position_embedding_type": kind}
    data = {"reset_position_ids": True, "reset_attention_mask": True}
    check(ctx, Tiny(model=model, data=data), settings(layout).with_(model=model, data=data))


@case(world_size=2, variants=EXCHANGES)
def test_documents_of_lengths_that_no_chunk_begins_at(ctx: CaseContext, exchange: str) -> None:
    """Documents of 9, 7 and 8 tokens in chunks of 6: blocks in which some rows see nothing give no NaN."""
    ops.use_kernels("auto")
    start = np.repeat([0, 9, 16], [9, 7, 8]).astype(np.int32)[None]
    compare(ctx, exchange, (24, 1, 4, 4), start)


def compare(
    ctx: CaseContext, exchange: str, shape: tuple[int, int, int, int], start: np.ndarray | None, factor: float = 1.0
) -> None:
    """Compare an exchange with one rank for S, B, N, G and scores of about `factor` squared."""
    S, B, N, G = shape
    rng = np.random.default_rng(S)
    mixed = (factor * rng.standard_normal((S, B, G, (N // G + 2) * D))).astype(np.float32)
    dout = rng.standard_normal((S, B, N * D)).astype(np.float32)
    options: dict[str, Any] = {"scale": 0.3, "document_start_BS": None if start is None else Tensor(start)}
    want, dwant = run(ops.causal_attention_packed, mixed, dout, softmax_in_fp32=True, **options)
    mine = positions(S, ctx.world_size, ctx.rank)
    attention = ContextAttention(groups_of(ctx, 2), exchange)
    out, gradient = run(attention.packed, cut(mixed, ctx.world_size, ctx.rank, 0), dout[mine].copy(), **options)
    rounding = max(5e-6, 2e-7 * factor**2)  # of sums, and of the scores, which grow with the factor squared
    for got, wanted in ((out, want), (gradient, dwant)):
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(got, wanted[mine], rtol=0, atol=rounding * np.abs(wanted).max())


# ---- blocks ---------------------------------------------------------------------------------------------------------
@case(world_size=4, variants=[{"exchange": "p2p"}, {"exchange": "a2a+p2p"}])
def test_backward_weighs_blocks_by_the_whole_softmax_and_sees_every_visitors_keys(
    ctx: CaseContext, exchange: str
) -> None:
    """Scores that differ much from block to block: a block's own sum, context or an earlier visitor's keys show."""
    ops.use_kernels("auto")
    compare(ctx, exchange, (64, 2, 4, 2), None, factor=3.0)


@case(world_size=(2, 4), variants=EXCHANGES)
def test_scores_whose_exponentials_overflow(ctx: CaseContext, exchange: str) -> None:
    ops.use_kernels("auto")
    compare(ctx, exchange, (32, 1, 4, 4), None, factor=30.0)


@case(world_size=4, variants=[{"exchange": "a2a", "heads": heads} for heads in ((4, 1), (4, 2), (8, 2))])
def test_fewer_key_heads_than_ranks(ctx: CaseContext, exchange: str, heads: tuple[int, int]) -> None:
    ops.use_kernels("auto")
    compare(ctx, exchange, (32, 1, *heads), None)


@case(world_size=4, variants=[{"exchange": exchange} for exchange in ("p2p", "all_gather", "a2a", "a2a+p2p")])
def test_half_precision_blocks_are_joined_in_single_precision(ctx: CaseContext, exchange: str) -> None:
    """The context is in the queries' type, and off by that type's rounding, however many blocks there are."""
    ops.use_kernels("local")
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((64, 1, 4, 3 * D)).astype(np.float16)
    dout = rng.standard_normal((64, 1, 4 * D)).astype(np.float16)
    want, dwant = run(ops.causal_attention_packed, mixed.astype(np.float32), dout.astype(np.float32), scale=0.3)
    mine = positions(64, 4, ctx.rank)
    attention = ContextAttention(groups_of(ctx, 2), exchange)
    out, gradient = run(attention.packed, cut(mixed, 4, ctx.rank, 0), dout[mine].copy(), scale=0.3)
    assert out.dtype == gradient.dtype == np.float16
    np.testing.assert_allclose(out, want[mine], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(gradient, dwant[mine], rtol=4e-3, atol=1e-2)


@case(world_size=2, variants=[{"layout": "cp2 p2p"}])
def test_a_run_in_half_precision_trains_like_one_rank(ctx: CaseContext, layout: str) -> None:
    in_half_precision(ctx, layout)


@case(world_size=2, variants=[{"layout": "cp2 all_gather"}, {"layout": "cp2 a2a"}], slow=True)
def test_runs_in_half_precision_train_like_one_rank(ctx: CaseContext, layout: str) -> None:
    in_half_precision(ctx, layout)


def in_half_precision(ctx: CaseContext, layout: str) -> None:
    model = {**SIXTEEN, "compute_dtype": "float16", "params_dtype": "float16"}
    scale = {"loss_scale": 64.0, "fp16": True}
    check(ctx, Tiny(model=model, training=scale), settings(layout).with_(model=model, training=scale), 2e-3)


# ---- state ----------------------------------------------------------------------------------------------------------
@case(world_size=2, variants=EXCHANGES)
def test_several_calls_in_flight_of_one_attention(ctx: CaseContext, exchange: str) -> None:
    """Nothing of a call is kept on the object: other lengths, other heads, backward in another order."""
    ops.use_kernels("auto")
    attention = ContextAttention(groups_of(ctx, 2), exchange)
    rng = np.random.default_rng(0)
    calls = []
    for S, N, G in ((16, 4, 4), (32, 8, 2), (16, 2, 2)):
        mixed = rng.standard_normal((S, 1, G, (N // G + 2) * D)).astype(np.float32)
        dout = rng.standard_normal((S, 1, N * D)).astype(np.float32)
        _, want = run(ops.causal_attention_packed, mixed, dout, scale=0.3)
        cell, entry = Attend(attention.packed, {"scale": 0.3}), Tensor(cut(mixed, 2, ctx.rank, 0))
        cell.set_grad(True)
        cell(entry)
        mine = positions(S, 2, ctx.rank)
        calls.append((cell, entry, Tensor(dout[mine].copy()), want[mine]))
    for number in (1, 0, 2):
        cell, entry, dout, want = calls[number]
        ((gradient, *_), _) = backward(cell, (entry,), [], dout)
        np.testing.assert_allclose(gradient.asnumpy(), want, rtol=0, atol=1e-5)


@case(world_size=2, variants=[{"words": words} for words in ("p2p,all_gather,a2a,p2p", "a2a,a2a,all_gather,p2p")])
def test_an_exchange_for_each_layer(ctx: CaseContext, words: str) -> None:
    layers = {**SIXTEEN, "attention_dropout_rate": 0.2}
    tiny = settings(f"cp2 {words}").with_(model=layers)
    context = context_of(ctx, tiny)
    run, used = TinyRun(tiny, context), []
    for layer in run.step.model.chunks[0].decoder.layers:
        attend = layer.self_attention.core_attention._attend
        used.append("a2a" if attend._heads.size > 1 else attend._function.__name__)
    assert used == [{"p2p": "_Ring", "all_gather": "_AllGather", "a2a": "a2a"}[w] for w in words.split(",")], used
    check(ctx, Tiny(model=layers), tiny)


@case(world_size=4)
def test_an_exchange_for_each_layer_over_pipeline_stages(ctx: CaseContext) -> None:
    """A stage asks for its layers' words, not for the first ones."""
    check(ctx, Tiny(model=SIXTEEN), settings("cp2 p2p,all_gather,a2a,p2p pp2 vpp2").with_(model=SIXTEEN))


@case(world_size=2, variants=[{"layout": f"cp2 {words}", "granularity": kind}
                              for words in ("p2p", "all_gather", "a2a") for kind in ("selective", "full")])  # fmt: skip
def test_recomputation_exchanges_again(ctx: CaseContext, layout: str, granularity: str) -> None:
    """With documents, windows and dropout that the replay must draw again."""
    model = {**SIXTEEN, "attention_dropout_rate": 0.3, "fa_config": FlashAttentionConfig(pre_tokens=9)}
    data = {"reset_attention_mask": True}
    again = {"recompute_granularity": granularity}
    if granularity == "full":
        again |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    check(ctx, Tiny(model=model, data=data), settings(layout).with_(model={**model, **again}, data=data))


# ---- dropout --------------------------------------------------------------------------------------------------------
@case(world_size=2)
def test_hidden_dropout_draws_other_masks_on_every_rank(ctx: CaseContext) -> None:
    """The same tokens on both ranks: what is dropped differs, and again where it is drawn again."""
    model = {**SIXTEEN, "hidden_dropout_rate": 0.5, "position_embedding_type": "none"}
    tiny = settings("cp2 p2p").with_(model=model)
    built = get_model(provide_model, tiny.config(), context_of(ctx, tiny))
    built.streams.training = True
    built.streams.start_microbatch(1, 0)
    embedding = built.chunks[0].embedding
    tokens = Tensor(np.full((2, 8), 3, np.int32))
    dropped = embedding(tokens, None).asnumpy() == 0.0
    built.streams.start_microbatch(1, 0)
    np.testing.assert_array_equal(embedding(tokens, None).asnumpy() == 0.0, dropped)
    masks = gather_values(world_group(ctx), dropped)
    shared = (masks[0] & masks[1]).mean()
    assert 0.4 < dropped.mean() < 0.6 and 0.15 < shared < 0.35  # independent: a quarter


@case(world_size=2)
def test_dropout_does_not_depend_on_the_exchange(ctx: CaseContext) -> None:
    """Hidden states of a rank are dropped alike whatever attention does, recomputed or not."""
    model = {**SIXTEEN, "hidden_dropout_rate": 0.3, "attention_dropout_rate": 0.3}
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    norms = []
    for words, more in (("p2p", {}), ("all_gather", {}), ("a2a", {}), ("p2p", again)):
        tiny = settings(f"cp2 {words}").with_(model={**model, **more})
        norms.append([report.grad_norm for report in TinyRun(tiny, context_of(ctx, tiny)).train(2)])
    np.testing.assert_allclose(norms[1:], [norms[0]] * 3, rtol=1e-5)


@case(world_size=4, variants=[{"layout": f"cp4 {words}"} for words in ("p2p", "all_gather", "a2a", "a2a+p2p")])
def test_attention_dropout_of_four_parts_draws_the_masks_of_one_rank(ctx: CaseContext, layout: str) -> None:
    model = {**MANY_KEYS, "seq_length": 32, "attention_dropout_rate": 0.3}
    check(ctx, LLAMA.with_(model=model), settings(layout).with_(model=model))
