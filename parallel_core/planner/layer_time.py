"""What one microbatch costs a rank in one layer, in the embedding and in the head: seconds, by phase and cause.

Products by their shapes, attention and what goes once over memory by their sizes, transfers by volume over the link
that their group crosses, dispatch by count. Tensors are those that `config.plan` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel_core.config.expert_plan import exchanged_bytes
from parallel_core.config.plan import BYTES
from parallel_core.config.schema import AllConfig
from parallel_core.planner.device import Device, Span

FORWARD, INPUT_GRAD, WEIGHT_GRAD, AGAIN = range(4)
"""Phases of a microbatch; the last one is the forward pass of recomputation."""
CAUSES = ("arithmetic", "tensor parallel", "context parallel", "exchange of tokens", "dispatch")
ARITHMETIC, TENSOR, CONTEXT, EXPERTS, DISPATCH = range(5)

PASSES_BACKWARD = 2.0
"""How often backward goes over what forward goes over once: gradients are read and written, inputs are read again."""
BACKWARD_OF_ATTENTION = 2.5
"""Products of attention's backward pass over those of its forward pass: scores are computed again."""

_ENDLESS = 1e9
"""Rows of a product that is as efficient as any."""

Shape = tuple[float, float, float]
"""Rows, inner size and columns of a product."""


@dataclass(frozen=True)
class Spans:
    """The groups of a layout, as links see them."""

    tp: Span
    cp: Span
    dp_cp: Span
    ep_etp: Span
    edp: Span
    pp: Span

    @classmethod
    def of(cls, config: AllConfig, world_size: int) -> Spans:
        """Return the spans of `layout.mesh.Mesh.megatron` and `layout.expert_mesh`."""
        p = config.parallel_config
        tp, cp, pp = p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size
        experts = p.expert_model_parallel_size * p.expert_tensor_size
        stage = world_size // pp
        return cls(
            Span(tp), Span(cp, tp), Span(stage // tp, tp), Span(experts), Span(stage // experts, experts),
            Span(pp, stage),
        )  # fmt: skip


@dataclass(frozen=True)
class MicrobatchTimes:
    """Seconds of one microbatch, each [phase, cause]."""

    dense: np.ndarray
    """A layer with an MLP."""
    sparse: np.ndarray
    """A layer with experts."""
    embedding: np.ndarray
    head: np.ndarray
    transfer: float
    """An activation's way to the next stage."""


class LayerClock:
    """Prices one layout's microbatch; recomputation decides only whether phase AGAIN is used.

    With `ideal_experts`, experts' products have rows without end, and tokens are not exchanged: no layout of experts
    is faster.
    """

    def __init__(self, config: AllConfig, device: Device, spans: Spans, ideal_experts: bool = False) -> None:
        self.ideal_experts = ideal_experts
        self.model, self.parallel = config.model_config, config.parallel_config
        self.config, self.device, self.spans = config, device, spans
        self.tp, self.cp = self.parallel.tensor_model_parallel_size, self.parallel.context_parallel_size
        self.dtype = device.computes_in or self.model.compute_dtype
        self.width = BYTES[self.dtype]
        bf16 = config.training_config.bf16 or self.model.fp32_matmul_precision == "high"
        self.product_dtype = "bfloat16" if bf16 else self.dtype
        self.tokens = self.model.seq_length // self.cp * config.dataset_config.batch_size
        self.whole = self.tokens // (self.tp if self.parallel.sequence_parallel else 1)  # of what tp leaves whole
        self.hidden_bytes = self.tokens * self.model.hidden_size * self.width

    def times(self) -> MicrobatchTimes:
        """Return the seconds of a microbatch's pieces."""
        hop = self.hidden_bytes / (self.tp if self.parallel.sequence_parallel else 1)
        dense, experts = self._layer(sparse=False), self.model.moe
        sparse = self._layer(sparse=True) if experts.num_experts else np.zeros((4, len(CAUSES)))
        last = sparse if experts.num_experts and experts.has_experts(self.model.num_layers) else dense
        return MicrobatchTimes(
            dense,
            sparse,
            self._embedding(),
            self._head(last),
            self.device.collective_seconds("point_to_point", hop, self.spans.pp),
        )

    # ---- pieces -----------------------------------------------------------------------------------------------------
    def _layer(self, sparse: bool) -> np.ndarray:
        out = np.zeros((4, len(CAUSES)))
        products = self._attention_products()
        out[:, ARITHMETIC] += self._products(products if sparse else [*products, *self._mlp_products()])
        if sparse:
            out += self._experts()
        self._add_attention(out)
        self._add_passes(out, self._elements(sparse))
        self._add_tensor_parallel(out, 1 if sparse else 2)
        self._add_context_parallel(out)
        host = self.device.layer_us + (self.device.experts_us if sparse else 0.0)
        self._add_dispatch(out, host + self.device.ring_us * (self.cp - 1))
        return out

    def _embedding(self) -> np.ndarray:
        out = np.zeros((4, len(CAUSES)))
        self._add_passes(out, 2.0 * self.tokens * self.model.hidden_size)
        self._add_reduction(out, FORWARD)
        if self.tp > 1 and self.parallel.sequence_parallel:
            out[WEIGHT_GRAD, TENSOR] += self._collective("all_gather", self.hidden_bytes, self.spans.tp)
        self._add_dispatch(out, self.device.microbatch_us / 2)
        out[AGAIN] = 0.0
        return out

    def _head(self, layer: np.ndarray) -> np.ndarray:
        """Norm, logits and loss of the next token, and of each further one that is predicted, behind a layer."""
        model = self.model
        out = np.zeros((4, len(CAUSES)))
        columns = model.vocab_size / self.tp if model.predicts_words else 2.0
        out[:, ARITHMETIC] += self._products([(self.tokens, model.hidden_size, columns)])
        self._add_passes(out, 3.0 * self.tokens * columns * 4 / self.width + 2.0 * self.whole * model.hidden_size)
        if self.tp > 1:
            statistics = self._collective("all_reduce", 12.0 * self.tokens, self.spans.tp)
            out[FORWARD, TENSOR] += statistics + self._gathered()
            self._add_reduction(out, INPUT_GRAD)
        self._add_dispatch(out, self.device.microbatch_us / 2)
        if model.mtp.mtp_num_layers:
            joined = self._products([(self.tokens, 2 * model.hidden_size, model.hidden_size / self.tp)])
            further = out + layer
            further[:, ARITHMETIC] += joined
            out = out + model.mtp.mtp_num_layers * further
        out[AGAIN] = 0.0
        return out

    # ---- arithmetic -------------------------------------------------------------------------------------------------
    def _products(self, shapes: Sequence[Shape], times: float = 1.0) -> np.ndarray:
        """Return the seconds of products in every phase; a weight's gradient is added to where it is summed."""
        out = np.zeros(4)
        for rows, inner, columns in shapes:
            forward = self.device.product_seconds(rows, inner, columns, self.product_dtype)
            out[FORWARD] += forward
            out[INPUT_GRAD] += self.device.product_seconds(rows, columns, inner, self.product_dtype)
            weights = self.device.product_seconds(columns, rows, inner, self.product_dtype)
            summed = 8.0 * inner * columns / self.device.memory_gb_per_s / 1e9 if self.device.asynchronous else 0.0
            out[WEIGHT_GRAD] += weights + summed
            out[AGAIN] += forward
        return out * times

    def _attention_products(self) -> list[Shape]:
        model, tokens, tp = self.model, self.tokens, self.tp
        h, heads = model.hidden_size, model.num_attention_heads
        if not model.mla.multi_latent_attention:
            query, keys = heads * model.kv_channels, 2 * model.num_query_groups * model.kv_channels
            return [(tokens, h, (query + keys) / tp), (tokens, query / tp, h)]
        mla = model.mla
        down = mla.kv_lora_rank + mla.qk_pos_emb_head_dim
        queries = [(tokens, mla.q_lora_rank or h, heads * mla.head_size / tp)]
        if mla.q_lora_rank:
            queries.append((tokens, h, mla.q_lora_rank))
        up = heads * (mla.qk_head_dim + mla.v_head_dim) / tp
        return [*queries, (tokens, h, down), (tokens, mla.kv_lora_rank, up), (tokens, heads * mla.v_head_dim / tp, h)]

    def _mlp_products(self, width: int = 0) -> list[Shape]:
        model = self.model
        width = width or model.ffn_hidden_size
        up = width * (2 if model.is_gated else 1) / self.tp
        return [(self.tokens, model.hidden_size, up), (self.tokens, width / self.tp, model.hidden_size)]

    def _experts(self) -> np.ndarray:
        """Router, shared expert, and the experts' products and exchanges for even loads."""
        model, parallel, moe = self.model, self.parallel, self.model.moe
        ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
        out = np.zeros((4, len(CAUSES)))
        routed = self.tokens / self.tp
        shared = moe.moe_shared_expert_intermediate_size
        whole = [(routed, model.hidden_size, moe.num_experts)]
        out[:, ARITHMETIC] += self._products([*whole, *(self._mlp_products(shared) if shared else [])])
        own = moe.num_experts // ep
        rows = routed * moe.moe_router_topk * etp / own
        width = moe.moe_ffn_hidden_size / etp
        up = width * (2 if model.is_gated else 1)
        rated, times = (_ENDLESS, own * rows / _ENDLESS) if self.ideal_experts else (rows, own)
        shapes = [(rated, model.hidden_size, up), (rated, width, model.hidden_size)]
        out[:, ARITHMETIC] += self._products(shapes, times)
        self._add_passes(out, rows * own * (4.0 * model.hidden_size + up + width))  # taken, put back, activated
        if ep * etp > 1 and not self.ideal_experts:
            kind = "all_to_all" if moe.moe_token_dispatcher_type == "alltoall" else "all_gather"
            sent = exchanged_bytes(self.config, self.width) / 4.0  # there, back, and the same for gradients
            size = sent * ep * etp / (ep * etp - 1)
            there = self._collective(kind, size, self.spans.ep_etp)
            back = there if kind == "all_to_all" else self._collective("reduce_scatter", size, self.spans.ep_etp)
            for phase in (FORWARD, INPUT_GRAD, AGAIN):
                out[phase, EXPERTS] += there + back
        if shared and self.tp > 1:
            self._add_tensor_parallel(out, 1)
        return out

    def _add_attention(self, out: np.ndarray) -> None:
        """Add the scores' products, causal ones of half of the keys; without a fused kernel, passes over all scores."""
        model = self.model
        heads, per_head = model.num_attention_heads / self.tp, 2 * model.kv_channels
        if model.mla.multi_latent_attention:
            per_head = model.mla.head_size + model.mla.v_head_dim
        scores = self.tokens * heads * model.seq_length
        if model.use_flash_attention or self.device.fused_attention:
            seen = 2 if model.bert.is_encoder else 1
            forward = self.device.attention_seconds(seen * scores * per_head, model.seq_length, self.dtype)
            backward = BACKWARD_OF_ATTENTION * forward
        else:
            share = 2.0 * model.seq_length * model.kv_channels
            batches = scores / model.seq_length**2
            forward = batches * self.device.product_seconds(
                model.seq_length, share / model.seq_length, 2 * model.seq_length, self.dtype
            )
            passes = scores * 6 * self.width / self.device.memory_gb_per_s / 1e9
            forward, backward = forward + passes, 2 * (forward + passes)
        out[FORWARD, ARITHMETIC] += forward
        out[INPUT_GRAD, ARITHMETIC] += backward
        out[AGAIN, ARITHMETIC] += forward

    def attention_again(self) -> np.ndarray:
        """Return what selective recomputation adds to a layer, [phase, cause]: its core attention."""
        out = np.zeros((4, len(CAUSES)))
        self._add_attention(out)
        out[:AGAIN] = 0.0
        return out

    def _elements(self, sparse: bool) -> float:
        """Return how many elements norms, residuals, activations and the layout of heads go over in forward."""
        model = self.model
        norms = 8.0 if model.use_sandwich_norm else 4.0
        dropout = 4.0 if model.hidden_dropout_rate else 0.0
        whole = self.whole * model.hidden_size * (norms + 6.0 + dropout)
        heads = 2.0 * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
        up = 0.0 if sparse else model.ffn_hidden_size * (3.0 if model.is_gated else 2.0)
        return whole + self.tokens * (heads + up) / self.tp

    def _add_passes(self, out: np.ndarray, elements: float) -> None:
        seconds = elements * self.width / self.device.memory_gb_per_s / 1e9
        out[FORWARD, ARITHMETIC] += seconds
        out[INPUT_GRAD, ARITHMETIC] += PASSES_BACKWARD * seconds
        out[AGAIN, ARITHMETIC] += seconds

    # ---- transfers --------------------------------------------------------------------------------------------------
    def _collective(self, kind: str, size: float, span: Span) -> float:
        return self.device.collective_seconds(kind, size, span)

    def _gathered(self) -> float:
        """Return the time to gather what sequence parallelism has cut; nothing without it."""
        cut = self.parallel.sequence_parallel
        return self._collective("all_gather", self.hidden_bytes, self.spans.tp) if cut else 0.0

    def _add_reduction(self, out: np.ndarray, phase: int) -> None:
        kind = "reduce_scatter" if self.parallel.sequence_parallel else "all_reduce"
        out[phase, TENSOR] += self._collective(kind, self.hidden_bytes, self.spans.tp)

    def _add_tensor_parallel(self, out: np.ndarray, blocks: int) -> None:
        """Add each block's sum behind it and in front of it in backward; sequence parallelism gathers, and again."""
        if self.tp == 1:
            return
        for _ in range(blocks):
            for phase in (FORWARD, INPUT_GRAD, AGAIN):
                out[phase, TENSOR] += self._gathered()
                self._add_reduction(out, phase)
            out[WEIGHT_GRAD, TENSOR] += self._gathered()

    def _add_context_parallel(self, out: np.ndarray) -> None:
        if self.cp == 1:
            return
        words = self.parallel.cp_comm_type
        attention = np.zeros((4, len(CAUSES)))
        self._add_attention(attention)
        for word in words:
            forward, backward = self._exchange(word)
            if word == "p2p" and self.device.overlap:  # all but the rank's own block are computed meanwhile
                beside = attention[:, ARITHMETIC] * (self.cp - 1) / self.cp
                forward, backward = max(0.0, forward - beside[FORWARD]), max(0.0, backward - beside[INPUT_GRAD])
            for phase, seconds in ((FORWARD, forward), (INPUT_GRAD, backward), (AGAIN, forward)):
                out[phase, CONTEXT] += seconds / len(words)

    def _exchange(self, word: str) -> tuple[float, float]:
        """Return the seconds of context parallel ranks' exchange, forward and backward."""
        model, cp = self.model, self.cp
        keys = 2.0 * model.num_query_groups * model.kv_channels / self.tp * self.tokens * self.width
        queries = 2.0 * model.num_attention_heads * model.kv_channels / self.tp * self.tokens * self.width
        if word == "all_gather":
            gathered = self._collective("all_gather", keys * cp, self.spans.cp)
            return gathered, gathered + self._collective("reduce_scatter", keys * cp, self.spans.cp)
        if word == "a2a":
            once = self._collective("all_to_all", keys + queries, self.spans.cp)
            return once, once
        if word == "p2p":
            step = self._collective("point_to_point", keys, self.spans.cp)
            return (cp - 1) * step, (2 * cp - 1) * step
        inner, ring = self.parallel.hierarchical_context_parallel_sizes
        near, far = Span(inner, self.tp), Span(ring, self.tp * inner)
        once = self._collective("all_to_all", keys + queries, near)
        step = self._collective("point_to_point", keys, far)
        return once + (ring - 1) * step, once + (2 * ring - 1) * step

    # ---- dispatch ---------------------------------------------------------------------------------------------------
    def _add_dispatch(self, out: np.ndarray, microseconds: float) -> None:
        """Add the host's time, two fifths of it forward; where it runs ahead, only what the device does not cover."""
        for phase, share in ((FORWARD, 0.4), (INPUT_GRAD, 0.45), (WEIGHT_GRAD, 0.15), (AGAIN, 0.4)):
            host = microseconds * share * 1e-6
            covered = float(out[phase].sum()) if self.device.asynchronous else 0.0
            out[phase, DISPATCH] += max(0.0, host - covered)

