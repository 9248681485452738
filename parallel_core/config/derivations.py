"""Megatron's derivations, each a named rule: how values follow from other values."""

from __future__ import annotations

import math

from parallel_core.config.expert_checks import EXPERT_DERIVATIONS
from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.schema import GATED, ROTARY
from parallel_core.config.vocabulary import tokenizer_vocab_size
from parallel_core.errors import ConfigError
from parallel_core.layout import derived
from parallel_core.layout.stages import decoder_layers, parse_layout

DERIVATIONS = Rules()


@DERIVATIONS
def recompute_activations(r: Resolution) -> None:
    """`recompute_activations` is `recompute_granularity selective`."""
    if r["recompute_activations"]:
        if r["recompute_granularity"] not in (None, "selective"):
            r.fail("recompute_activations recompute_granularity", "ask for two different things; give one")
        r.derive("recompute_granularity", "selective", "recompute_activations")
    r.fill("recompute_granularity", "none", "recompute_activations")
    r.fill("recompute_modules", ("core_attn",), "recompute_activations")
    if r["recompute_method"] is None:
        r.values["recompute_method"] = "none"


@DERIVATIONS
def positions(r: Resolution) -> None:
    """`use_rotary_position_embeddings` is `position_embedding_type rope`; without rope there is nothing to fuse."""
    if r["use_rotary_position_embeddings"] and r["position_embedding_type"] not in ROTARY:
        if r.is_given("position_embedding_type"):
            r.fail("use_rotary_position_embeddings position_embedding_type", "ask for two kinds of positions")
        r.derive("position_embedding_type", "rope", "positions")
    if not r["add_position_embedding"] and r["position_embedding_type"] == "learned_absolute":
        r.fail("add_position_embedding", "write position_embedding_type none for a model without positions")
    if not derived.rotary_fusion_applies(r["position_embedding_type"], r["rotary_interleaved"]):
        if r.is_given("apply_rope_fusion") and r["apply_rope_fusion"]:
            r.note(f"{r.term('apply_rope_fusion')}: off, it needs rope that is not interleaved")
        r.derive("apply_rope_fusion", False, "positions")
    r.fill("rotary_seq_len_interpolation_factor", 1.0, "positions")
    r.fill("yarn_beta_fast", 32.0, "positions")
    r.fill("yarn_beta_slow", 1.0, "positions")


@DERIVATIONS
def adapters(r: Resolution) -> None:
    """`use_lora` asks for adapters of rank 8 where nothing says another, its opposite for none."""
    if r.is_given("use_lora") and not (r["use_lora"] and r.is_given("lora_rank")):
        r.derive("lora_rank", 8 if r["use_lora"] else 0, "adapters")
    r.fill("lora_rank", 0, "adapters")


@DERIVATIONS
def conversations(r: Resolution) -> None:
    """Conversations do not see each other, positions begin at zero in each, and the bundled tokenizer reads them."""
    r.fill("sft_tokenizer_prompt_format", "default", "conversations")
    if r["sft"]:
        if r["tokenizer_type"] is None and r["tokenizer_model"] is None:
            from parallel_core.data.bundled import bundled_tokenizer_model  # as in `config/vocabulary.py`

            r.derive("tokenizer_type", "SentencePieceTokenizer", "conversations")
            r.derive("tokenizer_model", bundled_tokenizer_model(), "conversations")
            r.note("sft: no tokenizer is named; conversations are read by the bundled one")
        r.derive("reset_attention_mask", True, "conversations")
        r.derive("reset_position_ids", True, "conversations")


@DERIVATIONS
def query_layer(r: Resolution) -> None:
    """A GPT has no query layer."""
    r.fill("top_query_layer", "none", "query_layer")


@DERIVATIONS
def encoder(r: Resolution) -> None:
    """A model is no encoder unless it has an encoder's head; pretraining without the binary head is of words alone."""
    r.fill("bert_head", "none", "encoder")
    if not r["bert_binary_head"] and r["bert_head"] == "pretraining":
        r.derive("bert_head", "masked_lm", "encoder")


@DERIVATIONS
def latent_attention(r: Resolution) -> None:
    """Multi-latent attention: yarn's frequencies unless `rope_type rope`, heads of their own size, no biases of qkv."""
    if not r["multi_latent_attention"]:
        return
    r.fill("rope_type", "yarn", "latent_attention")
    if r.is_given("kv_channels"):
        r.note(f"{r.term('kv_channels')}: not used in multi-latent attention, as in Megatron")
    if r.positive("qk_head_dim") and r.positive("qk_pos_emb_head_dim"):
        r.derive("kv_channels", r["qk_head_dim"] + r["qk_pos_emb_head_dim"], "latent_attention")
    if not r["add_qkv_bias"] and r["qkv_has_bias"] is None:
        r.derive("qkv_has_bias", False, "latent_attention")
    if r["rope_type"] == "yarn":
        r.fill("yarn_mscale", 1.0, "latent_attention")


_GATED_FORMS = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


@DERIVATIONS
def activation(r: Resolution) -> None:
    """The activation flags name one `hidden_act`; GELU is the tanh form where Megatron fuses it with the bias.

    An encoder's is the erf form, unless the fusion is asked for.
    """
    named = [flag for flag in ("swiglu", "squared_relu", "openai_gelu") if r[flag]]
    chosen = r["hidden_act"]
    if len(named) > 1 or (named and chosen not in (None, *named)):
        r.fail(" ".join([*named, *(["hidden_act"] if chosen else [])]), "ask for several activations; give one")
    elif named and chosen is None:
        r.derive("hidden_act", named[0], "activation")
    elif chosen is None:
        fused = r["bias_gelu_fusion"] and (r["bert_head"] == "none" or r.is_given("bias_gelu_fusion"))
        r.derive("hidden_act", derived.default_activation(r["add_bias_linear"], fused), "activation")
    if r["gated_linear_unit"] and chosen in _GATED_FORMS:
        r.derive("hidden_act", _GATED_FORMS[chosen], "activation")
    if r["gated_linear_unit"] and r["hidden_act"] not in GATED:
        exist = ", ".join(GATED)
        r.fail("gated_linear_unit hidden_act", f"name one with hidden_act; the gated ones that exist are {exist}")


@DERIVATIONS
def biases(r: Resolution) -> None:
    """`add_bias_linear` gives every linear a bias; `add_qkv_bias` gives one to query, key and value alone."""
    if r.is_given("add_qkv_bias") and not r["add_qkv_bias"] and r["add_bias_linear"] and r["qkv_has_bias"] is None:
        r.note(f"{r.term('add_qkv_bias')}: add_bias_linear is on and includes this bias, as in Megatron; "
               "write qkv_has_bias: false for none")
    r.fill("qkv_has_bias", bool(r["add_bias_linear"] or r["add_qkv_bias"]), "biases")
    r.fill("add_dense_bias", bool(r["add_bias_linear"]), "biases")


@DERIVATIONS
def softmax_type(r: Resolution) -> None:
    """`apply_query_key_layer_scaling` needs, and therefore sets, `attention_softmax_in_fp32`."""
    if r["apply_query_key_layer_scaling"] and not r["attention_softmax_in_fp32"]:
        r.derive("attention_softmax_in_fp32", True, "softmax_type")


@DERIVATIONS
def sequence_length(r: Resolution) -> None:
    """`seq_length` and `max_position_embeddings` stand in for each other when one is missing."""
    if r["max_position_embeddings"] is not None:
        r.fill("seq_length", r["max_position_embeddings"], "sequence_length")
    if r["seq_length"] is not None:
        r.fill("max_position_embeddings", r["seq_length"], "sequence_length")


@DERIVATIONS
def widths(r: Resolution) -> None:
    """FFN width 4h, or int(8h/3/64)*64 for swiglu; head size h/heads; key/value heads = heads without groups."""
    hidden, heads = r["hidden_size"], r["num_attention_heads"]
    if r.positive("hidden_size"):
        r.fill("ffn_hidden_size", derived.feed_forward_width(hidden, r["hidden_act"] in GATED), "widths")
    if r.positive("hidden_size") and r.positive("num_attention_heads") and r["kv_channels"] is None:
        if hidden % heads:
            r.fail("hidden_size num_attention_heads", f"{hidden} is not a multiple of {heads}; change one of them, "
                   "or give kv_channels")
        r.derive("kv_channels", derived.head_size(hidden, heads), "widths")
    if not r["group_query_attention"]:
        if r.is_given("num_query_groups") and r["num_query_groups"] not in (1, heads):
            r.note(f"{r.term('num_query_groups')}: not used without group_query_attention, as in Megatron")
        r.derive("num_query_groups", derived.key_value_heads(heads, 0, grouped=False), "widths")


DERIVATIONS.update(EXPERT_DERIVATIONS)


@DERIVATIONS
def vocabulary(r: Resolution) -> None:
    """A given `padded_vocab_size` stays; else the tokenizer's size is padded to a multiple of divisor x tp."""
    if r["padded_vocab_size"] is not None or "padded_vocab_size" in r.unreadable:
        return
    size = r["vocab_size"]
    if size is not None and r["tokenizer_type"] == "NullTokenizer":
        size += 1  # The null tokenizer's end-of-document token comes after its vocabulary.
    if size is None:
        try:
            size = tokenizer_vocab_size(r.values)
        except ConfigError as error:
            r.problems.append(str(error))
            return
    if size is None:
        r.fail("padded_vocab_size", "give padded_vocab_size, vocab_size, or a tokenizer to take it from")
    elif r.positive("make_vocab_size_divisible_by") and r.positive("tensor_model_parallel_size"):
        if r["pad_vocab_size"]:
            size = derived.padded_vocab_size(size, r["make_vocab_size_divisible_by"], r["tensor_model_parallel_size"])
        r.derive("padded_vocab_size", size, "vocabulary")


@DERIVATIONS
def precision(r: Resolution) -> None:
    """`bf16`/`fp16` set both types where they are not given; a 16-bit `compute_dtype` sets its flag."""
    for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if r[flag]:
            r.fill("compute_dtype", dtype, "precision")
            r.fill("params_dtype", dtype, "precision")
    r.fill("compute_dtype", "float32", "precision")
    r.fill("params_dtype", "float32", "precision")
    for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if r["compute_dtype"] == dtype and not r[flag]:
            r.derive(flag, True, "precision")


@DERIVATIONS
def gradient_type(r: Resolution) -> None:
    """With bf16, gradients are summed in float32 unless `grad_reduce_in_bf16`."""
    if r["bf16"] and not r.is_given("accumulate_allreduce_grads_in_fp32"):
        r.derive("accumulate_allreduce_grads_in_fp32", not r["grad_reduce_in_bf16"], "gradient_type")


@DERIVATIONS
def overflow_check(r: Resolution) -> None:
    """With fp16 and a dynamic loss scale, a NaN is an overflow to be skipped, not an error."""
    if r["fp16"] and r["loss_scale"] is None and r["check_for_nan_in_loss_and_grad"]:
        if r.is_given("check_for_nan_in_loss_and_grad"):
            r.note(f"{r.term('check_for_nan_in_loss_and_grad')}: off, the dynamic loss scale handles overflows")
        r.derive("check_for_nan_in_loss_and_grad", False, "overflow_check")


@DERIVATIONS
def sequence_parallel(r: Resolution) -> None:
    """Off where the tensor parallel size is given as 1, as in Megatron-LM; a size that is not given was forgotten."""
    if not r["sequence_parallel"] or r["tensor_model_parallel_size"] != 1:
        return
    if r.is_given("tensor_model_parallel_size"):
        r.note(f"{r.term('sequence_parallel')}: off, tensor_model_parallel_size is 1")
    else:
        r.fail(
            "sequence_parallel tensor_model_parallel_size",
            "splits the sequence over tensor parallel ranks, and there is one; add --tensor-model-parallel-size 2, or "
            "leave it out",
        )
    r.derive("sequence_parallel", False, "sequence_parallel")


@DERIVATIONS
def flash_attention(r: Resolution) -> None:
    """`attention_backend` flash or fused is `use_flash_attn`, unfused or local is `--no-use-flash-attn`."""
    backend = r["attention_backend"]
    if backend in ("flash", "fused") and not r["use_flash_attn"]:
        r.derive("use_flash_attn", True, "flash_attention")
    elif backend in ("unfused", "local") and not r.is_given("use_flash_attn"):
        r.derive("use_flash_attn", False, "flash_attention")


@DERIVATIONS
def attention_window(r: Resolution) -> None:
    """`window_size (W, 0)` is `pre_tockens W`; W = -1 is no window."""
    window = r["window_size"]
    if window is None or len(window) != 2:
        return
    if r.is_given("pre_tockens") and window[0] not in (-1, r["pre_tockens"]):
        r.fail("window_size pre_tockens", "give two windows; write one of them")
    elif window[0] >= 0:
        r.derive("pre_tockens", window[0], "attention_window")


@DERIVATIONS
def attention_window_layers(r: Resolution) -> None:
    """`window_attn_skip_freq N` leaves out every N-th layer; a list that has the window everywhere says nothing."""
    pattern, layers = r["window_attn_skip_freq"], r["num_layers"]
    if isinstance(pattern, int) and r.positive("num_layers"):
        pattern = tuple(int(number % pattern != 0) for number in range(1, layers + 1))
        r.derive("window_attn_skip_freq", pattern, "attention_window_layers")
    if isinstance(pattern, tuple) and all(pattern):
        r.values["window_attn_skip_freq"] = None


_EXCHANGE_OF_ALGORITHM = {
    "megatron_cp_algo": "p2p",
    "kvallgather_cp_algo": "all_gather",
    "ulysses_cp_algo": "a2a",
    "hybrid_cp_algo": "a2a+p2p",
}


@DERIVATIONS
def context_parallel(r: Resolution) -> None:
    """MindSpeed's algorithms are Megatron's exchanges in other words; one context parallel rank exchanges nothing."""
    exchanges = tuple("all_gather" if word == "allgather" else word for word in r["cp_comm_type"] or ())
    algorithm, degree, size = r["context_parallel_algo"], r["ulysses_degree_in_cp"], r["context_parallel_size"]
    if size == 1:
        for name in ("cp_comm_type", "hierarchical_context_parallel_sizes", "context_parallel_algo"):
            if r.is_given(name):
                r.note(f"{r.term(name)}: not used, context_parallel_size is 1")
        r.derive("cp_comm_type", ("p2p",), "context_parallel")
        r.derive("hierarchical_context_parallel_sizes", (), "context_parallel")
        return
    if algorithm is not None:
        word = _EXCHANGE_OF_ALGORITHM.get(algorithm)
        if word is None:
            known = ", ".join(_EXCHANGE_OF_ALGORITHM)
            r.fail("context_parallel_algo", f"is not built (adaptive ones reorder tokens by their mask); use {known}")
        elif r.is_given("cp_comm_type") and set(exchanges) != {word}:
            r.fail("context_parallel_algo cp_comm_type", f"ask for {word} and {', '.join(exchanges)}; give one of them")
        else:
            exchanges = (word,)
    if exchanges != r["cp_comm_type"]:
        r.derive("cp_comm_type", exchanges, "context_parallel")
    levels = r["hierarchical_context_parallel_sizes"]
    if degree is not None and algorithm == "hybrid_cp_algo" and degree > 0 and size % degree == 0:
        if levels and tuple(levels) != (degree, size // degree):
            r.fail("ulysses_degree_in_cp hierarchical_context_parallel_sizes", "disagree; give one of them")
        r.derive("hierarchical_context_parallel_sizes", (degree, size // degree), "context_parallel")
    elif degree is not None and degree != 1 and algorithm != "hybrid_cp_algo":
        r.fail("ulysses_degree_in_cp", "belongs to --context-parallel-algo hybrid_cp_algo")


@DERIVATIONS
def virtual_pipeline(r: Resolution) -> None:
    """Chunks per rank follow from the layout string, the layer list, or layers per chunk."""
    pp = r["pipeline_model_parallel_size"]
    if r["pipeline_model_parallel_layout"] is not None and r.positive("pipeline_model_parallel_size"):
        try:
            contents = parse_layout(r["pipeline_model_parallel_layout"], pp)
            layers = decoder_layers(contents)
            if r["num_layer_list"] not in (None, layers):
                r.fail("pipeline_model_parallel_layout num_layer_list", "places layers twice; give one")
            r.derive("num_layer_list", layers, "virtual_pipeline")
        except ConfigError as error:
            r.fail("pipeline_model_parallel_layout", str(error))
    layers, per_stage = r["num_layer_list"], r["num_layers_per_virtual_pipeline_stage"]
    if layers:
        r.fill("virtual_pipeline_model_parallel_size", len(layers[0]), "virtual_pipeline")
    elif (per_stage and r["virtual_pipeline_model_parallel_size"] is None and r.positive("num_layers")
          and not (r["decoder_first_pipeline_num_layers"] or r["decoder_last_pipeline_num_layers"])):
        counted = derived.layers_to_place(r["num_layers"], r["account_for_embedding_in_pipeline_split"],
                                          r["account_for_loss_in_pipeline_split"])
        try:
            r.derive("virtual_pipeline_model_parallel_size", derived.chunks_per_rank(counted, pp, per_stage),
                     "virtual_pipeline")
        except ConfigError as error:
            r.fail("num_layers_per_virtual_pipeline_stage num_layers pipeline_model_parallel_size", str(error))
    if r["virtual_pipeline_model_parallel_size"] is None:
        r.values["virtual_pipeline_model_parallel_size"] = 1


@DERIVATIONS
def batches(r: Resolution) -> None:
    """Data parallel size, global batch size and number of microbatches follow from each other and the world size."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    if not all(map(r.positive, sizes)):
        return
    model = r[sizes[0]] * r[sizes[1]] * r[sizes[2]]
    micro, total, number = r["micro_batch_size"], r["global_batch_size"], r["micro_batch_num"]
    if r.world_size is None:
        known = r.positive("micro_batch_size") and r.positive("global_batch_size") and r.positive("micro_batch_num")
        r.world_size = model * max(1, total // (micro * number) if known else 1)
        if r["num_experts"] and r.positive("expert_model_parallel_size"):  # experts' ranks divide all ranks too
            experts = r["expert_model_parallel_size"] * max(1, r["expert_tensor_parallel_size"] or r[sizes[0]])
            least = math.lcm(model, experts * r[sizes[1]])
            r.world_size = -(-r.world_size // least) * least
    r.values["world_size"] = r.world_size
    r.values["data_parallel_size"] = dp = r.world_size // model
    if not r.positive("micro_batch_size") or dp < 1:
        return
    if r.positive("global_batch_size"):
        if total % (micro * dp):
            r.fail("global_batch_size micro_batch_size",
                   f"{total} is not a multiple of micro batch size {micro} x data parallel size {dp} = {micro * dp} "
                   f"(world size {r.world_size})")
        r.fill("micro_batch_num", total // (micro * dp), "batches")
    else:
        r.fill("micro_batch_num", _fewest_microbatches(r), "batches")
        r.derive("global_batch_size", micro * dp * r["micro_batch_num"], "batches")


def _fewest_microbatches(r: Resolution) -> int:
    """One microbatch, or with several chunks per rank as many as the interleaved schedule needs."""
    if r["virtual_pipeline_model_parallel_size"] == 1:
        return 1
    number = int(r["microbatch_group_size_per_vp_stage"] or r["pipeline_model_parallel_size"])
    r.note(f"global_batch_size: not given; {number} microbatches, the fewest that the interleaved schedule takes")
    return number


@DERIVATIONS
def pipeline_schedule(r: Resolution) -> None:
    """`enable_zero_bubble` is the pipeline schedule `zero-bubble`."""
    if not r["enable_zero_bubble"]:
        return
    if r["pipeline_schedule"] not in ("auto", "zero-bubble"):
        r.fail("enable_zero_bubble pipeline_schedule", "name two schedules; give one of them")
    else:
        r.derive("pipeline_schedule", "zero-bubble", "pipeline_schedule")


@DERIVATIONS
def run_length(r: Resolution) -> None:
    """`train_samples` becomes `train_iters`, walking through the ramp-up; a partial last batch is left out."""
    if not r["train_samples"] or not r.positive("global_batch_size"):
        return
    samples = r["train_samples"]
    try:
        steps = derived.BatchSizes(r["global_batch_size"], 1, 1, r["rampup_batch_size"] or ()).iterations_of(samples)
    except ConfigError:
        return  # The check of the microbatches says what is wrong with the ramp-up.
    if r["train_iters"] not in (None, steps):
        r.fail("train_iters train_samples", f"give one of them; {samples} samples are {steps} iterations")
        return
    r.derive("train_iters", steps, "run_length")


@DERIVATIONS
def schedule(r: Resolution) -> None:
    """A learning rate that nothing will use may be missing; weight decay is constant unless told otherwise."""
    if r["betas"] is None:
        r.derive("betas", (r["adam_beta1"], r["adam_beta2"]), "schedule")
    elif len(r["betas"]) == 2:
        for name, value in zip(("adam_beta1", "adam_beta2"), r["betas"]):
            if r.is_given(name) and r[name] != value:
                r.fail(f"betas {name}", "disagree; give one")
            r.derive(name, value, "schedule")
    if r["weight_decay_incr_style"] == "constant":
        ends = ("start_weight_decay", "end_weight_decay")
        for name, value in zip(ends, derived.weight_decay_range(r["weight_decay"], *map(r.__getitem__, ends))):
            r.fill(name, value, "schedule")
    r.fill("dataloader_type", "single", "schedule")
    if r["embedding_init_method_std"] is None:
        r.derive("embedding_init_method_std", r["init_method_std"], "schedule")
    r.fill("embedding_dtype", r["params_dtype"], "schedule")
    r.fill("split", "969, 30, 1", "schedule")


@DERIVATIONS
def pretrained(r: Resolution) -> None:
    """`pretrained_checkpoint` is loaded as by `finetune` when `load` names nothing."""
    if r["pretrained_checkpoint"] is not None and r["load"] is None:
        r.derive("load", r["pretrained_checkpoint"], "pretrained")
        r.derive("finetune", True, "pretrained")
    elif r["pretrained_checkpoint"] is not None:
        r.fail("pretrained_checkpoint load", "both name weights to start from; give one")
