"""Multi-latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), in Megatron-LM's conventions.

Queries come from a latent of their own or from the residual stream, keys and values from one latent that all heads
share; some channels of each query and key turn with the position, and of keys all heads share these channels.

Shapes: S sequence, B microbatch, H hidden, N heads of this rank, R channels that turn, X = qk_head_dim + R,
Y = qk_head_dim + v_head_dim.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.comm.interface import SoloGroup
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import mark
from parallel_core.ops import reference
from parallel_core.tape import reshaped
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel_core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.attention import CoreAttention
from parallel_core.transformer.norm import make_norm
from parallel_core.transformer.rope import RotaryEmbedding
from parallel_core.transformer.stage import ModelStage


class MultiLatentAttention(nn.Cell):
    """Projections to latents, norms of these (with qk_layernorm), projections to heads, attention, output projection.

    Heads are cut over the tensor parallel group; the projections to latents are whole on every rank, and with sequence
    parallelism each works on its part of the sequence, so that what is gathered is as narrow as the latents.

    Args:
        stage: configuration, group, streams.
        layer_number: global number of the layer, from 0.
        name: global name of this module.
        recompute_core: run core attention again in backward instead of keeping its activations.
        regather_input: see `ColumnParallelLinear`; of the projections from latents to heads.

    Communication:
        the output projection's; of each latent and of the shared channels of keys backward 1 all-reduce, or with
        sequence parallelism the all-gathers and reduce-scatters of `ColumnParallelLinear`.
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
        config, mla, size = stage.config, stage.config.mla, stage.tp_group.size
        heads = config.num_attention_heads
        if heads % size:
            raise ConfigError(f"num_attention_heads={heads} is not a multiple of tensor_model_parallel_size={size}")
        self.num_heads, self.kv_lora_rank, self.rotary_size = heads // size, mla.kv_lora_rank, mla.qk_pos_emb_head_dim
        self.tp_group, self.sequence_parallel = stage.tp_group, stage.sequence_parallel
        self.streams, self.recompute_core = stage.streams, recompute_core
        self._positions = stage.positions

        def to_heads(inputs: int, width: int, key: str) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inputs,
                heads * width,
                tp_group=stage.tp_group,
                init_method=stage.init(f"{name}.{key}.weight"),
                bias=False,
                sequence_parallel=stage.sequence_parallel,
                regather_input=regather_input,
                params_dtype=config.params_dtype,
                name=f"{name}.{key}",
            )

        def to_latent(width: int, key: str) -> ColumnParallelLinear:
            linear = ColumnParallelLinear(
                config.hidden_size,
                width,
                tp_group=SoloGroup(),
                init_method=stage.init(f"{name}.{key}.weight"),
                bias=False,
                params_dtype=config.params_dtype,
                name=f"{name}.{key}",
            )
            mark(linear.weight, partial_gradient=stage.sequence_parallel)
            return linear

        def latent_norm(width: int, key: str) -> nn.Cell | None:
            if not config.qk_layernorm:
                return None
            return make_norm(config, f"{name}.{key}", partial_gradient=stage.sequence_parallel, size=width)

        self.linear_proj = RowParallelLinear(
            heads * mla.v_head_dim,
            config.hidden_size,
            tp_group=stage.tp_group,
            init_method=stage.output_init(f"{name}.linear_proj.weight"),
            bias=config.out_proj_has_bias,
            skip_bias_add=True,
            sequence_parallel=stage.sequence_parallel,
            params_dtype=config.params_dtype,
            name=f"{name}.linear_proj",
        )
        self.linear_q_down_proj: ColumnParallelLinear | None = None
        self.q_layernorm: nn.Cell | None = None
        if mla.q_lora_rank:
            self.linear_q_down_proj = to_latent(mla.q_lora_rank, "linear_q_down_proj")
            self.linear_q_up_proj = to_heads(mla.q_lora_rank, mla.head_size, "linear_q_up_proj")
            self.q_layernorm = latent_norm(mla.q_lora_rank, "q_layernorm")
        else:
            self.linear_q_proj = to_heads(config.hidden_size, mla.head_size, "linear_q_proj")
        self.linear_kv_down_proj = to_latent(mla.kv_lora_rank + mla.qk_pos_emb_head_dim, "linear_kv_down_proj")
        self.linear_kv_up_proj = to_heads(mla.kv_lora_rank, mla.qk_head_dim + mla.v_head_dim, "linear_kv_up_proj")
        self.kv_layernorm = latent_norm(mla.kv_lora_rank, "kv_layernorm")
        self.core_attention = (stage.make_core_attention or CoreAttention)(stage, layer_number, name)
        self.rotary = RotaryEmbedding(config)
        self.recompute_heads = recompute_core and config.recomputes("mla_up_proj")
        self._make_heads = ops.latent_heads if config.apply_rope_fusion else reference.latent_heads

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
        latents = self.latents(hidden)
        masks = () if document_start_BS is None else (document_start_BS,)
        if self.recompute_heads:

            def attend(query: Tensor, latent: Tensor, k_pos: Tensor, *masks: Tensor) -> Tensor:
                return self.core_attention(*self._heads(query, latent, k_pos, positions), *masks)

            to_queries = self.linear_q_proj if self.linear_q_down_proj is None else self.linear_q_up_proj
            cells = (to_queries, self.q_layernorm, self.linear_kv_up_proj, self.kv_layernorm)
            parameters = [p for cell in cells if cell is not None for p in cell.trainable_params()]
            context = recompute(attend, (*latents, *masks), parameters, self.streams)
        elif self.recompute_core:
            context = recompute(self.core_attention, (*self._heads(*latents, positions), *masks), (), self.streams)
        else:
            context = self.core_attention(*self._heads(*latents, positions), *masks)
        return self.linear_proj(context)

    def latents(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what queries, and keys with values, are projected from, and the channels that all keys share."""
        query = hidden
        if self.linear_q_down_proj is not None:
            query, _ = self.linear_q_down_proj(hidden)
        both, _ = self.linear_kv_down_proj(hidden)
        latent, k_pos = ops.split_last_dim(both, (self.kv_lora_rank, self.rotary_size))
        # Every rank uses the shared channels in its own heads alone: their gradient is the sum over all ranks.
        if self.sequence_parallel:
            k_pos = gather_from_sequence_parallel_region(k_pos, self.tp_group)
        else:
            k_pos = copy_to_tensor_model_parallel_region(k_pos, self.tp_group)
        return query, latent, k_pos

    def queries(self, query: Tensor) -> Tensor:
        """Return the queries of this rank's heads, [S, B, N * X], before any channel turns, from the first latent."""
        if self.linear_q_down_proj is None:
            return self.linear_q_proj(query)[0]
        return self.linear_q_up_proj(query if self.q_layernorm is None else self.q_layernorm(query))[0]

    def normed(self, latent: Tensor) -> Tensor:
        """Return the latent of keys and values as it is projected to heads."""
        return latent if self.kv_layernorm is None else self.kv_layernorm(latent)

    def _heads(self, query: Tensor, latent: Tensor, k_pos: Tensor, positions: np.ndarray | None) -> tuple[Tensor, ...]:
        """Return queries, keys [S, B, N, X] and values [S, B, N, v_head_dim] of this rank's heads."""
        query = self.queries(query)
        key_value, _ = self.linear_kv_up_proj(self.normed(latent))
        S, B, _ = query.shape
        tables = self.rotary.tables(S, self._positions(S) if positions is None else positions)
        query, key_value = (reshaped(x, S, B, self.num_heads, x.shape[2] // self.num_heads) for x in (query, key_value))
        return tuple(self._make_heads(query, key_value, k_pos, *tables))
