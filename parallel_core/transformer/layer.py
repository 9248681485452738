"""One transformer layer: attention and MLP, each after a norm, each added to the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.tensor_parallel.as_one import AsOne
from parallel_core.transformer.attention import SelfAttention
from parallel_core.transformer.feed_forward import make_feed_forward
from parallel_core.transformer.multi_latent_attention import MultiLatentAttention
from parallel_core.transformer.norm import RMSNorm, make_norm
from parallel_core.transformer.plain_layer import PlainLayer, takes_sums
from parallel_core.transformer.stage import ModelStage

Branch = tuple[Tensor, Tensor | None, Tensor]
"""What is added to the residual stream, the bias that is added with it, and what it is added to."""


class TransformerLayer(nn.Cell):
    """hidden + dropout(attention(norm(hidden))), then the same with the MLP.

    Options: a second norm on each branch before it is added (sandwich norm); the norm's output instead of its input
    as residual (`apply_residual_connection_post_layernorm`); the MLP beside attention instead of after it, both on the
    layer's input (`parallel_residual`).

    Args:
        stage: configuration, group, streams.
        layer_number: global number of the layer, from 0; part of every parameter's name.
        make_attention: builds the attention block, a Cell of `SelfAttention`'s form; None: that one.
        recompute_core_attention: see `SelfAttention`.
        regather_input: see `ColumnParallelLinear`.
    """

    def __init__(
        self,
        stage: ModelStage,
        layer_number: int,
        *,
        make_attention: Callable[..., nn.Cell] | None = None,
        recompute_core_attention: bool = False,
        regather_input: bool = True,
    ) -> None:
        super().__init__(auto_prefix=True)
        config, name = stage.config, stage.config.layer_name(layer_number)
        self.layer_number, self.name = layer_number, name
        self.compute_dtype = stage.compute_dtype
        self.streams, self.dropout_rate = stage.streams, config.hidden_dropout_rate
        self.dropout_is_sharded = stage.sequence_parallel and stage.tp_group.size > 1
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.parallel_residual = config.parallel_residual
        partial = stage.sequence_parallel
        self.input_layernorm = make_norm(config, f"{name}.input_layernorm", partial_gradient=partial)
        usual = MultiLatentAttention if config.mla.multi_latent_attention else SelfAttention
        self.self_attention = (make_attention or usual)(
            stage,
            layer_number,
            f"{name}.self_attention",
            recompute_core=recompute_core_attention,
            regather_input=regather_input,
        )
        self.pre_mlp_layernorm = make_norm(config, f"{name}.pre_mlp_layernorm", partial_gradient=partial)
        self.mlp = (stage.make_mlp or make_feed_forward)(stage, layer_number, regather_input=regather_input)
        self.post_attention_layernorm: nn.Cell | None = None
        self.post_mlp_layernorm: nn.Cell | None = None
        if config.use_sandwich_norm:
            self.post_attention_layernorm = make_norm(
                config, f"{name}.post_attention_layernorm", partial_gradient=partial, scale=config.attn_post_norm_scale
            )
            self.post_mlp_layernorm = make_norm(
                config, f"{name}.post_mlp_layernorm", partial_gradient=partial, scale=config.ffn_post_norm_scale
            )
        norm, follows = self.pre_mlp_layernorm, not (config.parallel_residual or config.use_sandwich_norm)
        self._norms_sum = follows and isinstance(norm, RMSNorm) and norm.fused
        self._plain, self._recorded = PlainLayer(self, config), AsOne(self, self._run, stage.streams)

    def construct(self, hidden: Tensor, document_start_BS: Tensor | None = None, *more: Tensor) -> Tensor:
        """Return the layer's output in the shape and dtype of `hidden`, [S, B, H] ([S / tp, B, H] when cut).

        What follows the document starts is for the attention block alone.
        """
        whole = self._plain.parts(hidden, more).whole
        if whole is not None:
            return whole(hidden, document_start_BS)
        return self._recorded(hidden, document_start_BS, *more)

    def _run(self, hidden: Tensor, document_start_BS: Tensor | None = None, *more: Tensor) -> Tensor:
        _, attention, mlp = self._plain.parts(hidden, more)
        if attention is not None:
            attended = attention(hidden, document_start_BS)
        else:
            branch, bias, residual = self.attend(hidden, document_start_BS, *more)
            alone = mlp is None and bias is None and not self.rate() and branch.dtype == residual.dtype
            if alone and self._norms_sum and takes_sums(self.pre_mlp_layernorm):
                return self.after_mlp(*self._fed(*self.pre_mlp_layernorm.of_sum(branch, residual)))
            attended = self.after_attention(branch, bias, residual)
        return self.after_mlp(*self.feed(attended, hidden)) if mlp is None else mlp(attended)

    def attend(self, hidden: Tensor, *masks: Tensor | None) -> Branch:
        """Return attention's branch; arguments as for calling."""
        normed = self.input_layernorm(hidden)
        branch, bias = self.self_attention(ops.cast(normed, self.compute_dtype), *masks)
        return branch, bias, normed if self.residual_after_norm else hidden

    def feed(self, hidden: Tensor, layer_input: Tensor) -> Branch:
        """Return the MLP's branch, of the hidden states after attention and of those before it."""
        return self._fed(self.pre_mlp_layernorm(layer_input if self.parallel_residual else hidden), hidden)

    def _fed(self, normed: Tensor, hidden: Tensor) -> Branch:
        branch, bias = self.mlp(ops.cast(normed, self.compute_dtype))
        return branch, bias, normed if self.residual_after_norm else hidden

    def after_attention(self, branch: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Return the hidden states with attention's branch."""
        return self._add(branch, bias, residual, self.post_attention_layernorm, "attention")

    def after_mlp(self, branch: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Return the hidden states with the MLP's branch."""
        return self._add(branch, bias, residual, self.post_mlp_layernorm, "mlp")

    def _add(
        self, branch: Tensor, bias: Tensor | None, residual: Tensor, post_norm: nn.Cell | None, which: str
    ) -> Tensor:
        rate, seed = self.rate(), self.seeds(which)
        if post_norm is not None:
            branch = ops.cast(post_norm(ops.bias_dropout_add(branch, bias, None, rate, seed)), residual.dtype)
            bias, rate, seed = None, 0.0, (0, 0)
        return ops.bias_dropout_add(branch, bias, residual, rate, seed)

    def seeds(self, which: str) -> tuple[int, int]:
        """Return the seeds of the next dropout of a branch, attention or mlp."""
        return self.streams.seeds(f"{self.name}.{which}_dropout", self.dropout_is_sharded) if self.rate() else (0, 0)

    def rate(self) -> float:
        """Return the rate of the branches' dropout."""
        return self.dropout_rate if self.streams.training else 0.0
