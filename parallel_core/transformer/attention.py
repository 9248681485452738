"""Causal self-attention with heads cut over the tensor parallel group; grouped queries share keys and values.

Shapes: S sequence, B microbatch, H hidden, N query heads, G key/value heads (both of this rank), D head size.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

from parallel_core import ops
from parallel_core.context_parallel.attention import ContextAttention
from parallel_core.errors import ConfigError
from parallel_core.ops import ascend
from parallel_core.ops.documents import remember
from parallel_core.tape import has_hooks, reshaped
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.norm import make_norm
from parallel_core.transformer.rope import RotaryEmbedding
from parallel_core.transformer.stage import ModelStage


class CoreAttention(nn.Cell):
    """softmax(Q K^T / sqrt(D), masked) V with dropout on the weights; has no parameters.

    A layer may be given another one (`ModelStage.make_core_attention`): a Cell that is called with queries, keys and
    values. Only this one also takes them packed as the projection leaves them (`packed`), which saves three copies.

    With query-key layer scaling the scores are divided by the layer's number from 1 before the (fp16) product is
    rounded, and multiplied back inside the softmax. A window of W positions (`TransformerConfig.window_of` the layer)
    is a mask like that of documents: position s sees nothing before s - W.
    """

    def __init__(self, stage: ModelStage, layer_number: int, name: str) -> None:
        super().__init__()
        config = stage.config
        self.streams, self.site = stage.streams, f"{name}.attention_dropout"
        self.head_size, self.dropout_rate = config.kv_channels, config.attention_dropout_rate
        self.coefficient = float(layer_number + 1) if config.apply_query_key_layer_scaling else 1.0
        divisor = self.coefficient * (layer_number + 1 if config.scale_attn_by_inverse_layer_idx else 1)
        self.scale = config.attention_scale / divisor
        self.softmax_in_fp32 = config.attention_softmax_in_fp32 or config.apply_query_key_layer_scaling
        self.window = config.window_of(layer_number)
        self._window_start: Tensor | None = None
        self.cp_size = stage.context_groups.cp.size
        self._attend: Any = ops.causal_attention
        self._attend_packed: Any = ops.causal_attention_packed
        if ascend.has_flash_attention():
            chosen = config.use_flash_attention, config.fa_config.input_layout
            self._attend, self._attend_packed = ascend.attention_functions(*chosen)
        if self.cp_size > 1:
            self._attend = ContextAttention(stage.context_groups, stage.exchange_of(layer_number))
            self._attend_packed = self._attend.packed

    def construct(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGE: Tensor, document_start_BS: Tensor | None = None
    ) -> Tensor:
        """Return the context [S, B, N * E]; the values' head size E may differ from that of queries and keys."""
        options = self.options(query_SBND.shape[:2], document_start_BS)
        return self._attend(query_SBND, key_SBGD, value_SBGE, **options)

    def packed(self, mixed_SBGX: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        """Return the context [S, B, N * D] of packed queries, keys and values (see `ops.causal_attention_packed`)."""
        return self.attend_packed(mixed_SBGX, self.options(mixed_SBGX.shape[:2], document_start_BS))

    def attend_packed(self, mixed_SBGX: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the same by the kernel's options."""
        return self._attend_packed(mixed_SBGX, self.head_size, **options)

    def options(self, shape: tuple[int, int], document_start_BS: Tensor | None) -> dict[str, Any]:
        """Return the kernel's options for queries of `shape` (S, B); document starts are of whole sequences."""
        shape = shape[0] * self.cp_size, shape[1]
        if self.window < shape[0] - 1:
            document_start_BS = self._first_in_window(shape, document_start_BS)
        rate = self.dropout_rate if self.streams.training else 0.0
        return {
            "scale": self.scale,
            "softmax_coefficient": self.coefficient,
            "softmax_in_fp32": self.softmax_in_fp32,
            "document_start_BS": document_start_BS,
            "dropout_rate": rate,
            "dropout_seed": self.streams.seeds(self.site, sharded=True, by_position=True) if rate else (0, 0),
        }

    def _first_in_window(self, shape: tuple[int, int], document_start_BS: Tensor | None) -> Tensor:
        """Return the first position that each position sees, int32 [B, S], for queries of `shape` (S, B)."""
        S, B = shape
        if self._window_start is None or self._window_start.shape != (B, S):
            start = np.maximum(np.arange(S, dtype=np.int32) - self.window, 0)
            starts = np.ascontiguousarray(np.broadcast_to(start, (B, S)))
            self._window_start = remember(Tensor(starts, ms.int32), starts, self.window)
        if document_start_BS is None:
            return self._window_start
        return mint.maximum(document_start_BS, self._window_start)


class SelfAttention(nn.Cell):
    """Fused query-key-value projection, core attention, output projection.

    The rows of `linear_qkv.weight` are Megatron's: for each key/value head its query heads, its key, its value.

    Args:
        stage: configuration, group, streams.
        layer_number: global number of the layer, from 0.
        name: global name of this module.
        recompute_core: run core attention again in backward instead of keeping its activations.
        regather_input: see `ColumnParallelLinear`.
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
        config, size = stage.config, stage.tp_group.size
        for key in ("num_attention_heads", "num_query_groups"):
            if (heads := getattr(config, key)) % size:
                raise ConfigError(f"{key}={heads} is not a multiple of tensor_model_parallel_size={size}")
        self.head_size = config.kv_channels
        self.num_groups = config.num_query_groups // size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.streams, self.recompute_core = stage.streams, recompute_core
        self.positions = stage.positions
        common: dict[str, Any] = {
            "tp_group": stage.tp_group,
            "sequence_parallel": stage.sequence_parallel,
            "params_dtype": config.params_dtype,
        }
        self.linear_proj = RowParallelLinear(
            config.num_attention_heads * config.kv_channels,
            config.hidden_size,
            init_method=stage.output_init(f"{name}.linear_proj.weight"),
            bias=config.out_proj_has_bias,
            skip_bias_add=True,
            name=f"{name}.linear_proj",
            **common,
        )
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels,
            init_method=stage.init(f"{name}.linear_qkv.weight"),
            bias=config.qkv_has_bias,
            regather_input=regather_input,
            name=f"{name}.linear_qkv",
            **common,
        )
        self.core_attention = (stage.make_core_attention or CoreAttention)(stage, layer_number, name)
        self.rotary = RotaryEmbedding(config) if config.is_rotary else None
        self.q_layernorm: nn.Cell | None = None
        self.k_layernorm: nn.Cell | None = None
        if config.qk_layernorm:
            self.q_layernorm = make_norm(config, f"{name}.q_layernorm", partial_gradient=True, size=self.head_size)
            self.k_layernorm = make_norm(config, f"{name}.k_layernorm", partial_gradient=True, size=self.head_size)

    def construct(
        self, hidden: Tensor, document_start_BS: Tensor | None, positions: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias or None).

        Args:
            hidden: [S, B, H], or [S / tp, B, H] with sequence parallelism.
            document_start_BS: int32, the first position that each position may see; None: 0.
            positions: see `RotaryEmbedding`.

        Returns:
            The output in hidden's shape, before the bias of the projection, and that bias [H].
        """
        mixed, _ = self.linear_qkv(hidden)
        mixed = reshaped(mixed, *mixed.shape[:2], self.num_groups, (self.heads_per_group + 2) * self.head_size)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            mixed = self._normed(mixed, self.q_layernorm, self.k_layernorm)
        if self.rotary is not None:
            if positions is None:
                positions = self.positions(mixed.shape[0])
            mixed = self.rotary(mixed, self.head_size, positions)
        if self.recompute_core:
            masks = () if document_start_BS is None else (document_start_BS,)
            context = recompute(self._attend, (mixed, *masks), (), self.streams)
        else:
            context = self._attend(mixed, document_start_BS)
        return self.linear_proj(context)

    def _attend(self, mixed_SBGX: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        """Return the context; a core attention that has no `packed`, or whose calls somebody waits for, is called."""
        packed = getattr(self.core_attention, "packed", None)
        if packed is not None and not has_hooks(self.core_attention, ()):
            return packed(mixed_SBGX, document_start_BS)
        D = self.head_size
        query, key, value = ops.split_last_dim(mixed_SBGX, (self.heads_per_group * D, D, D))
        heads = reshaped(query, *query.shape[:2], query.shape[2] * self.heads_per_group, D)
        return self.core_attention(heads, key, value, document_start_BS)

    def _normed(self, mixed_SBGX: Tensor, q_layernorm: nn.Cell, k_layernorm: nn.Cell) -> Tensor:
        """Return the packed tensor with every query and key head normed."""
        D, per_group = self.head_size, self.heads_per_group
        query, key, value = ops.split_last_dim(mixed_SBGX, (per_group * D, D, D))
        heads = q_layernorm(reshaped(query, *query.shape[:3], per_group, D))
        return ops.packed_heads(reshaped(heads, *query.shape), k_layernorm(key), value)
