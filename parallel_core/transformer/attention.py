"""Causal self-attention with heads cut over the tensor parallel group; grouped queries share keys and values.

Shapes: S sequence, B microbatch, H hidden, N query heads, G key/value heads (both of this rank), D head size.
"""

from __future__ import annotations

import math
from typing import Any

from mindspore import Tensor, mint, nn

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.errors import ConfigError
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.build import BuildContext
from parallel_core.transformer.norm import make_norm
from parallel_core.transformer.rope import RotaryEmbedding


class CoreAttention(nn.Cell):
    """softmax(Q K^T / sqrt(D), masked) V with dropout on the weights; has no parameters.

    With query-key layer scaling the scores are divided by the layer's number from 1 before the (fp16) product is
    rounded, and multiplied back inside the softmax.
    """

    def __init__(self, build: BuildContext, layer_number: int, name: str) -> None:
        super().__init__()
        config = build.config
        self.streams, self.site = build.streams, f"{name}.attention_dropout"
        self.dropout_rate = config.attention_dropout_rate
        self.coefficient = float(layer_number + 1) if config.apply_query_key_layer_scaling else 1.0
        self.scale = 1.0 / (math.sqrt(config.kv_channels) * self.coefficient)
        self.softmax_in_fp32 = config.attention_softmax_in_fp32 or config.apply_query_key_layer_scaling

    def construct(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, document_start_BS: Tensor | None = None
    ) -> Tensor:
        """Return the context, [S, B, N * D]."""
        rate = self.dropout_rate if self.streams.training else 0.0
        return ops.causal_attention(
            query_SBND,
            key_SBGD,
            value_SBGD,
            scale=self.scale,
            softmax_coefficient=self.coefficient,
            softmax_in_fp32=self.softmax_in_fp32,
            document_start_BS=document_start_BS,
            dropout_rate=rate,
            dropout_seed=self.streams.seeds(self.site, sharded=True) if rate else (0, 0),
        )


class SelfAttention(nn.Cell):
    """Fused query-key-value projection, core attention, output projection.

    The rows of `linear_qkv.weight` are Megatron's: for each key/value head its query heads, its key, its value.

    Args:
        build: configuration, group, streams.
        layer_number: global number of the layer, from 0.
        name: global name of this module.
        recompute_core: run core attention again in backward instead of keeping its activations.
        regather_input: see `ColumnParallelLinear`.
    """

    def __init__(
        self,
        build: BuildContext,
        layer_number: int,
        name: str,
        *,
        recompute_core: bool = False,
        regather_input: bool = True,
    ) -> None:
        super().__init__(auto_prefix=True)
        config, size = build.config, build.tp_group.size
        for key, heads in (
            ("num_attention_heads", config.num_attention_heads),
            ("num_query_groups", config.num_query_groups),
        ):
            if heads % size:
                raise ConfigError(f"{key}={heads} is not a multiple of tensor_model_parallel_size={size}")
        self.head_size = config.kv_channels
        self.num_groups = config.num_query_groups // size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.streams, self.recompute_core = build.streams, recompute_core
        common: dict[str, Any] = {
            "tp_group": build.tp_group,
            "sequence_parallel": build.sequence_parallel,
            "params_dtype": config.params_dtype,
        }
        self.linear_proj = RowParallelLinear(
            config.num_attention_heads * config.kv_channels,
            config.hidden_size,
            init_method=build.output_init(f"{name}.linear_proj.weight"),
            bias=config.out_proj_has_bias,
            skip_bias_add=True,
            name=f"{name}.linear_proj",
            **common,
        )
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels,
            init_method=build.init(f"{name}.linear_qkv.weight"),
            bias=config.qkv_has_bias,
            regather_input=regather_input,
            name=f"{name}.linear_qkv",
            **common,
        )
        self.core_attention = CoreAttention(build, layer_number, name)
        self.rotary = RotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.q_layernorm: nn.Cell | None = None
        self.k_layernorm: nn.Cell | None = None
        if config.qk_layernorm:
            self.q_layernorm = make_norm(config, f"{name}.q_layernorm", partial_gradient=True, size=self.head_size)
            self.k_layernorm = make_norm(config, f"{name}.k_layernorm", partial_gradient=True, size=self.head_size)

    def construct(self, hidden: Tensor, document_start_BS: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias or None).

        Args:
            hidden: [S, B, H], or [S / tp, B, H] with sequence parallelism.
            document_start_BS: int32, the first position that each position may see; None: 0.

        Returns:
            The output in hidden's shape, before the bias of the projection, and that bias [H].
        """
        query, key, value = self._query_key_value(hidden)
        if self.recompute_core:
            masks = () if document_start_BS is None else (document_start_BS,)
            context = recompute(self.core_attention, (query, key, value, *masks), (), self.streams)
        else:
            context = self.core_attention(query, key, value, document_start_BS)
        return self.linear_proj(context)

    def _query_key_value(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        D, G, per_group = self.head_size, self.num_groups, self.heads_per_group
        mixed, _ = self.linear_qkv(hidden)
        S, B = mixed.shape[:2]
        mixed = mixed.reshape(S, B, G, (per_group + 2) * D)
        query, key, value = _SplitQueryKeyValue.apply(mixed, per_group * D, D)
        query = query.reshape(S, B, G * per_group, D)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        return query, key, value


class _SplitQueryKeyValue(Function):
    """Cuts the last dim in three. (`mint.split` has a wrong gradient when a part's gradient is a transposed view.)"""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, query_width: int, head_size: int) -> tuple[Tensor, ...]:
        ends = (0, query_width, query_width + head_size, query_width + 2 * head_size)
        return tuple(mixed[..., a:b].contiguous() for a, b in zip(ends, ends[1:]))

    @staticmethod
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        return mint.cat((dquery.contiguous(), dkey.contiguous(), dvalue.contiguous()), -1), None, None
