"""BERT: an encoder whose positions see all others, with norms after the additions and a head for its task.

x = LN(word + position + segment); in each layer a = LN(x + attention(x)), x = LN(a + mlp(a)). The head predicts the
words behind masks (dense, activation, LN, the tied word embedding and a bias), whether the second segment follows the
first (from the pooled first position), or where an answer begins and ends.

Source: Devlin et al. 2018 (arXiv:1810.04805), and the models' published code.
"""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

from parallel_core import ops
from parallel_core.comm.interface import SoloGroup
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import TensorShard, mark
from parallel_core.tensor_parallel.embedding import embedding_lookup
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    local_part,
)
from parallel_core.tensor_parallel.parameter import make_parameter
from parallel_core.transformer.attention import SelfAttention
from parallel_core.transformer.block import TransformerBlock
from parallel_core.transformer.embedding import LanguageModelEmbedding
from parallel_core.transformer.feed_forward import make_feed_forward
from parallel_core.transformer.gpt_model import GPTModel
from parallel_core.transformer.layer import Branch
from parallel_core.transformer.norm import make_norm
from parallel_core.transformer.stage import ModelStage


class BidirectionalAttention(nn.Cell):
    """softmax(Q K^T / sqrt(D), padding masked) V with dropout on the weights; has no parameters."""

    def __init__(self, stage: ModelStage, layer_number: int, name: str) -> None:  # noqa: ARG002 - `CoreAttention`'s form
        super().__init__()
        self.streams, self.site = stage.streams, f"{name}.attention_dropout"
        self.scale, self.dropout_rate = stage.config.attention_scale, stage.config.attention_dropout_rate

    def construct(
        self, query_SBND: Tensor, key_SBND: Tensor, value_SBND: Tensor, seen_BS: Tensor | None = None
    ) -> Tensor:
        """Return the context [S, B, N * D]; `seen_BS` is 0 where nobody may look."""
        rate = self.dropout_rate if self.streams.training else 0.0
        seed = self.streams.seeds(self.site, sharded=True) if rate else (0, 0)
        return ops.bidirectional_attention(
            query_SBND, key_SBND, value_SBND, seen_BS, scale=self.scale, dropout_rate=rate, dropout_seed=seed
        )


class BertLayer(nn.Cell):
    """norm(hidden + dropout(attention(hidden))), then the same with the MLP; arguments as `TransformerLayer`'s."""

    def __init__(
        self,
        stage: ModelStage,
        layer_number: int,
        *,
        recompute_core_attention: bool = False,
        regather_input: bool = True,
    ) -> None:
        super().__init__(auto_prefix=True)
        config, name = stage.config, stage.config.layer_name(layer_number)
        self.name, self.streams, self.dropout_rate = name, stage.streams, config.hidden_dropout_rate
        self.compute_dtype, self.residual_dtype = stage.compute_dtype, stage.residual_dtype
        self.is_cut = stage.sequence_parallel and stage.tp_group.size > 1
        self.self_attention = SelfAttention(
            stage,
            layer_number,
            f"{name}.self_attention",
            recompute_core=recompute_core_attention,
            regather_input=regather_input,
        )
        partial = stage.sequence_parallel
        self.post_attention_layernorm = make_norm(
            config, f"{name}.post_attention_layernorm", partial_gradient=partial
        )
        self.mlp = make_feed_forward(stage, layer_number, regather_input=regather_input)
        self.post_mlp_layernorm = make_norm(config, f"{name}.post_mlp_layernorm", partial_gradient=partial)

    def construct(self, hidden: Tensor, seen_BS: Tensor | None = None) -> Tensor:
        """Return the layer's output in the shape and dtype of `hidden`, [S, B, H] ([S / tp, B, H] when cut)."""
        hidden = self.after_attention(*self.attend(hidden, seen_BS))
        return self.after_mlp(*self.feed(hidden, hidden))

    def attend(self, hidden: Tensor, seen_BS: Tensor | None) -> Branch:
        """Return attention's branch."""
        return (*self.self_attention(ops.cast(hidden, self.compute_dtype), seen_BS), hidden)

    def feed(self, hidden: Tensor, layer_input: Tensor) -> Branch:  # noqa: ARG002 - `TransformerLayer`'s form
        """Return the MLP's branch."""
        return (*self.mlp(ops.cast(hidden, self.compute_dtype)), hidden)

    def after_attention(self, branch: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Return the norm of the hidden states with attention's branch."""
        return self._normed(branch, bias, residual, self.post_attention_layernorm, "attention")

    def after_mlp(self, branch: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Return the norm of the hidden states with the MLP's branch."""
        return self._normed(branch, bias, residual, self.post_mlp_layernorm, "mlp")

    def _normed(self, branch: Tensor, bias: Tensor | None, residual: Tensor, norm: nn.Cell, which: str) -> Tensor:
        rate = self.dropout_rate if self.streams.training else 0.0
        seed = self.streams.seeds(f"{self.name}.{which}_dropout", self.is_cut) if rate else (0, 0)
        return ops.cast(norm(ops.bias_dropout_add(branch, bias, residual, rate, seed)), self.residual_dtype)


class BertBlock(TransformerBlock):
    """The layers of one stage."""

    layer_class = BertLayer


class BertEmbedding(LanguageModelEmbedding):
    """dropout(norm(word(tokens) + position + segment)), as [S, B, H] or this rank's part of the sequence."""

    def __init__(self, stage: ModelStage) -> None:
        super().__init__(stage)
        config = stage.config
        shard = TensorShard.cut(
            "embedding.tokentype_embeddings.weight",
            (config.bert.num_tokentypes, config.hidden_size),
            partial_gradient=stage.sequence_parallel,
        )
        self.tokentype_embeddings = make_parameter(
            shard, stage.embedding_init(shard.name), config.embedding_init_dtype
        )
        self.layernorm = make_norm(config, "embedding.layernorm", partial_gradient=stage.sequence_parallel)

    def construct(self, tokens_BS: Tensor, tokentype_ids_BS: Tensor | None) -> Tensor:
        """Return the embeddings in the residual stream's dtype.

        Args:
            tokens_BS: int32 token ids.
            tokentype_ids_BS: int32, the segment of each token; None: all of the first one.
        """
        words = self.word_embeddings(tokens_BS.transpose(1, 0))
        if tokentype_ids_BS is None:
            tokentype_ids_BS = Tensor(np.zeros(tokens_BS.shape, np.int32))
        types_SB = tokentype_ids_BS.transpose(1, 0)
        types_SB = local_part(types_SB, self.tp_group, 0) if self.cut else types_SB.contiguous()
        hidden = words + embedding_lookup(types_SB, self.tokentype_embeddings, dtype=self.residual_dtype)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(tokens_BS.shape, None)
        hidden = ops.cast(self.layernorm(hidden), self.residual_dtype)
        rate = self.dropout_rate if self.streams.training else 0.0
        return ops.dropout(hidden, rate, self.streams.seeds("embedding.dropout", self.cut)) if rate else hidden


class BertLMHead(nn.Cell):
    """norm(activation(dense(hidden))), which the output layer turns into logits of words."""

    def __init__(self, stage: ModelStage) -> None:
        super().__init__(auto_prefix=True)
        self.hidden_act = stage.config.hidden_act
        self.dense = _replicated(stage, stage.config.hidden_size, "lm_head.dense", is_cut=stage.sequence_parallel)
        self.layernorm = make_norm(stage.config, "lm_head.layernorm", partial_gradient=stage.sequence_parallel)

    def construct(self, hidden: Tensor) -> Tensor:
        """Return the words' features in hidden's shape."""
        return self.layernorm(ops.activation(self.dense(hidden)[0], None, self.hidden_act))


class BertModel(GPTModel):
    """An encoder, or the part of one that a pipeline stage holds; see `GPTModel`."""

    embedding_class = BertEmbedding

    def __init__(self, stage: ModelStage, *, parallel_output: bool = True) -> None:
        config = stage.config
        if not config.bert.is_encoder:
            raise ConfigError("bert_head=none: an encoder has a head; write --bert-head pretraining (pretrain_bert.sh)")
        super().__init__(replace(stage, make_core_attention=BidirectionalAttention), parallel_output=parallel_output)
        self.num_parts = stage.tp_group.size if stage.sequence_parallel else 1
        self.lm_head: BertLMHead | None = None
        self.pooler: nn.Cell | None = None
        self.binary_head: nn.Cell | None = None
        self.qa_outputs: nn.Cell | None = None
        if not stage.post_process:
            return
        if config.bert.predicts_words:
            self.lm_head = BertLMHead(stage)
        if config.bert.has_pooler:
            self.pooler = _replicated(stage, config.hidden_size, "pooler.dense")
        if config.bert.bert_head == "pretraining":
            self.binary_head = _replicated(stage, 2, "binary_head")
        if config.bert.bert_head == "question_answering":
            self.qa_outputs = _replicated(stage, 2, "qa_outputs")

    def make_decoder(self, stage: ModelStage) -> nn.Cell:
        """Return the layers; each ends in its norm."""
        return BertBlock(stage, post_layer_norm=False)

    def construct(  # type: ignore[override]
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        tokentype_ids: Tensor | None = None,
        lm_labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Run this stage.

        Args:
            tokens: int32 [B, S]; used on the first stage.
            attention_mask: int32 [B, S], 0 where there is padding; None: no padding. Used on every stage.
            tokentype_ids: int32 [B, S], the segment of each token; None: the first. Used on the first stage.
            lm_labels: int32 [B, S], the words behind masks; used on the last stage of a model that predicts words.

        Returns:
            Hidden states [S, B, H] ([S / tp, B, H] with sequence parallelism) before the last stage. On it, by
            `bert_head`: `question_answering` float32 logits [B, S, 2] of begin and end; `masked_lm` and `pretraining` a
            pair of the loss of every position, float32 [B, S] (without labels the logits [B, S, V / tp]), and the
            float32 [B, 2] logits of the second segment's following the first, or None; `encoder` a pair of hidden
            states [B, S, H] and the pooled first one [B, H].

        Raises:
            ConfigError: if a mask or labels are not [B, S].
        """
        for name, given in (("attention_mask", attention_mask), ("lm_labels", lm_labels)):
            if given is not None and given.ndim != 2:
                raise ConfigError(f"{name} of shape {given.shape}: give int32 [B, S]")
        hidden = self.decoder(self._stage_input(tokens, tokentype_ids), attention_mask)
        if not self.post_process:
            return hidden
        hidden = ops.cast(hidden, self.compute_dtype)
        if self.lm_head is None:
            whole = self._whole(hidden)
            if self.qa_outputs is not None:
                return ops.cast(self.qa_outputs(whole)[0], ms.float32).transpose(1, 0, 2)
            return whole.transpose(1, 0, 2), self._pooled(whole)
        follows = None
        if self.binary_head is not None:
            follows = ops.cast(self.binary_head(self._pooled(self._whole(hidden)))[0], ms.float32)
        logits = self.logits_of(self.lm_head(hidden))
        if lm_labels is None:
            if not self.parallel_output:
                logits = gather_from_tensor_model_parallel_region(logits, self.tp_group)
            return logits.transpose(1, 0, 2), follows
        return self.loss_of(logits, lm_labels), follows

    def _whole(self, hidden: Tensor) -> Tensor:
        """Return the whole sequence; what follows is computed alike on every rank."""
        if self.num_parts == 1:
            return hidden
        return gather_from_sequence_parallel_region(hidden, self.tp_group, tensor_parallel_output_grad=False)

    def _pooled(self, hidden_SBH: Tensor) -> Tensor:
        """Return tanh(dense(first position)), [B, H]."""
        if self.pooler is None:
            raise ConfigError(f"bert_head={self.config.bert.bert_head}: has no pooler")
        # MindSpore's tanh is off by up to 1e-4 on CPU.
        return 2 * mint.sigmoid(2 * self.pooler(hidden_SBH[0].contiguous())[0]) - 1


def _replicated(stage: ModelStage, size: int, name: str, *, is_cut: bool = False) -> ColumnParallelLinear:
    """Return a linear layer of the hidden width that every rank has whole.

    Args:
        stage: sizes and types.
        size: features of its output.
        name: global name.
        is_cut: its input is a part of the sequence, and so are its gradients.
    """
    config: TransformerConfig = stage.config
    layer = ColumnParallelLinear(
        config.hidden_size,
        size,
        tp_group=SoloGroup(),
        init_method=stage.init(f"{name}.weight"),
        params_dtype=config.params_dtype,
        name=name,
    )
    for parameter in layer.get_parameters():
        mark(parameter, partial_gradient=is_cut)
    return layer
