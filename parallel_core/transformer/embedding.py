"""Word plus position embedding, on the first pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import TensorShard, shard_of
from parallel_core.tensor_parallel.checks import check_ids
from parallel_core.tensor_parallel.embedding import VocabParallelEmbedding, embedding_lookup
from parallel_core.tensor_parallel.mappings import local_part
from parallel_core.tensor_parallel.parameter import make_parameter
from parallel_core.transformer.stage import ModelStage


class LanguageModelEmbedding(nn.Cell):
    """dropout(multiplier * word(tokens) + position(positions)), as [S, B, H].

    With sequence parallelism every rank returns its part of the sequence, and looks up only that part's positions, so
    the gradient of the position table is partial.
    """

    def __init__(self, stage: ModelStage) -> None:
        super().__init__(auto_prefix=True)
        config, name = stage.config, "embedding"
        self.tp_group, self.residual_dtype, self.streams = stage.tp_group, stage.residual_dtype, stage.streams
        self.dropout_rate, self.multiplier = config.hidden_dropout_rate, config.embedding_multiplier
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            tp_group=stage.tp_group,
            init_method=stage.embedding_init(f"{name}.word_embeddings.weight"),
            reduce_scatter_embeddings=stage.sequence_parallel,
            params_dtype=config.embedding_init_dtype,
            dtype=self.residual_dtype,
            name=f"{name}.word_embeddings",
        )
        self.position_embeddings: LearnedPositions | None = None
        if config.position_embedding_type == "learned_absolute":
            self.position_embeddings = LearnedPositions(stage, f"{name}.position_embeddings")
        self.cut = stage.sequence_parallel and stage.tp_group.size > 1

    def construct(self, tokens_BS: Tensor, position_ids_BS: Tensor | None) -> Tensor:
        """Return the embeddings, [S, B, H] or [S / tp, B, H], in the residual stream's dtype.

        Args:
            tokens_BS: int32 token ids.
            position_ids_BS: int32 positions; None: those that this rank holds of a sequence, 0..S-1 of a whole one.
        """
        hidden = self.word_embeddings(ops.transposed(tokens_BS))
        if self.multiplier != 1.0:
            hidden = ops.multiplied(hidden, self.multiplier)
        if self.position_embeddings is not None:
            positions = self.position_embeddings(tokens_BS.shape, position_ids_BS)
            hidden = ops.bias_dropout_add(hidden, None, positions, 0.0, (0, 0))
        rate = self.dropout_rate if self.streams.training else 0.0
        if rate:
            hidden = ops.dropout(hidden, rate, self.streams.seeds("embedding.dropout", self.cut))
        return hidden


class LearnedPositions(nn.Cell):
    """A learned row for every position, [max_position_embeddings, H]; each rank looks up its part of the sequence.

    Args:
        stage: configuration, group.
        name: global name of this module.
    """

    def __init__(self, stage: ModelStage, name: str) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        self.tp_group, self._positions, self._dtype = stage.tp_group, stage.positions, stage.residual_dtype
        self.cut = stage.sequence_parallel and stage.tp_group.size > 1
        shard = TensorShard.cut(
            f"{name}.weight",
            (config.max_position_embeddings, config.hidden_size),
            partial_gradient=stage.sequence_parallel,
        )
        self.weight = make_parameter(shard, stage.embedding_init(shard.name), config.embedding_init_dtype)
        self._plain_ids_SB: Tensor | None = None

    def construct(self, shape: Sequence[int], position_ids_BS: Tensor | None) -> Tensor:
        """Return the rows, [S, B, H] or [S / tp, B, H] with sequence parallelism, in the residual stream's dtype.

        Args:
            shape: (B, S) of this context parallel rank.
            position_ids_BS: int32; None: those that this rank holds of a sequence, 0..S-1 of a whole one.

        Raises:
            ConfigError: the sequence is longer than the table.
        """
        table: Parameter = self.weight
        samples, length = shape
        if length > table.shape[0]:
            raise ConfigError(
                f"a sequence of {length} tokens needs max_position_embeddings >= {length}, not {table.shape[0]}"
            )
        if position_ids_BS is not None:
            check_ids(position_ids_BS, table.shape[0], shard_of(table).name)
            ids = position_ids_BS.transpose(1, 0)
            return embedding_lookup(local_part(ids, self.tp_group, 0) if self.cut else ids, table, dtype=self._dtype)
        count = length // self.tp_group.size if self.cut else length
        if self._plain_ids_SB is None or self._plain_ids_SB.shape != (count, samples):
            first = self.tp_group.rank * count if self.cut else 0
            held = self._positions(length)
            ids_S = (np.arange(length) if held is None else held)[first : first + count].astype(np.int32)
            self._plain_ids_SB = Tensor(np.repeat(ids_S[:, None], samples, axis=1))
        return embedding_lookup(self._plain_ids_SB, table, dtype=self._dtype)
