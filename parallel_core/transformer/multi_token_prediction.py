"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2), in Megatron-LM's conventions.

Depth k of K predicts, at each position, the token k further than the next: from the hidden states of depth k - 1 (at
first the decoder's, after its final norm) and the embedding of the k-th next token, by one more transformer layer and
the model's own output layer. Its losses train the model; what the model is asked for does not depend on it.

Shapes: S sequence, B microbatch, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn

from parallel_core import ops
from parallel_core.comm.interface import Group
from parallel_core.errors import ConfigError
from parallel_core.layout.sequence import chunk_ids, sequence_order
from parallel_core.tape import constant
from parallel_core.tensor_parallel import mappings
from parallel_core.tensor_parallel.embedding import embedding_lookup
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.layer import TransformerLayer
from parallel_core.transformer.norm import make_norm
from parallel_core.transformer.stage import ModelStage


class AuxiliaryLoss(NamedTuple):
    """A loss of a microbatch beside the one that the loss function makes.

    Attributes:
        name: what the log calls it.
        total: sum over this rank's tokens that count, float32.
        number: how many these are, float32.
        weight: factor of their mean in the objective.
    """

    name: str
    total: Tensor
    number: Tensor
    weight: float


class LastStage(Protocol):
    """What predictions need of the model's last stage; see `GPTModel`."""

    def word_embeddings(self) -> Parameter | None:
        """Return the stage's table of the word embedding."""

    def logits_of(self, hidden_SBH: Tensor) -> Tensor:
        """Return logits of hidden states."""

    def loss_of(self, logits_SBV: Tensor, labels_BS: Tensor) -> Tensor:
        """Return the loss of every token."""


class MultiTokenPredictionLayer(nn.Cell):
    """One depth: final_norm(layer(eh_proj([enorm(embedding); hnorm(hidden)]))).

    Args:
        stage: the last stage.
        depth: number of the depth, from 0; its layer is built as one that follows the model's last.

    Communication:
        beside the layer's: under tensor parallelism forward 1 all-gather of S*B*H elements and backward 1 all-reduce
        of twice as many; with sequence parallelism forward 1 all-gather of S*B*2H and 1 all-to-all of S*B*H elements,
        backward 1 all-to-all, 1 all-gather and 1 reduce-scatter of as many.
    """

    def __init__(self, stage: ModelStage, depth: int) -> None:
        super().__init__(auto_prefix=True)
        config, name = stage.config, f"mtp.layers.{depth}"
        self.tp_group, self.sequence_parallel = stage.tp_group, stage.sequence_parallel and stage.tp_group.size > 1
        self.streams, self.compute_dtype, self.residual_dtype = stage.streams, stage.compute_dtype, stage.residual_dtype
        self.recomputes = config.recompute_granularity == "full"
        partial = stage.sequence_parallel
        self.enorm = make_norm(config, f"{name}.enorm", partial_gradient=partial)
        self.hnorm = make_norm(config, f"{name}.hnorm", partial_gradient=partial)
        self.eh_proj = ColumnParallelLinear(
            2 * config.hidden_size,
            config.hidden_size,
            tp_group=stage.tp_group,
            init_method=stage.init(f"{name}.eh_proj.weight"),
            bias=False,
            gather_output=not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
            params_dtype=config.params_dtype,
            name=f"{name}.eh_proj",
        )
        self.transformer_layer = TransformerLayer(
            stage, config.num_layers + depth, recompute_core_attention=config.recomputes("core_attn")
        )
        self.final_layernorm = make_norm(config, f"{name}.final_layernorm", partial_gradient=partial)

    def construct(self, hidden: Tensor, embedded: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        """Return the hidden states of this depth.

        Args:
            hidden: of the depth before, [S, B, H], or [S / tp, B, H] with sequence parallelism.
            embedded: of the tokens that follow, likewise.
            document_start_BS: int32, the first position that each position may see; None: 0.
        """
        masks = () if document_start_BS is None else (document_start_BS,)
        if self.recomputes:
            return recompute(self._run, (hidden, embedded, *masks), list(self.trainable_params()), self.streams)
        return self._run(hidden, embedded, *masks)

    def _run(self, hidden: Tensor, embedded: Tensor, *masks: Tensor) -> Tensor:
        both = ops.side_by_side(self.enorm(embedded), self.hnorm(hidden))
        joined, _ = self.eh_proj(ops.cast(both, self.compute_dtype))
        if self.sequence_parallel:  # all positions of some channels become some positions of all channels
            joined = mappings.all_to_all(joined, self.tp_group, 0, 2)
        return self.final_layernorm(self.transformer_layer(ops.cast(joined, self.residual_dtype), *masks))


class MultiTokenPrediction(nn.Cell):
    """All depths of the last stage.

    Args:
        stage: the last stage.
    """

    def __init__(self, stage: ModelStage) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        self.tp_group, self.cp_group = stage.tp_group, stage.context_groups.cp
        self.sequence_parallel, self.residual_dtype = stage.sequence_parallel, stage.residual_dtype
        self.streams, self.dropout_rate = stage.streams, config.hidden_dropout_rate
        self.multiplier = config.embedding_multiplier
        depths = config.mtp.mtp_num_layers
        self.weight = config.mtp.mtp_loss_scaling_factor / depths
        self._losses: list[AuxiliaryLoss] = []
        self.layers = nn.CellList([MultiTokenPredictionLayer(stage, depth) for depth in range(depths)])

    def construct(
        self,
        model: LastStage,
        hidden: Tensor,
        batch: tuple[Tensor, Tensor, Tensor | None],
        document_start: Tensor | None,
    ) -> None:
        """Compute the loss of each depth in training, for `take_losses`.

        Args:
            model: whose last stage this is; its word embeddings and its output layer are used.
            hidden: the decoder's output after its final norm, [S, B, H] ([S / tp, B, H] with sequence parallelism).
            batch: tokens and labels, int32 [B, S], and the loss mask, float32 [B, S]; None: every token counts.
            document_start: see `MultiTokenPredictionLayer`.

        Communication: under context parallelism 1 all-gather of tokens, labels and mask for each depth, and that of
        the layers and of the word embedding.
        """
        self._losses = []
        if not self.streams.training:
            return
        tokens, labels, mask = batch
        mask = Tensor(np.ones(labels.shape, np.float32)) if mask is None else mask
        for depth, layer in enumerate(self.layers):
            tokens, labels, mask = (constant(self._rolled(x)) for x in (tokens, labels, mask))
            hidden = layer(hidden, self._embedded(tokens, model.word_embeddings(), depth), document_start)
            total, number = ops.masked_sum(model.loss_of(model.logits_of(hidden), labels), mask)
            self._losses.append(AuxiliaryLoss(f"mtp_{depth + 1} loss", total, number, self.weight))

    def take_losses(self) -> list[AuxiliaryLoss]:
        """Return the losses of the last call, and forget them."""
        losses, self._losses = self._losses, []
        return losses

    def _rolled(self, x_BS: Tensor) -> Tensor:
        """Return what stands one position further, 0 behind the last."""
        whole = _whole(x_BS, self.cp_group)
        moved = mint.cat((whole[:, 1:], mint.zeros((whole.shape[0], 1), dtype=whole.dtype)), 1)
        return _part(moved, self.cp_group)

    def _embedded(self, tokens_BS: Tensor, table: Parameter | None, depth: int) -> Tensor:
        """Return the word embeddings as the first stage has them, with dropout of their own."""
        if table is None:
            raise ConfigError("multi-token prediction is on the last stage, with a copy of the word embeddings")
        first_row = self.tp_group.rank * table.shape[0]
        rows = embedding_lookup(tokens_BS.transpose(1, 0), table, first_row, self.residual_dtype)
        if self.sequence_parallel:
            hidden = mappings.reduce_scatter_to_sequence_parallel_region(rows, self.tp_group)
        else:
            hidden = mappings.reduce_from_tensor_model_parallel_region(rows, self.tp_group)
        if self.multiplier != 1.0:
            hidden = ops.multiplied(hidden, self.multiplier)
        cut = self.sequence_parallel and self.tp_group.size > 1
        rate = self.dropout_rate if self.streams.training else 0.0
        return ops.dropout(hidden, rate, self.streams.seeds(f"mtp.layers.{depth}.embedding.dropout", cut) if rate
                           else (0, 0))  # fmt: skip


def _whole(x_BS: Tensor, group: Group) -> Tensor:
    """Return whole sequences of this rank's part of them, [B, S * cp]; no gradient."""
    if group.size == 1:
        return x_BS
    parts = group.all_gather(ms.ops.stop_gradient(x_BS), 1)
    order = sequence_order(group.size)
    length = parts.shape[1] // len(order)
    return mint.cat([parts[:, i * length : (i + 1) * length] for i in order], 1)


def _part(whole_BS: Tensor, group: Group) -> Tensor:
    """Return this rank's part of whole sequences."""
    if group.size == 1:
        return whole_BS
    length = whole_BS.shape[1] // (2 * group.size)
    return mint.cat([whole_BS[:, i * length : (i + 1) * length] for i in chunk_ids(group.size, group.rank)], 1)
