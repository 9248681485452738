"""A GPT model, or the part of one that a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.errors import ConfigError
from parallel_core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from parallel_core.tensor_parallel.parameter import ShardSpec, make_parameter
from parallel_core.transformer.block import TransformerBlock
from parallel_core.transformer.build import BuildContext
from parallel_core.transformer.embedding import LanguageModelEmbedding
from parallel_core.transformer.recompute_plan import RecomputePlan


class GPTModel(nn.Cell):
    """Embedding (first stage), transformer layers, output layer and loss (last stage).

    Args:
        build: configuration, tensor parallel group, streams, seed.
        layer_numbers: global numbers of this stage's layers; None: all of them.
        pre_process: this stage embeds tokens; otherwise it is given hidden states by `set_input_tensor`.
        post_process: this stage ends in logits or losses; otherwise it returns hidden states.
        parallel_output: return this rank's part of the logits' vocabulary instead of all of it.
        plan: what is recomputed in backward.
    """

    def __init__(
        self,
        build: BuildContext,
        layer_numbers: Sequence[int] | None = None,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        parallel_output: bool = True,
        plan: RecomputePlan | None = None,
    ) -> None:
        super().__init__(auto_prefix=True)
        config = build.config
        self.config, self.tp_group, self.residual_dtype = config, build.tp_group, build.residual_dtype
        self.compute_dtype = build.compute_dtype
        self.pre_process, self.post_process, self.parallel_output = pre_process, post_process, parallel_output
        self.sequence_parallel = build.sequence_parallel
        self._input_tensor: Tensor | None = None
        tied = not config.untie_embeddings_and_output_weights
        self.embedding = LanguageModelEmbedding(build) if pre_process else None
        numbers = range(config.num_layers) if layer_numbers is None else layer_numbers
        self.decoder = TransformerBlock(build, numbers, post_layer_norm=post_process, plan=plan)
        self.output_layer: ColumnParallelLinear | None = None
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                config.vocab_size,
                tp_group=build.tp_group,
                init_method=build.init("output_layer.weight"),
                bias=False,
                sequence_parallel=build.sequence_parallel,
                params_dtype=config.params_dtype,
                name="output_layer",
                skip_weight_param_allocation=tied,
            )
            if self.output_layer.weight is not None:
                self._mark_output(self.output_layer.weight)
        self.tied_weight = self._tied_copy(build) if tied and post_process and not pre_process else None
        if tied and self.embedding is not None and not post_process:
            weight = self.embedding.word_embeddings.weight
            weight.shard = ShardSpec(**{**vars(weight.shard), "shared_embedding": True})

    def set_input_tensor(self, hidden: Tensor | None) -> None:
        """Give the hidden states from the previous stage to the next call; they are used once."""
        self._input_tensor = hidden

    def shared_embedding_or_output_weight(self) -> Parameter | None:
        """Return the output layer's [V / tp, H] weight: the embedding's when they are tied; None without either."""
        if self.config.untie_embeddings_and_output_weights:
            return None if self.output_layer is None else self.output_layer.weight
        if self.tied_weight is not None or self.embedding is None:
            return self.tied_weight
        return self.embedding.word_embeddings.weight

    def construct(
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: int32 [B, S]; used on the first stage.
            position_ids: int32 [B, S]; None: 0..S-1. Used with learned positions.
            attention_mask: int32 [B, S], the first position that each position may see; None: causal over the whole
                sequence.
            labels: int32 [B, S]; used on the last stage.

        Returns:
            Hidden states [S, B, H] ([S / tp, B, H] with sequence parallelism) before the last stage; on the last one
            the loss of every token, float32 [B, S], or without labels the logits [B, S, V / tp] (all of V unless
            `parallel_output`).

        Raises:
            ConfigError: if `attention_mask` is not an int32 [B, S].
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ConfigError(
                f"attention_mask of shape {attention_mask.shape}: give int32 [B, S] with the first position that each "
                f"position may see (the dataset's document starts), or None for plain causal attention"
            )
        hidden = self._stage_input(tokens, position_ids)
        hidden = self.decoder(hidden, attention_mask)
        if self.output_layer is None:
            return hidden
        logits, _ = self.output_layer(ops.cast(hidden, self.compute_dtype), self._output_weight())
        if labels is None:
            if not self.parallel_output:
                logits = gather_from_tensor_model_parallel_region(logits, self.tp_group)
            return logits.transpose(1, 0, 2)
        return self._loss(logits, labels)

    def _stage_input(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        if self.embedding is not None:
            return self.embedding(tokens, position_ids)
        hidden, self._input_tensor = self._input_tensor, None
        if hidden is None:
            raise ConfigError("this pipeline stage has no embedding: call set_input_tensor(hidden) before each call")
        return hidden

    def _output_weight(self) -> Tensor | None:
        return None if self.config.untie_embeddings_and_output_weights else self.shared_embedding_or_output_weight()

    def _loss(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        if not self.config.fp16_lm_cross_entropy:
            logits_SBV = ops.cast(logits_SBV, ms.float32)
        labels_SB = labels_BS.transpose(1, 0)
        smoothing = self.config.label_smoothing
        loss_SB = vocab_parallel_cross_entropy(logits_SBV, labels_SB, self.tp_group, smoothing, reuse_logits=True)
        return loss_SB.transpose(1, 0)

    @staticmethod
    def _mark_output(weight: Parameter) -> None:
        weight.shard = ShardSpec(**{**vars(weight.shard), "is_embedding_or_output": True})

    @staticmethod
    def _tied_copy(build: BuildContext) -> Parameter:
        """Return the last stage's copy of the word embedding; it starts equal because initial values go by name."""
        name = "embedding.word_embeddings.weight"
        spec = ShardSpec(
            name,
            (build.config.vocab_size, build.config.hidden_size),
            partition_dim=0,
            rank=build.tp_group.rank,
            size=build.tp_group.size,
            is_embedding_or_output=True,
            shared_embedding=True,
            is_copy=True,
        )
        return make_parameter(spec, build.embedding_init(name), build.config.embedding_init_dtype)
