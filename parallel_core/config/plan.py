"""What a layout costs, before anything starts: parameters, memory per rank, FLOPs. Closed formulas, no device."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_core.config.expert_plan import (
    expert_layers,
    expert_parameters,
    experts_on_rank,
    kept_by_feed_forward,
)
from parallel_core.config.schema import AllConfig, TransformerConfig
from parallel_core.layout.mesh import Mesh
from parallel_core.layout.stages import StageLayout, stage_layout
from parallel_core.pipeline.figures import bubble_share
from parallel_core.pipeline.schedule import schedule_named

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank at a pipeline stage, in elements."""

    layers: int
    embedding: int
    head: int
    tied_copy: int
    """The last stage's copy of an embedding that it uses too, as output layer or to predict further tokens; where the
    first stage is another one."""
    experts: int = 0
    """The rank's share of experts."""

    @property
    def total(self) -> int:
        """All parameters the rank holds."""
        return self.layers + self.embedding + self.head + self.tied_copy + self.experts


def layer_parameters(model: TransformerConfig, tp: int = 1) -> int:
    """Return the parameters that one rank holds of one transformer layer with an MLP, tensor parallel `tp` ways."""
    h, ffn = model.hidden_size, model.ffn_hidden_size
    up = ffn * (2 if model.is_gated else 1)
    mlp = (up * h + ffn * h) // tp + ((up // tp + h) if model.add_bias_linear else 0)
    return mlp + _beside_mlp(model, tp)


def _beside_mlp(model: TransformerConfig, tp: int) -> int:
    h = model.hidden_size
    count = _norm_weights(model) * h * (4 if model.use_sandwich_norm else 2)
    attention = _latent_attention if model.mla.multi_latent_attention else _self_attention
    return count + attention(model, tp) + (h if model.out_proj_has_bias else 0)


def _norm_weights(model: TransformerConfig) -> int:
    """Return the parameters of a norm for each channel."""
    return 2 if model.normalization == "LayerNorm" else 1


def _self_attention(model: TransformerConfig, tp: int) -> int:
    h, head = model.hidden_size, model.kv_channels
    query = model.num_attention_heads * head
    qkv = query + 2 * model.num_query_groups * head
    count = (qkv * h + query * h) // tp + (qkv // tp if model.qkv_has_bias else 0)
    return count + (2 * head * _norm_weights(model) if model.qk_layernorm else 0)


def _latent_attention(model: TransformerConfig, tp: int) -> int:
    """Return the parameters of multi-latent attention; every rank has all of the projections to latents."""
    to_latents, per_head = _latent_products(model)
    norms = (model.mla.q_lora_rank + model.mla.kv_lora_rank) * _norm_weights(model) if model.qk_layernorm else 0
    return to_latents + model.num_attention_heads * per_head // tp + norms


def _latent_products(model: TransformerConfig) -> tuple[int, int]:
    """Return the weights of multi-latent attention's projections to latents, and of the others for each head."""
    h, mla = model.hidden_size, model.mla
    to_latents = h * (mla.q_lora_rank + mla.kv_lora_rank + mla.qk_pos_emb_head_dim)
    per_head = mla.head_size * (mla.q_lora_rank or h) + mla.kv_lora_rank * (mla.qk_head_dim + mla.v_head_dim)
    return to_latents, per_head + mla.v_head_dim * h


def model_parameters(model: TransformerConfig, num_noop: int = 0) -> int:
    """Return the parameters of the whole model, a tied embedding counted once."""
    table = model.vocab_size * model.hidden_size
    positions = model.max_position_embeddings * model.hidden_size
    count = table + (positions if model.position_embedding_type == "learned_absolute" else 0)
    count += positions if model.top_query_layer != "none" else 0
    count += _segment_parameters(model) + _head_parameters(model)
    count += table if _has_own_output(model) else 0
    layers = model.num_layers - num_noop
    sparse = min(layers, model.moe.layers_with_experts(model.num_layers))
    count += (layers - sparse) * layer_parameters(model) + sparse * _sparse_layer(model, model.moe.num_experts)
    experts = model.moe.num_experts * expert_parameters(model).one if _predicts_with_experts(model) else 0
    return count + prediction_parameters(model) + model.mtp.mtp_num_layers * experts


def _segment_parameters(model: TransformerConfig) -> int:
    """Return the parameters of an encoder's segments, and of the norm on its embeddings."""
    rows = model.bert.num_tokentypes + _norm_weights(model)
    return rows * model.hidden_size if model.bert.is_encoder else 0


def _head_parameters(model: TransformerConfig, tp: int = 1) -> int:
    """Return the parameters of what stands on the layers, without matrices of the vocabulary's size."""
    h, bert = model.hidden_size, model.bert
    if not bert.is_encoder:
        return h * _norm_weights(model) + model.num_labels * h
    dense = h * h + h
    count = dense + h * _norm_weights(model) + model.vocab_size // tp if bert.predicts_words else 0
    count += dense if bert.has_pooler else 0
    return count + (2 * h + 2 if bert.bert_head in ("pretraining", "question_answering") else 0)


def _has_own_output(model: TransformerConfig) -> bool:
    """Whether there is an output layer whose weight is not the word embedding."""
    return model.untie_embeddings_and_output_weights and model.predicts_words


def prediction_parameters(model: TransformerConfig, tp: int = 1) -> int:
    """Return the parameters of multi-token prediction on one rank of the last stage.

    Without the shared embedding, and without experts, of which its layers have as many as the model's last one.
    """
    h, layer = model.hidden_size, layer_parameters(model, tp)
    if _predicts_with_experts(model):
        layer = _beside_mlp(model, tp) + expert_parameters(model, tp).shared
    return model.mtp.mtp_num_layers * (layer + 2 * h * h // tp + 3 * h * _norm_weights(model))


def _predicts_with_experts(model: TransformerConfig) -> bool:
    return bool(model.mtp.mtp_num_layers) and model.moe.has_experts(model.num_layers)


def active_parameters(model: TransformerConfig, num_noop: int = 0) -> int:
    """Return the parameters that one token is computed with: of experts those it goes to."""
    sparse = min(model.num_layers - num_noop, model.moe.layers_with_experts(model.num_layers))
    sparse += model.mtp.mtp_num_layers if _predicts_with_experts(model) else 0
    idle = model.moe.num_experts - model.moe.moe_router_topk
    return model_parameters(model, num_noop) - sparse * idle * (expert_parameters(model).one if sparse else 0)


def _sparse_layer(model: TransformerConfig, experts: int) -> int:
    """Return the parameters of a layer with so many experts."""
    of = expert_parameters(model)
    return _beside_mlp(model, 1) + of.shared + experts * of.one


def stage_parameters(config: AllConfig, layout: StageLayout, pp_rank: int) -> StageParameters:
    """Return the parameters of each rank at pipeline rank `pp_rank`."""
    model, tp = config.model_config, config.parallel_config.tensor_model_parallel_size
    noop = set(config.parallel_config.noop_layers)
    numbers = [layer for chunk in layout.layers[pp_rank] for layer in chunk if layer not in noop]
    sparse = expert_layers(config, numbers)
    of_layers = (len(numbers) - sparse) * layer_parameters(model, tp)
    of_layers += sparse * (_beside_mlp(model, tp) + expert_parameters(model, tp).shared)
    table = model.vocab_size // tp * model.hidden_size
    positions = model.max_position_embeddings * model.hidden_size
    first, last = pp_rank == 0, pp_rank == layout.num_ranks - 1
    embedding = table + (positions if model.position_embedding_type == "learned_absolute" else 0) if first else 0
    embedding += _segment_parameters(model) if first else 0
    head = _head_parameters(model, tp) if last else 0
    if last and model.top_query_layer != "none":
        head += positions
    if last and _has_own_output(model):
        head += table
    tied_copy = table if last and not first and model.shares_word_embeddings else 0
    of_layers += prediction_parameters(model, tp) if last else 0
    sparse += model.mtp.mtp_num_layers if last and _predicts_with_experts(model) else 0
    return StageParameters(of_layers, embedding, head, tied_copy, sparse * experts_on_rank(config) if sparse else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_memory(config: AllConfig, layout: StageLayout, pp_rank: int, dp: int) -> Memory:
    """Return the memory of each rank at pipeline rank `pp_rank`.

    Weights in `params_dtype`; gradients in float32 where they are summed in it or the weights are float32; Adam keeps
    two float32 moments, and a float32 copy of 16-bit weights; the distributed optimizer divides that by the data
    parallel size, of experts by the number of ranks that hold equal ones. Activations as `layer_activations`, for the
    microbatches in flight.
    """
    model, training = config.model_config, config.training_config
    held = stage_parameters(config, layout, pp_rank)
    count = held.total
    width = BYTES[model.params_dtype]
    wide_gradients = training.accumulate_allreduce_grads_in_fp32 or width == 4
    optimizer = config.optimizer_config
    moments = 8 if optimizer.optimizer_type == "adam" else 4 if optimizer.sgd_momentum else 0
    kept = moments + (4 if width == 2 else 0)
    states = count * kept
    if training.use_distributed_optimizer:
        parallel = config.parallel_config
        ranks = dp * parallel.tensor_model_parallel_size
        equal = max(1, ranks // (parallel.expert_model_parallel_size * parallel.expert_tensor_size))
        states = -(-(count - held.experts) * kept // dp) + -(-held.experts * kept // equal)
    return Memory(count * width, count * (4 if wide_gradients else 2), states, _activations(config, layout, pp_rank))


def in_flight(config: AllConfig, pp_rank: int) -> int:
    """Return how many (microbatch, chunk) activations a rank holds at most.

    They are its warm-up forwards and one more, and with split backward passes those whose weights' gradients are late.
    """
    held, late = _held(config, pp_rank)
    return held + late


def _held(config: AllConfig, pp_rank: int) -> tuple[int, int]:
    """Return at the peak how many activations wait for their backward pass, and how many for their weights' part."""
    parallel, number = config.parallel_config, config.dataset_config.micro_batch_num
    pp, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    split = schedule_named(parallel.pipeline_schedule, chunks).splits_backward
    group = parallel.microbatch_group_size_per_virtual_pipeline_stage or pp
    hop = 1 if split or chunks == 1 else 2
    held = min(hop * (pp - pp_rank - 1) + (chunks - 1) * group + 1, number * chunks)
    return held, min(pp_rank, number * chunks - held) if split else 0


def layer_activations(config: AllConfig, recompute: str) -> int:
    """Return the bytes that one layer keeps of one microbatch for backward.

    With s, b, h, a: this rank's part of the sequence, microbatch, width and heads; t: tensor parallel size; all in the
    compute type except one-byte dropout masks. Kept are the inputs of the norms and of the projections, query, key and
    value, and of core attention the scores before and after the softmax (a*s per token and head, gone with the fused
    kernel or selective recomputation). Sequence parallelism divides what tensor parallelism leaves whole.

    Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 4.
    """
    model, parallel = config.model_config, config.parallel_config
    tp, width = parallel.tensor_model_parallel_size, BYTES[model.compute_dtype]
    tokens = model.seq_length // parallel.context_parallel_size * config.dataset_config.batch_size
    whole = tp if parallel.sequence_parallel else 1
    if recompute == "full":
        return tokens * model.hidden_size * width // whole
    heads, latents = _kept_heads(model)
    shared = 4 * model.hidden_size * width + (2 * model.hidden_size if model.hidden_dropout_rate else 0)
    if model.use_sandwich_norm:
        shared += 2 * model.hidden_size * width
    shared += latents * width
    split = (heads + kept_by_feed_forward(model)) * width
    # Attention by blocks of a cut sequence keeps no scores; after an exchange of heads it is that of whole sequences.
    whole_sequences = parallel.context_parallel_size == 1 or "a2a" in parallel.cp_comm_type
    kept = model.kernels == "local" or not model.use_flash_attention
    if kept and recompute != "selective" and whole_sequences:
        scores = 2 * width + (width + 1 if model.attention_dropout_rate else 0)
        split += model.num_attention_heads * model.seq_length * scores
    return tokens * (shared // whole + split // tp)


def _kept_heads(model: TransformerConfig) -> tuple[int, int]:
    """Return the elements of a token that attention keeps, cut over heads and whole.

    Queries, keys, values and context; of multi-latent attention also what the projections from latents give, before
    it is put into heads, and the latents before and after their norms.
    """
    heads, head = model.num_attention_heads, model.kv_channels
    if not model.mla.multi_latent_attention:
        return 2 * heads * head + 2 * model.num_query_groups * head, 0
    mla = model.mla
    if model.recomputes("mla_up_proj"):
        return heads * mla.v_head_dim, mla.q_lora_rank + mla.kv_lora_rank + mla.qk_pos_emb_head_dim
    latents = (mla.q_lora_rank + mla.kv_lora_rank) * (2 if model.qk_layernorm else 1)
    return heads * (2 * head + 2 * mla.v_head_dim), latents + mla.qk_pos_emb_head_dim


def layer_deferred(config: AllConfig) -> int:
    """Return the bytes that one layer keeps of one microbatch between I and W of a split backward pass.

    Every linear layer keeps its input and the gradient of its output, in the compute type: of the width h the input of
    the projections in (with sequence parallelism this rank's part of it) and the gradients of the outputs of the
    projections out, whole on every rank; the rest divided by the tensor parallel size.
    """
    model, parallel = config.model_config, config.parallel_config
    tp = parallel.tensor_model_parallel_size
    tokens = model.seq_length // parallel.context_parallel_size * config.dataset_config.batch_size
    query, latents = model.num_attention_heads * model.kv_channels, 0
    heads = 2 * query + 2 * model.num_query_groups * model.kv_channels
    if model.mla.multi_latent_attention:
        mla = model.mla
        latents = 2 * (mla.q_lora_rank + mla.kv_lora_rank) + mla.qk_pos_emb_head_dim
        heads = model.num_attention_heads * (mla.head_size + mla.qk_head_dim + 2 * mla.v_head_dim)
    inputs = 2 * model.hidden_size // (tp if parallel.sequence_parallel else 1)
    split = heads + kept_by_feed_forward(model, computed_again=True)
    if model.moe.num_experts:
        split += model.moe.moe_router_topk * model.hidden_size  # the gradient of every row's output
    return tokens * (inputs + 2 * model.hidden_size + latents + split // tp) * BYTES[model.compute_dtype]


def _kept_by_chunk(config: AllConfig, layout: StageLayout, pp_rank: int, chunk: int) -> int:
    """Return the bytes that one microbatch leaves in one chunk's layers."""
    model, parallel = config.model_config, config.parallel_config
    count = len(layout.layers[pp_rank][chunk])
    plain, selective, full = (layer_activations(config, kind) for kind in ("none", "selective", "full"))
    if parallel.recompute or parallel.select_recompute:
        fully = min(count, parallel.recompute[pp_rank][chunk]) if parallel.recompute else 0
        partly = min(count, parallel.select_recompute[pp_rank][chunk]) if parallel.select_recompute else 0
        return fully * full + max(0, partly - fully) * selective + (count - max(fully, partly)) * plain
    if model.recompute_granularity == "selective":
        return count * (selective if model.recomputes("core_attn") else plain)
    if model.recompute_granularity == "full" and model.recompute_method == "uniform":
        return -(-count // model.recompute_num_layers) * full
    if model.recompute_granularity == "full":
        fully = min(count, model.recompute_num_layers)
        return fully * full + (count - fully) * plain
    return count * plain


def _activations(config: AllConfig, layout: StageLayout, pp_rank: int) -> int:
    model, data = config.model_config, config.dataset_config
    chunks = [_kept_by_chunk(config, layout, pp_rank, chunk) for chunk in range(layout.num_chunks)]
    held, late = _held(config, pp_rank)
    kept = sum(chunks) * held // layout.num_chunks
    kept += late * sum(map(len, layout.layers[pp_rank])) * layer_deferred(config) // layout.num_chunks
    if model.recompute_granularity == "full" or config.parallel_config.recompute:
        segment = max(1, model.recompute_num_layers) if model.recompute_method == "uniform" else 1
        kept += segment * layer_activations(config, "none")  # The segment that backward is computing again.
    again = kept_by_feed_forward(model, computed_again=True) - kept_by_feed_forward(model)  # of one layer, likewise
    tokens = model.seq_length // config.parallel_config.context_parallel_size * data.batch_size
    kept += again * tokens * BYTES[model.compute_dtype] // config.parallel_config.tensor_model_parallel_size
    if pp_rank == layout.num_ranks - 1:
        tp = config.parallel_config.tensor_model_parallel_size
        depths = model.mtp.mtp_num_layers
        # float32 logits of one microbatch, and of those whose weights' part is late the logits' gradient.
        kept += (1 + -(-late // layout.num_chunks)) * (1 + depths) * tokens * model.vocab_size // tp * 4
        whole = tp if config.parallel_config.sequence_parallel else 1
        joined = 6 * tokens * model.hidden_size * BYTES[model.compute_dtype] // whole  # two norms' inputs and outputs
        each = layer_activations(config, "selective" if model.recomputes("core_attn") else "none") + joined
        kept += depths * (tokens * model.hidden_size * BYTES[model.compute_dtype] // whole
                          if model.recompute_granularity == "full" else each)  # fmt: skip
    return kept


def num_floating_point_operations(config: AllConfig, batch_size: int) -> int:
    """Return the floating point operations of a training step over `batch_size` samples, forward and backward.

    Source: Megatron-LM core 0.12 `num_floating_point_operations` (causal attention counted half, an
    encoder's whole); multi-latent attention by its products alike.
    """
    model = config.model_config
    h, seq = model.hidden_size, model.seq_length
    layers = model.num_layers - len(config.parallel_config.noop_layers)
    ratio = model.kv_channels * model.num_attention_heads / h
    gate = 1.5 if model.is_gated else 1.0
    sparse = min(layers, model.moe.layers_with_experts(model.num_layers))
    mlp = 12 * (layers - sparse) * h * model.ffn_hidden_size * gate
    if sparse:
        moe = model.moe
        width = moe.moe_ffn_hidden_size * moe.moe_router_topk + moe.moe_shared_expert_intermediate_size
        mlp += sparse * h * (12 * width * gate + 6 * moe.num_experts)
    seen = seq if model.bert.is_encoder else seq / 2
    attention = 12 * layers * h * h * (1 + model.num_query_groups / model.num_attention_heads + seen / h) * ratio
    if model.mla.multi_latent_attention:
        to_latents, per_head = _latent_products(model)
        scores = seq * (model.mla.head_size + model.mla.v_head_dim) / 2
        attention = 6 * layers * (to_latents + model.num_attention_heads * (per_head + scores))
    depths = model.mtp.mtp_num_layers
    logits, joined = 6 * h * model.vocab_size * (1 + depths), 12 * h * h * depths
    if model.bert.is_encoder:
        logits = 6 * h * (model.vocab_size + h if model.bert.predicts_words else 2)
    return round(batch_size * seq * ((mlp + attention) * (layers + depths) / max(layers, 1) + logits + joined))


@dataclass(frozen=True)
class Plan:
    """A layout on so many ranks, with its costs."""

    config: AllConfig
    mesh: Mesh
    layout: StageLayout
    bubble: float
    """Ideal share of a step that ranks idle."""
    memory: tuple[Memory, ...]
    """Per pipeline rank."""
    parameters: tuple[StageParameters, ...]
    """Per pipeline rank."""


def make_plan(config: AllConfig, world_size: int) -> Plan:
    """Return the plan of `config` on `world_size` ranks.

    Raises:
        ConfigError: The world size or the layers do not fit the layout.
    """
    parallel = config.parallel_config
    mesh = Mesh.megatron(
        world_size,
        tensor_parallel=parallel.tensor_model_parallel_size,
        context_parallel=parallel.context_parallel_size,
        pipeline_parallel=parallel.pipeline_model_parallel_size,
    )
    layout = stage_layout(config.model_config.num_layers, parallel)
    stages = range(layout.num_ranks)
    bubble = bubble_share(
        layout.num_ranks, layout.num_chunks, config.dataset_config.micro_batch_num, parallel.pipeline_schedule
    )
    return Plan(
        config,
        mesh,
        layout,
        bubble,
        tuple(rank_memory(config, layout, stage, mesh.size("cp", "dp")) for stage in stages),
        tuple(stage_parameters(config, layout, stage) for stage in stages),
    )
