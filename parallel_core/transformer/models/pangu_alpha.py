"""PanGu-alpha: a GPT whose last layer asks by position, not by what stands there.

The last of `num_layers` is the query layer. Its queries are rows of a learned table, one for each position, the same
for every sequence; its keys, values and residual are the hidden states. So a position predicts the next token from a
query that knows its place alone. The final norm comes before that layer (the released models) or after it (those that
were trained with a pipeline): `top_query_layer` says which, whatever the layout.

Source: Zeng et al. 2021 (arXiv:2104.12369), section 2, and the models' published code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.layout.recompute import RecomputePlan
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.attention import CoreAttention
from parallel_core.transformer.block import TransformerBlock
from parallel_core.transformer.embedding import LearnedPositions
from parallel_core.transformer.gpt_model import GPTModel
from parallel_core.transformer.layer import TransformerLayer
from parallel_core.transformer.norm import make_norm
from parallel_core.transformer.stage import ModelStage


class QueryAttention(nn.Cell):
    """Attention of given queries to the hidden states, causal like `SelfAttention`, whose arguments it has.

    The rows of `linear_kv.weight` are for each head its key, then its value.
    """

    def __init__(
        self,
        stage: ModelStage,
        layer_number: int,
        name: str,
        *,
        recompute_core: bool = False,
        regather_input: bool = True,
    ) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        self.head_size, self.streams, self.recompute_core = config.kv_channels, stage.streams, recompute_core
        width = config.num_attention_heads * config.kv_channels
        common: dict[str, Any] = {
            "tp_group": stage.tp_group,
            "sequence_parallel": stage.sequence_parallel,
            "params_dtype": config.params_dtype,
        }
        from_hidden: dict[str, Any] = {"bias": config.qkv_has_bias, "regather_input": regather_input, **common}
        self.linear_q = ColumnParallelLinear(
            config.hidden_size,
            width,
            init_method=stage.init(f"{name}.linear_q.weight"),
            name=f"{name}.linear_q",
            **from_hidden,
        )
        self.linear_kv = ColumnParallelLinear(
            config.hidden_size,
            2 * config.num_query_groups * config.kv_channels,
            init_method=stage.init(f"{name}.linear_kv.weight"),
            name=f"{name}.linear_kv",
            **from_hidden,
        )
        self.linear_proj = RowParallelLinear(
            width,
            config.hidden_size,
            init_method=stage.output_init(f"{name}.linear_proj.weight"),
            bias=config.out_proj_has_bias,
            skip_bias_add=True,
            name=f"{name}.linear_proj",
            **common,
        )
        self.core_attention = (stage.make_core_attention or CoreAttention)(stage, layer_number, name)

    def construct(
        self, hidden: Tensor, document_start_BS: Tensor | None, queries: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias or None) as `SelfAttention` does.

        Args:
            hidden: [S, B, H], or [S / tp, B, H] with sequence parallelism.
            document_start_BS: int32, the first position that each position may see; None: 0.
            queries: the query table's rows, in hidden's shape.
        """
        D = self.head_size
        query, _ = self.linear_q(ops.cast(queries, hidden.dtype))
        pairs, _ = self.linear_kv(hidden)
        key, value = ops.split_last_dim(pairs.reshape(*pairs.shape[:2], -1, 2 * D), (D, D))
        seen = (query.reshape(*query.shape[:2], -1, D), key, value)
        masks = () if document_start_BS is None else (document_start_BS,)
        if self.recompute_core:
            context = recompute(self.core_attention, (*seen, *masks), (), self.streams)
        else:
            context = self.core_attention(*seen, *masks)
        return self.linear_proj(context)


class QueryDecoder(nn.Cell):
    """The layers of a stage; on the last one the query layer, its table and the final norm stand on top."""

    def __init__(self, stage: ModelStage) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        self.streams, self.residual_dtype = stage.streams, stage.residual_dtype
        self.num_parts = stage.tp_group.size if stage.sequence_parallel else 1
        self.query_layer: TransformerLayer | None = None
        below = stage
        if stage.post_process:
            *layers, last = stage.layers
            plan = stage.plan or RecomputePlan(regather=len(stage.layers))
            below = replace(stage, layer_numbers=tuple(layers), plan=_without_last(plan, len(layers)))
            self.query_layer = TransformerLayer(
                stage,
                last,
                make_attention=QueryAttention,
                recompute_core_attention=len(layers) < plan.core_attention,
                regather_input=len(layers) < plan.regather,
            )
            self.recomputes = any(len(layers) in segment for segment in plan.segments)
            self.query_embedding = LearnedPositions(stage, "decoder.query_embedding")
            self.final_layernorm = make_norm(
                config, "decoder.final_layernorm", partial_gradient=stage.sequence_parallel
            )
            self.norm_first = config.top_query_layer == "norm_before"
        self.blocks = TransformerBlock(below, post_layer_norm=False)

    def construct(self, hidden: Tensor, position_ids: Tensor | None, document_start: Tensor | None) -> Tensor:
        """Return the output in hidden's shape; see `GPTModel.construct`."""
        hidden = self.blocks(hidden, document_start)
        if self.query_layer is None:
            return hidden
        if self.norm_first:
            hidden = ops.cast(self.final_layernorm(hidden), self.residual_dtype)
        shape = hidden.shape[1], hidden.shape[0] * self.num_parts
        queries = self.query_embedding(shape, position_ids)
        if self.recomputes:
            hidden = self._recomputed(self.query_layer, hidden, document_start, queries)
        else:
            hidden = self.query_layer(hidden, document_start, queries)
        return hidden if self.norm_first else self.final_layernorm(hidden)

    def _recomputed(
        self, layer: TransformerLayer, hidden: Tensor, document_start: Tensor | None, queries: Tensor
    ) -> Tensor:
        def run(x: Tensor, rows: Tensor, *masks: Tensor) -> Tensor:
            return layer(x, masks[0] if masks else None, rows)

        masks = () if document_start is None else (document_start,)
        return recompute(run, (hidden, queries, *masks), list(layer.trainable_params()), self.streams)


class PanguAlphaModel(GPTModel):
    """PanGu-alpha, or the part of one that a pipeline stage holds; arguments and results are `GPTModel`'s.

    Position ids are used on the last stage too.
    """

    def make_decoder(self, stage: ModelStage) -> nn.Cell:
        """Return the layers, with the query layer on top."""
        return QueryDecoder(stage)

    def decode(self, hidden: Tensor, position_ids: Tensor | None, document_start: Tensor | None) -> Tensor:
        """Return the query layer's output on the last stage, hidden states before it."""
        return self.decoder(hidden, position_ids, document_start)


def _without_last(plan: RecomputePlan, count: int) -> RecomputePlan:
    """Return the plan of the first `count` layers."""
    segments = (range(s.start, min(s.stop, count)) for s in plan.segments)
    return RecomputePlan(tuple(s for s in segments if s), min(plan.core_attention, count), min(plan.regather, count))
