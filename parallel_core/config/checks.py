"""Rules across values, each named: what must hold before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator

from parallel_core.config.classifier_checks import CLASSIFIER_CHECKS
from parallel_core.config.conversation_checks import CONVERSATION_CHECKS
from parallel_core.config.diagnosis_checks import DIAGNOSIS_CHECKS
from parallel_core.config.expert_checks import EXPERT_CHECKS
from parallel_core.config.interleave_checks import INTERLEAVE_CHECKS
from parallel_core.config.lora_checks import LORA_CHECKS
from parallel_core.config.model_checks import MODEL_CHECKS
from parallel_core.config.resolution import LARGEST, Resolution, Rules
from parallel_core.config.schema import ROTARY, ModelParallelConfig
from parallel_core.config.values import is_memory_size
from parallel_core.config.watching_checks import WATCHING_CHECKS
from parallel_core.errors import ConfigError
from parallel_core.layout.derived import BatchSizes, decay_length, layers_to_place
from parallel_core.layout.sequence import EXCHANGES
from parallel_core.layout.stages import stage_layout

CHECKS = Rules({
    **MODEL_CHECKS, **EXPERT_CHECKS, **LORA_CHECKS, **CONVERSATION_CHECKS, **WATCHING_CHECKS, **INTERLEAVE_CHECKS,
    **DIAGNOSIS_CHECKS, **CLASSIFIER_CHECKS,
})  # fmt: skip


def _not_a_multiple(value: int, of: int) -> str:
    below, above = value // of * of, (value // of + 1) * of
    return f"{value} is not a multiple of {of}; write {f'{below} or {above}' if below else above}"


def _divisors_near(value: int, near: int) -> str:
    """Return the divisors of `value` on both sides of `near`, in words."""
    start = min(near, value)
    below = next((n for n in range(start, max(0, start - _FAR), -1) if value % n == 0), 1)
    above = next((n for n in range(near + 1, near + _FAR) if value % n == 0), None)
    return f"{below}{'' if above is None else f' or {above}'}"


_FAR = 4096
"""How far from a wrong size a right one is looked for."""


@CHECKS
def required(r: Resolution) -> None:
    """Sizes that nothing else determines must be given."""
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        if r[name] is None and name not in r.unreadable:
            flag = f"--{name.replace('_', '-')}"
            r.problems.append(f"{name}: required, and not given; add {name} to the file or {flag} N")
    trains = (r["train_iters"] or r["train_samples"]) and not r["skip_train"]
    if r["lr"] is None and "lr" not in r.unreadable and trains:
        r.problems.append("lr: required to train, and not given; add lr to the file or --lr X")


_POSITIVE = """
    num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels num_query_groups seq_length
    max_position_embeddings padded_vocab_size make_vocab_size_divisible_by rotary_base norm_epsilon
    rotary_seq_len_interpolation_factor rope_scaling_factor rope_low_freq_factor rope_high_freq_factor
    rope_original_max_position_embeddings yarn_rotary_scaling_factor yarn_beta_fast yarn_beta_slow
    yarn_attention_factor softmax_scale embedding_multiplier tensor_model_parallel_size pipeline_model_parallel_size
    context_parallel_size virtual_pipeline_model_parallel_size micro_batch_size global_batch_size micro_batch_num
    log_interval eval_interval initial_loss_scale min_loss_scale loss_scale_window hysteresis keep_checkpoint_max
    distributed_timeout_minutes adam_eps ddp_bucket_size decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers microbatch_group_size_per_vp_stage num_layers_per_virtual_pipeline_stage
"""
_NOT_NEGATIVE = """
    seed train_iters train_samples eval_iters save_interval exit_interval exit_duration_in_mins lr min_lr
    lr_warmup_iters lr_warmup_samples lr_warmup_init lr_decay_iters lr_decay_samples lr_wsd_decay_iters
    lr_wsd_decay_samples decoupled_lr decoupled_min_lr weight_decay start_weight_decay end_weight_decay clip_grad
    loss_scale num_workers init_method_std embedding_init_method_std recompute_num_layers ckpt_step
    attn_post_norm_scale ffn_post_norm_scale profile_step_start pre_tockens vocab_extra_ids yarn_mscale
    yarn_mscale_all_dim
"""
_SHARES = ("attention_dropout", "hidden_dropout", "label_smoothing", "adam_beta1", "adam_beta2", "sgd_momentum")


@CHECKS
def ranges(r: Resolution) -> None:
    """Counts and sizes are above zero and can be meant, rates are not negative, dropout and decays lie in [0, 1)."""
    for name in _POSITIVE.split():
        if r[name] is not None and r[name] <= 0 and name not in r.derived:
            r.fail(name, "must be above zero")
    for name in _NOT_NEGATIVE.split():
        if r[name] is not None and r[name] < 0 and name not in r.derived:
            r.fail(name, "must not be negative")
    for name, most in LARGEST.items():
        if r[name] is not None and r[name] > most:
            r.fail(name, f"must be at most {most}")
    for name in _SHARES:
        if not 0 <= r[name] < 1:
            r.fail(name, "must be at least 0 and below 1")
    if not 0 < r["rotary_percent"] <= 1:
        r.fail("rotary_percent", "must be above 0 and at most 1")
    if r["lr_warmup_fraction"] is not None and not 0 <= r["lr_warmup_fraction"] <= 1:
        r.fail("lr_warmup_fraction", "must be from 0 to 1")
    if r["betas"] is not None and len(r["betas"]) != 2:
        r.fail("betas", "takes two numbers, adam_beta1 and adam_beta2")
    if r["max_device_memory"] and not is_memory_size(r["max_device_memory"]):
        r.fail("max_device_memory", "is a size above zero; write for example 58GB")
    if not -1 <= r["profile_aicore_metrics"] <= 6:
        r.fail("profile_aicore_metrics", "must be from -1 to 6")


@CHECKS
def positions(r: Resolution) -> None:
    """The position table covers the sequence, and rotary embeddings turn pairs of channels."""
    longest = r["max_position_embeddings"]
    if r["seq_length"] and longest and longest < r["seq_length"] and r["rope_dynamic_factor"] == 1.0:
        r.fail("max_position_embeddings seq_length", "there must be a position for every token of a sample")
    if r["position_embedding_type"] in ROTARY and r.positive("kv_channels") and not r["multi_latent_attention"]:
        turned = int(r["kv_channels"] * r["rotary_percent"])
        if turned % 2 or turned == 0:
            r.fail("kv_channels rotary_percent", f"rotates {turned} channels of each head; it must be an even number")


@CHECKS
def heads(r: Resolution) -> None:
    """Heads divide over groups."""
    if not all(map(r.positive, ("num_attention_heads", "num_query_groups"))):
        return
    if r["num_attention_heads"] % r["num_query_groups"]:
        r.fail("num_attention_heads num_query_groups", "heads must be a multiple of groups")


@CHECKS
def tensor_parallel(r: Resolution) -> None:
    """What tensor parallel ranks share must divide: heads and groups, FFN width, vocabulary, and sequence under SP."""
    tp = r["tensor_model_parallel_size"]
    shared = ["num_attention_heads", *(["num_query_groups"] if r["group_query_attention"] else []), "ffn_hidden_size",
              "padded_vocab_size", *(["seq_length"] if r["sequence_parallel"] else [])]
    shared = [name for name in shared if r.positive(name)]
    wrong = [name for name in shared if r.positive("tensor_model_parallel_size") and r[name] % tp]
    if len(wrong) == 1:
        r.fail(f"{wrong[0]} tensor_model_parallel_size", _not_a_multiple(r[wrong[0]], tp))
    elif wrong:  # then the size is the odd one out
        common = math.gcd(*(r[name] for name in shared))
        r.fail("tensor_model_parallel_size",
               f"does not divide {', '.join(map(r.term, wrong))}; write {_divisors_near(common, tp)}, or change them")
    if r["vocab_size"] and r["padded_vocab_size"] and r["padded_vocab_size"] < r["vocab_size"]:
        r.fail("padded_vocab_size vocab_size", "the padded vocabulary is smaller than the vocabulary")


@CHECKS
def context_parallel(r: Resolution) -> None:
    """Sequences are cut into two chunks for each context parallel rank, and exchanges deal out what they exchange."""
    cp, tp = r["context_parallel_size"], r["tensor_model_parallel_size"]
    if not all(map(r.positive, ("context_parallel_size", "tensor_model_parallel_size", "seq_length"))) or cp == 1:
        return
    if r["rope_dynamic_factor"] != 1.0:
        # frequencies follow the longest position, of which every rank sees another one
        r.fail("rope_dynamic_factor context_parallel_size", "dynamic frequencies are not built for a cut sequence; "
               "use --position-embedding-type yarn, or context_parallel_size 1")
    exchanges: tuple[str, ...] = r["cp_comm_type"]
    levels: tuple[int, ...] = r["hierarchical_context_parallel_sizes"] or ()
    wrong = sorted(set(exchanges) - set(EXCHANGES))
    if wrong or len(exchanges) not in (1, r["num_layers"]):
        words = ", ".join(EXCHANGES)
        r.fail("cp_comm_type", f"takes one word, or one for each of {r['num_layers']} layers, of {words}")
        return
    _check_cut(r, cp, tp)
    hierarchical = "a2a+p2p" in exchanges
    if hierarchical and (len(levels) != 2 or min(levels) < 1 or levels[0] * levels[1] != cp):
        asked = levels[0] if levels and levels[0] > 0 else r["ulysses_degree_in_cp"] or 2
        pairs = sorted(((n, cp // n) for n in range(1, cp + 1) if cp % n == 0), key=lambda pair: abs(pair[0] - asked))
        if r["context_parallel_algo"] == "hybrid_cp_algo" and not levels:
            r.fail("context_parallel_algo ulysses_degree_in_cp context_parallel_size",
                   f"the degree must divide {cp}; write {' or '.join(str(inner) for inner, _ in pairs[:2])}")
            return
        write = " or ".join(f"{inner} {ring}" for inner, ring in pairs[:2])
        r.fail("hierarchical_context_parallel_sizes context_parallel_size",
               f"a2a+p2p needs two numbers whose product is {cp}; write {write}")
        return
    if levels and not hierarchical:
        r.fail("hierarchical_context_parallel_sizes cp_comm_type", "belong to a2a+p2p")
    for ranks in sorted({cp if word == "a2a" else levels[0] for word in exchanges if word.startswith("a2a")}):
        _check_heads(r, tp, ranks)


def _check_cut(r: Resolution, cp: int, tp: int) -> None:
    steps = {"two chunks for each rank": 2 * cp}
    if r["sequence_parallel"]:
        steps["two chunks, and sequence parallelism cuts each rank's part"] = math.lcm(2 * cp, cp * tp)
    if r["attention_dropout"]:
        steps["chunks of four positions, by which dropout draws"] = 8 * cp
    for what, step in steps.items():
        if r["seq_length"] % step:
            r.fail("seq_length context_parallel_size", f"{what}: {_not_a_multiple(r['seq_length'], step)}")
            return


def _check_heads(r: Resolution, tp: int, ranks: int) -> None:
    """Heads of a tensor parallel rank are dealt out to `ranks`; key heads too, or each is repeated on equally many."""
    heads, groups = r["num_attention_heads"] // tp, max(1, r["num_query_groups"] // tp)
    if heads % ranks:
        r.fail("num_attention_heads tensor_model_parallel_size context_parallel_size",
               f"a2a deals {heads} heads out to {ranks} ranks: {_not_a_multiple(heads, ranks)}; or use another "
               "cp_comm_type")
    elif groups % ranks and ranks % groups:
        r.fail("num_query_groups tensor_model_parallel_size context_parallel_size",
               f"a2a deals {groups} key heads out to {ranks} ranks: one number must divide the other; write "
               f"{_groups_near(heads, groups, ranks, tp)}, or use another cp_comm_type, such as all_gather")


def _groups_near(heads: int, groups: int, ranks: int, tp: int) -> str:
    """Return the numbers of key heads on both sides of `groups`, each tensor parallel rank's, that can be dealt out."""
    legal = [n for n in range(1, heads + 1) if heads % n == 0 and (n % ranks == 0 or ranks % n == 0)]
    below, above = ([n for n in legal if n < groups], [n for n in legal if n > groups])
    return " or ".join(str(n * tp) for n in (*below[-1:], *above[:1]))


@CHECKS
def world(r: Resolution) -> None:
    """The ranks are a multiple of tensor x pipeline x context parallel size, and at least one of each."""
    sizes = [r[f"{axis}_parallel_size"] for axis in ("tensor_model", "pipeline_model", "context")]
    if r.world_size is None or min(sizes) < 1:
        return
    model = sizes[0] * sizes[1] * sizes[2]
    if r.world_size < 1 or r.world_size % model:
        nearest = max(1, round(r.world_size / model)) * model
        r.fail("tensor_model_parallel_size pipeline_model_parallel_size",
               f"{r.world_size} processes are not a multiple of {' x '.join(map(str, sizes))} = {model}; "
               f"start {nearest}, or change the sizes")


@CHECKS
def microbatches(r: Resolution) -> None:
    """Global batch = micro batch x data parallel size x microbatches, also at every size of the ramp-up."""
    micro, dp = r["micro_batch_size"], r.values.get("data_parallel_size")
    if not r.positive("micro_batch_size") or not dp or not r.positive("global_batch_size"):
        return
    total, number = r["global_batch_size"], r["micro_batch_num"]
    if total % (micro * dp) == 0 and number is not None and micro * dp * number != total:
        r.fail("micro_batch_num global_batch_size micro_batch_size",
               f"{micro} x data parallel size {dp} x {number} microbatches = {micro * dp * number}, not {total}; "
               "leave out micro_batch_num")
    if r["rampup_batch_size"] is None:
        return
    try:
        BatchSizes(total, micro, dp, r["rampup_batch_size"])
    except ConfigError as error:
        r.fail("rampup_batch_size global_batch_size micro_batch_size", str(error))


@CHECKS
def layers(r: Resolution) -> None:
    """Every layer has a stage, by Megatron's rules; there are chunks only where there are stages."""
    pp, chunks = r["pipeline_model_parallel_size"], r["virtual_pipeline_model_parallel_size"]
    if not all(map(r.positive, ("num_layers", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"))):
        return
    if chunks > 1 and pp == 1:
        r.fail("virtual_pipeline_model_parallel_size pipeline_model_parallel_size",
               "several chunks per rank need at least two pipeline stages")
        return
    per_stage, listed = r["num_layers_per_virtual_pipeline_stage"], r["num_layer_list"]
    if listed and per_stage and per_stage != max(map(max, listed)):
        r.fail("num_layers_per_virtual_pipeline_stage num_layer_list",
               f"the largest chunk of the list has {max(map(max, listed))} layers")
    if not _one_way(r, pp):
        return
    known = r.is_given("virtual_pipeline_model_parallel_size")
    if per_stage and not listed and not known and "virtual_pipeline_model_parallel_size" not in r.derived:
        return  # The derivation of the chunks has said why there are none.
    if per_stage and not listed and _counted(r) != per_stage * pp * chunks:
        r.fail("num_layers_per_virtual_pipeline_stage num_layers virtual_pipeline_model_parallel_size",
               f"{per_stage} layers x {pp} ranks x {chunks} chunks = {per_stage * pp * chunks}, not {_counted(r)}; "
               "give num_layer_list for chunks of different sizes")
        return
    _place(r, pp, chunks)
    for name in ("recompute", "select_recompute", "select_comm_recompute"):
        rows = r[name]
        if rows and (len(rows), len(rows[0])) != (pp, chunks):
            r.fail(name, f"needs one row for each of the {pp} pipeline ranks with {chunks} numbers each")
    if r["noop_layers"] and not all(0 <= layer < r["num_layers"] for layer in r["noop_layers"]):
        r.fail("noop_layers num_layers", f"layers are numbered from 0 to {r['num_layers'] - 1}")


_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def _one_way(r: Resolution, pp: int) -> bool:
    """Whether layers are shared out in one way; of two, only one could be followed."""
    ways = [("num_layer_list",), _ENDS, _COUNTED, ("standalone_embedding_stage",)]
    asked = [given for given in ([name for name in way if r[name]] for way in ways) if given]
    if len(asked) > 1:
        r.fail(" ".join(sum(asked, [])), "cannot be combined, each says where the layers go; give num_layer_list alone "
               "for any other split")
    elif asked and asked[0][0] in _ENDS and r["num_layers_per_virtual_pipeline_stage"]:
        r.fail(" ".join([*asked[0], "num_layers_per_virtual_pipeline_stage"]),
               "cannot be combined, as in Megatron; give the number of chunks, virtual_pipeline_model_parallel_size, "
               "in place of num_layers_per_virtual_pipeline_stage")
    elif r["standalone_embedding_stage"] and pp == 1:
        r.fail("standalone_embedding_stage pipeline_model_parallel_size", "a stage of its own needs a second one")
    else:
        return True
    return False


def _counted(r: Resolution) -> int:
    return layers_to_place(
        r["num_layers"], r["account_for_embedding_in_pipeline_split"], r["account_for_loss_in_pipeline_split"]
    )


def _place(r: Resolution, pp: int, chunks: int) -> None:
    sizes = ModelParallelConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=chunks,
        num_layer_list=r["num_layer_list"] or (),
        decoder_first_pipeline_num_layers=r["decoder_first_pipeline_num_layers"] or 0,
        decoder_last_pipeline_num_layers=r["decoder_last_pipeline_num_layers"] or 0,
        account_for_embedding_in_pipeline_split=r["account_for_embedding_in_pipeline_split"],
        account_for_loss_in_pipeline_split=r["account_for_loss_in_pipeline_split"],
        standalone_embedding_stage=r["standalone_embedding_stage"],
    )
    try:
        stage_layout(r["num_layers"], sizes)
    except ConfigError as error:
        names = ["num_layers", "num_layer_list"] if r["num_layer_list"] else ["num_layers"]
        given = [r.term(name) for name in names if r.is_given(name)]
        r.problems.append(f"{', '.join(given)}: {error}" if given else str(error))


@CHECKS
def deterministic_mode(r: Resolution) -> None:
    """Gradients are added microbatch by microbatch, and a split backward pass mixes those of several."""
    if r["deterministic_mode"] and r["pipeline_schedule"] == "zero-bubble":
        r.fail("deterministic_mode pipeline_schedule",
               "zero-bubble leaves gradients of weights for later, so they are not added in the order of microbatches; "
               "use auto")


@CHECKS
def pipeline_schedule(r: Resolution) -> None:
    """A schedule fits the pipeline's ranks and the chunks on each."""
    pp, chunks = r["pipeline_model_parallel_size"], r["virtual_pipeline_model_parallel_size"]
    name = r["pipeline_schedule"]
    if name == "1f1b" and chunks > 1:
        r.fail("pipeline_schedule virtual_pipeline_model_parallel_size",
               "1f1b runs one chunk on each rank; use interleaved or zero-bubble")
    if name == "interleaved" and chunks == 1:
        r.fail("pipeline_schedule virtual_pipeline_model_parallel_size",
               "interleaved takes several chunks on each rank; give virtual_pipeline_model_parallel_size, or use 1f1b")
    if name == "zero-bubble" and pp == 1:
        r.fail("pipeline_schedule pipeline_model_parallel_size",
               "zero-bubble fills the waits between pipeline ranks, and one rank has none; use auto")


@CHECKS
def interleaving(r: Resolution) -> None:
    """Microbatches come in groups that keep every rank of an interleaved pipeline busy."""
    pp, chunks = r["pipeline_model_parallel_size"], r["virtual_pipeline_model_parallel_size"]
    group, number = r["microbatch_group_size_per_vp_stage"], r["micro_batch_num"]
    if group is not None and (chunks == 1 or group < pp):
        r.fail("microbatch_group_size_per_vp_stage",
               "belongs to several chunks per rank" if chunks == 1 else f"must be at least {pp}, the pipeline's ranks")
        return
    if chunks == 1 or pp < 2 or not number:
        return
    size = group or pp
    for batch, count in _batches(r):
        if count < size or 0 < count % size < pp:
            ramp = " rampup_batch_size" if batch != r["global_batch_size"] else ""
            where = f" (batch size {batch} of the ramp-up)" if ramp else ""
            r.fail(f"virtual_pipeline_model_parallel_size global_batch_size{ramp}",
                   f"the interleaved schedule takes microbatches in groups of {size}, at least {pp} in the last; "
                   f"{count}{where} do not fit, {max(1, round(count / size)) * size} would")
            return


def _batches(r: Resolution) -> Iterator[tuple[int, int]]:
    """Yield every batch size that an iteration can have, the full one first, with its number of microbatches."""
    yield r["global_batch_size"], r["micro_batch_num"]
    sizes_known = all(map(r.positive, ("global_batch_size", "micro_batch_size", "data_parallel_size")))
    if not r["rampup_batch_size"] or not sizes_known:
        return
    try:
        sizes = BatchSizes(
            r["global_batch_size"], r["micro_batch_size"], r["data_parallel_size"], r["rampup_batch_size"]
        )
    except ConfigError:
        return  # The check of the microbatches says why.
    for size in sizes.sizes():
        yield size, sizes.microbatches_of(size)


@CHECKS
def precision(r: Resolution) -> None:
    """One 16-bit type at most; what is about 16 bits needs it."""
    if r["bf16"] and r["fp16"]:
        r.fail("bf16 fp16", "give one of them")
    for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if r[flag] and r["compute_dtype"] not in (dtype, None) and not (r["bf16"] and r["fp16"]):
            r.fail(f"{flag} compute_dtype", f"{flag} computes in {dtype}")
    if r["fp16"] and not r["loss_scale"] and r["min_loss_scale"] > r["initial_loss_scale"]:
        r.fail("min_loss_scale initial_loss_scale", "min_loss_scale must not be above initial_loss_scale")
    if r["fp16_lm_cross_entropy"] and not r["fp16"]:
        r.fail("fp16_lm_cross_entropy", "needs fp16")
    if r["fp32_residual_connection"] and not (r["fp16"] or r["bf16"]):
        r.fail("fp32_residual_connection", "needs fp16 or bf16; a float32 model has a float32 residual already")
    if r["grad_reduce_in_bf16"] and not r["bf16"]:
        r.fail("grad_reduce_in_bf16", "needs bf16")
    if r["fp32_matmul_precision"] == "high" and (r["bf16"] or r["fp16"]):
        r.fail("fp32_matmul_precision", "is about runs in float32; a 16-bit type says itself how its products are")
    if r["apply_query_key_layer_scaling"] and r["attention_backend"] in ("flash", "fused"):
        r.fail("apply_query_key_layer_scaling attention_backend", "the fused kernel cannot scale by layer; give one")


@CHECKS
def recomputation(r: Resolution) -> None:
    """Full recomputation has a method and a number of layers; selective has neither."""
    granularity, method, number = (r[f"recompute_{part}"] for part in ("granularity", "method", "num_layers"))
    if granularity == "full":
        if method == "none" or not number:
            r.fail("recompute_granularity", "full needs recompute_method (uniform or block) and recompute_num_layers")
        elif r["num_layers"] and number > r["num_layers"]:
            r.fail("recompute_num_layers num_layers", "there are not so many layers")
    elif method != "none" or number:
        named = "recompute_method" if method != "none" else "recompute_num_layers"
        r.fail(named, f"belongs to recompute_granularity full, which is {granularity}")


@CHECKS
def recomputed_modules(r: Resolution) -> None:
    """Selective recomputation names parts that layers have and that free something when they are computed again."""
    chosen, has_experts = r["recompute_modules"], r["num_experts"] is not None
    if chosen == ("core_attn",):
        return
    if r["recompute_granularity"] != "selective":
        r.fail("recompute_modules recompute_granularity", "add --recompute-granularity selective, to which it belongs")
    if r["recompute"] or r["select_recompute"]:
        given = "recompute" if r["recompute"] else "select_recompute"
        r.fail(f"recompute_modules {given}", "both say what is computed again; give one")
    known = ("core_attn", "mlp", "mla_up_proj", "moe", "moe_act", "shared_experts")
    for module in chosen:
        if module == "layernorm":
            r.fail("recompute_modules", "layernorm: its output is kept by what reads it, so nothing would be freed; "
                   f"choose of {', '.join(known)}")
        elif module == "mla_up_proj" and not r["multi_latent_attention"]:
            r.fail("recompute_modules multi_latent_attention", "mla_up_proj is a part of multi-latent attention; leave "
                   "it out")
        elif module == "mla_up_proj" and "core_attn" not in chosen:
            r.fail("recompute_modules", "mla_up_proj: core attention keeps what it gives, so nothing would be freed; "
                   "add core_attn")
        elif module not in known:
            r.fail("recompute_modules", f"knows no {module!r}; choose of {', '.join(known)}")
        elif module in known[3:] and not has_experts:
            r.fail("recompute_modules num_experts", f"{module} is a part of layers with experts; leave it out")
    if "shared_experts" in chosen and has_experts and r["moe_shared_expert_intermediate_size"] is None:
        r.fail("recompute_modules moe_shared_expert_intermediate_size", "there is no shared expert; leave it out")


@CHECKS
def run_length(r: Resolution) -> None:
    """A run counts iterations or samples, and so do its schedules."""
    if r["train_samples"] is not None:
        _not_with(r, "train_samples", ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters"), "iterations")
    elif r["train_iters"] is not None:
        _not_with(r, "train_iters", ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"), "samples")
        if r["rampup_batch_size"] is not None:
            r.fail("rampup_batch_size train_iters", "a ramp-up needs train_samples instead of train_iters")


def _not_with(r: Resolution, unit: str, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if r[name]:
            r.fail(f"{name} {unit}", f"the run does not count {what}; use the other form of {name}")


@CHECKS
def learning_rate(r: Resolution) -> None:
    """min_lr <= lr, one way to give the warm-up, and WSD has a length."""
    if r["lr"] is not None and r["min_lr"] > r["lr"]:
        r.fail("min_lr lr", "min_lr must not be above lr")
    if None not in (r["decoupled_lr"], r["decoupled_min_lr"]) and r["decoupled_min_lr"] > r["decoupled_lr"]:
        r.fail("decoupled_min_lr decoupled_lr", "decoupled_min_lr must not be above decoupled_lr")
    if r["lr_warmup_fraction"] and (r["lr_warmup_iters"] or r["lr_warmup_samples"]):
        r.fail("lr_warmup_fraction " + ("lr_warmup_iters" if r["lr_warmup_iters"] else "lr_warmup_samples"), "give one")
    decay = decay_length(r["lr_decay_iters"], r["train_iters"] if r["train_samples"] is None else None)
    if decay and r["lr_warmup_iters"] and r["lr_warmup_iters"] >= decay:
        r.fail(f"lr_warmup_iters {'lr_decay_iters' if r['lr_decay_iters'] else 'train_iters'}",
               "the warm-up must be shorter than the decay")
    samples = decay_length(r["lr_decay_samples"], r["train_samples"])
    if samples and r["lr_warmup_samples"] and r["lr_warmup_samples"] >= samples:
        r.fail(f"lr_warmup_samples {'lr_decay_samples' if r['lr_decay_samples'] else 'train_samples'}",
               "the warm-up must be shorter than the decay")
    if r["lr_decay_style"] == "WSD" and not (r["lr_wsd_decay_iters"] or r["lr_wsd_decay_samples"]):
        r.fail("lr_decay_style", "WSD needs lr_wsd_decay_iters or lr_wsd_decay_samples")
    if r["use_checkpoint_opt_param_scheduler"] and r["override_opt_param_scheduler"]:
        r.fail("use_checkpoint_opt_param_scheduler override_opt_param_scheduler", "give one of them")
    for name, on in (("no_load_optim", True), ("finetune", True), ("resume_training", False)):
        if r["use_checkpoint_opt_param_scheduler"] and bool(r[name]) is on:
            r.fail(f"use_checkpoint_opt_param_scheduler {name}",
                   "the schedule is loaded with the optimizer's state, which is left out here; give one of them")


@CHECKS
def weight_decay(r: Resolution) -> None:
    """A constant weight decay has no start and end; a changing one has both."""
    start, end = r["start_weight_decay"], r["end_weight_decay"]
    if r["weight_decay_incr_style"] == "constant":
        for name, value in (("start_weight_decay", start), ("end_weight_decay", end)):
            if value is not None and value != r["weight_decay"]:
                r.fail(f"{name} weight_decay weight_decay_incr_style", "a constant weight decay has one value")
    elif start is None or end is None:
        r.fail("weight_decay_incr_style", "needs start_weight_decay and end_weight_decay")


@CHECKS
def overlap(r: Resolution) -> None:
    """Overlaps need what they overlap."""
    if r["overlap_param_gather"] and not r["use_distributed_optimizer"]:
        r.fail("overlap_param_gather", "needs use_distributed_optimizer")
    if r["overlap_param_gather"] and not r["overlap_grad_reduce"]:
        r.fail("overlap_param_gather", "needs overlap_grad_reduce")
    if r["delay_grad_reduce"] and not r["overlap_grad_reduce"]:
        r.fail("delay_grad_reduce", "needs overlap_grad_reduce")
    if not r["wrap_with_ddp"]:
        for name in ("use_distributed_optimizer", "overlap_grad_reduce", "ddp_bucket_size"):
            if r[name]:
                r.fail(f"wrap_with_ddp {name}", f"{name} needs gradient buckets; leave wrap_with_ddp on")


@CHECKS
def data_sources(r: Resolution) -> None:
    """Data comes from one place."""
    split = any(r[f"{part}_data_path"] for part in ("train", "valid", "test"))
    sources = [name for name in ("data_path", "data_args_path", "mock_data") if r[name]]
    sources += [f"{part}_data_path" for part in ("train", "valid", "test") if r[f"{part}_data_path"]][: int(split)]
    if len(sources) > 1:
        r.fail(" ".join(sources), "give one of them")
    if split and r.is_given("split"):
        r.fail("split", "does not apply: training, validation and test data have their own paths")


@CHECKS
def profiling(r: Resolution) -> None:
    """The profile ends after it starts."""
    if r["profile"] and r["profile_step_end"] < r["profile_step_start"]:
        r.fail("profile_step_end profile_step_start", "the profile ends before it starts")


@CHECKS
def saving(r: Resolution) -> None:
    """Where nothing is saved or loaded, say so."""
    for name in ("save", "load"):
        if r[name] == "" and r.is_given(name):  # a variable of the shell that is not set, say
            r.note(f"{r.term(name)} is empty: " + ("nothing is saved" if name == "save" else "nothing is loaded"))
    if r["save"] is None and r.is_given("save_interval"):
        r.note(f"{r.term('save_interval')}: nothing is saved without save")
    if r["save"] and r["save_interval"] is None:
        r.note(f"{r.term('save')}: without save_interval one checkpoint is written, at the end")
    if not r["train_iters"] and not r["train_samples"] and not r["skip_train"]:
        r.note("neither train_iters nor train_samples is given: there is nothing to train")
