"""A GPT model, or the part of one that a pipeline stage holds."""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import mark
from parallel_core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from parallel_core.transformer.block import TransformerBlock
from parallel_core.transformer.embedding import LanguageModelEmbedding
from parallel_core.transformer.multi_token_prediction import AuxiliaryLoss, MultiTokenPrediction
from parallel_core.transformer.stage import ModelStage


class GPTModel(nn.Cell):
    """Embedding (first stage), transformer layers, output layer and loss (last stage).

    Args:
        stage: which part of the model this is, and what it is built from. Without `pre_process` it is given hidden
            states by `set_input_tensor`, without `post_process` it returns them.
        parallel_output: return this rank's part of the logits' vocabulary instead of all of it.
    """

    embedding_class: type[LanguageModelEmbedding] = LanguageModelEmbedding

    def __init__(self, stage: ModelStage, *, parallel_output: bool = True) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        self.config, self.tp_group, self.residual_dtype = config, stage.tp_group, stage.residual_dtype
        self.compute_dtype = stage.compute_dtype
        self.pre_process, self.post_process = stage.pre_process, stage.post_process
        self.parallel_output = parallel_output
        self.sequence_parallel = stage.sequence_parallel
        self._input_tensor: Tensor | None = None
        self.embedding = self.embedding_class(stage) if stage.pre_process else None
        self.decoder = self.make_decoder(stage)
        self.mtp = MultiTokenPrediction(stage) if stage.post_process and config.mtp.mtp_num_layers else None
        self.output_layer: ColumnParallelLinear | None = None
        if stage.post_process and config.predicts_words:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                config.vocab_size,
                tp_group=stage.tp_group,
                init_method=stage.init("output_layer.weight"),
                bias=config.bert.is_encoder,
                sequence_parallel=stage.sequence_parallel,
                params_dtype=config.params_dtype,
                name="output_layer",
                skip_weight_param_allocation=not config.untie_embeddings_and_output_weights,
            )
            if self.output_layer.weight is not None:
                mark(self.output_layer.weight, is_embedding_or_output=True)
        table = None if self.embedding is None else self.embedding.word_embeddings.weight
        self.tied_weight = stage.share_word_embeddings(table) if config.shares_word_embeddings else None

    def make_decoder(self, stage: ModelStage) -> nn.Cell:
        """Return what turns embeddings into the output layer's input; other models override this and `decode`.

        Raises:
            ConfigError: the configuration asks for another model.
        """
        query, head = stage.config.top_query_layer, stage.config.bert.bert_head
        if query != "none":
            raise ConfigError(f"top_query_layer={query}: a GPT has no query layer (bash pretrain_pangu.sh)")
        if head != "none":
            raise ConfigError(f"bert_head={head}: a GPT is no encoder; BertModel is")
        return TransformerBlock(stage, post_layer_norm=stage.post_process)

    def decode(self, hidden: Tensor, position_ids: Tensor | None, document_start: Tensor | None) -> Tensor:
        """Return the decoder's output; shapes and meanings as in `construct`."""
        return self.decoder(hidden, document_start)

    def set_input_tensor(self, hidden: Tensor | None) -> None:
        """Give the hidden states from the previous stage to the next call; they are used once."""
        self._input_tensor = hidden

    def shared_embedding_or_output_weight(self) -> Parameter | None:
        """Return the output layer's [V / tp, H] weight: the embedding's when they are tied; None without either."""
        if self.config.untie_embeddings_and_output_weights:
            return None if self.output_layer is None else self.output_layer.weight
        return self.word_embeddings()

    def word_embeddings(self) -> Parameter | None:
        """Return this stage's [V / tp, H] table of the word embedding, where it has one."""
        return self.tied_weight if self.embedding is None else self.embedding.word_embeddings.weight

    def take_auxiliary_losses(self) -> list[AuxiliaryLoss]:
        """Return the losses of the last call that come on top of what it returned, and forget them."""
        return [] if self.mtp is None else self.mtp.take_losses()

    def construct(
        self,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        document_start: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: int32 [B, S]; used on the first stage.
            position_ids: int32 [B, S]; None: 0..S-1. Used with learned positions.
            document_start: int32 [B, S], the first position that each position may see; None: causal over the whole
                sequence.
            labels: int32 [B, S]; used on the last stage.
            loss_mask: float32 [B, S], 1 where a token counts; None: everywhere. Used with multi-token prediction.

        Returns:
            Hidden states [S, B, H] ([S / tp, B, H] with sequence parallelism) before the last stage; on the last one
            the loss of every token, float32 [B, S], or without labels the logits [B, S, V / tp] (all of V unless
            `parallel_output`).

        Raises:
            ConfigError: if `document_start` is not an int32 [B, S].
        """
        if document_start is not None and document_start.ndim != 2:
            raise ConfigError(
                f"document_start of shape {document_start.shape}: give int32 [B, S] with the first position that each "
                f"position may see (the dataset's document starts), or None for plain causal attention"
            )
        hidden = self.hidden_states(tokens, position_ids, document_start)
        if self.output_layer is None:
            return hidden
        if self.mtp is not None and labels is not None:
            self.mtp(self, hidden, (tokens, labels, loss_mask), document_start)
        logits = self.logits_of(hidden)
        if labels is None:
            if not self.parallel_output:
                logits = gather_from_tensor_model_parallel_region(logits, self.tp_group)
            return logits.transpose(1, 0, 2)
        return self.loss_of(logits, labels)

    def hidden_states(
        self, tokens: Tensor, position_ids: Tensor | None = None, document_start: Tensor | None = None
    ) -> Tensor:
        """Return what the last layer gives, on the last stage after the final norm; arguments as for calling."""
        return self.decode(self._stage_input(tokens, position_ids), position_ids, document_start)

    def logits_of(self, hidden_SBH: Tensor) -> Tensor:
        """Return the last stage's logits of hidden states, [S, B, V / tp]."""
        if self.output_layer is None:
            raise ConfigError("this pipeline stage has no output layer; the last one has")
        return self.output_layer(ops.cast(hidden_SBH, self.compute_dtype), self._output_weight())[0]

    def _stage_input(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        if self.embedding is not None:
            return self.embedding(tokens, position_ids)
        hidden, self._input_tensor = self._input_tensor, None
        if hidden is None:
            raise ConfigError("this pipeline stage has no embedding: call set_input_tensor(hidden) before each call")
        return hidden

    def _output_weight(self) -> Tensor | None:
        return None if self.config.untie_embeddings_and_output_weights else self.shared_embedding_or_output_weight()

    def loss_of(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Return the loss of every token, float32 [B, S], of logits [S, B, V / tp] that it may overwrite."""
        if not self.config.fp16_lm_cross_entropy:
            logits_SBV = ops.cast(logits_SBV, ms.float32)
        labels_SB = ops.transposed(labels_BS)
        smoothing = self.config.label_smoothing
        loss_SB = vocab_parallel_cross_entropy(logits_SBV, labels_SB, self.tp_group, smoothing, reuse_logits=True)
        return ops.transposed(loss_SB)
