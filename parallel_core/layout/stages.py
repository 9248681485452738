"""Which global layers sit on which pipeline rank and chunk. Pure Python; the rules are Megatron-LM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel_core.errors import ConfigError

if TYPE_CHECKING:
    from parallel_core.config.schema import ModelParallelConfig


@dataclass(frozen=True)
class StageLayout:
    """Layers of every stage; `layers[rank][chunk]` are global layer numbers from 0.

    Stages run in the order chunk 0 on ranks 0..P-1, then chunk 1 on ranks 0..P-1, and so on: stage = chunk * P + rank.
    """

    layers: tuple[tuple[range, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks P."""
        return len(self.layers)

    @property
    def num_chunks(self) -> int:
        """Model chunks per rank V."""
        return len(self.layers[0])

    def is_first(self, rank: int, chunk: int) -> bool:
        """Whether this is the stage with the embedding."""
        return rank == 0 and chunk == 0

    def is_last(self, rank: int, chunk: int) -> bool:
        """Whether this is the stage with the output layer and the loss."""
        return rank == self.num_ranks - 1 and chunk == self.num_chunks - 1

    def counts(self) -> tuple[tuple[int, ...], ...]:
        """Return the number of layers of [rank][chunk]."""
        return tuple(tuple(len(layers) for layers in row) for row in self.layers)


def stage_layout(num_layers: int, config: ModelParallelConfig) -> StageLayout:
    """Return the layers of every stage.

    Args:
        num_layers: layers of the model, `noop_layers` among them.
        config: the layout's sizes and how layers are shared out: `num_layer_list`, the first and last stage's counts,
            `account_for_*`, `standalone_embedding_stage`, or evenly.

    Raises:
        ConfigError: if the layers cannot be shared out that way.
    """
    ranks, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if config.num_layer_list:
        counts = _checked_list(num_layers, config.num_layer_list, ranks, chunks)
    elif config.decoder_first_pipeline_num_layers or config.decoder_last_pipeline_num_layers:
        counts = _uneven_ends(num_layers, ranks, chunks, config)
    elif config.standalone_embedding_stage and ranks > 1:
        counts = _standalone_embedding(num_layers, ranks, chunks)
    else:
        counts = _even(num_layers, ranks, chunks, config)
    return StageLayout(_number(counts))


def _number(counts: Sequence[Sequence[int]]) -> tuple[tuple[range, ...], ...]:
    """Give layer numbers out in stage order."""
    ranks, chunks = len(counts), len(counts[0])
    layers: list[list[range]] = [[range(0)] * chunks for _ in range(ranks)]
    start = 0
    for chunk in range(chunks):
        for rank in range(ranks):
            layers[rank][chunk] = range(start, start + counts[rank][chunk])
            start += counts[rank][chunk]
    return tuple(tuple(row) for row in layers)


def _even(num_layers: int, ranks: int, chunks: int, config: ModelParallelConfig) -> list[list[int]]:
    embedding, loss = config.account_for_embedding_in_pipeline_split, config.account_for_loss_in_pipeline_split
    total = num_layers + embedding + loss
    if total % (ranks * chunks):
        counted = f" (with the embedding and loss counted as layers: {total})" if total != num_layers else ""
        below = total - total % (ranks * chunks) - embedding - loss
        choices = [n for n in (below, below + ranks * chunks) if n > 0]
        raise ConfigError(
            f"num_layers={num_layers} cannot be split over pipeline_model_parallel_size={ranks} x "
            f"virtual_pipeline_model_parallel_size={chunks} = {ranks * chunks} chunks: {total} is not a multiple of "
            f"{ranks * chunks}{counted}. Use {' or '.join(map(str, choices))} layers, or give num_layer_list."
        )
    counts = [[total // (ranks * chunks)] * chunks for _ in range(ranks)]
    counts[0][0] -= embedding
    counts[-1][-1] -= loss
    return counts


def _standalone_embedding(num_layers: int, ranks: int, chunks: int) -> list[list[int]]:
    others = ranks * chunks - 1
    if num_layers % others:
        raise ConfigError(
            f"num_layers={num_layers} cannot be split over the {others} stages that standalone_embedding_stage leaves: "
            f"use {max(1, num_layers // others) * others} layers, or give num_layer_list"
        )
    counts = [[num_layers // others] * chunks for _ in range(ranks)]
    counts[0][0] = 0
    return counts


def _uneven_ends(num_layers: int, ranks: int, chunks: int, config: ModelParallelConfig) -> list[list[int]]:
    first, last = config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers
    middle_ranks = ranks - bool(first) - bool(last)
    middle = num_layers - first - last
    uneven = middle % middle_ranks if middle_ranks > 0 else middle
    if middle_ranks < 0 or middle < 0 or uneven or (middle_ranks > 0 and middle == 0):
        raise ConfigError(
            f"num_layers={num_layers} less decoder_first_pipeline_num_layers={first} and "
            f"decoder_last_pipeline_num_layers={last} leaves {middle} layers for {middle_ranks} stages: "
            f"that is not an equal positive share each"
        )
    totals = [middle // middle_ranks if middle_ranks else 0] * ranks
    if first:
        totals[0] = first
    if last:
        totals[-1] = last
    for rank, total in enumerate(totals):
        if total % chunks:
            raise ConfigError(
                f"pipeline rank {rank} has {total} layers, which virtual_pipeline_model_parallel_size={chunks} does "
                f"not divide; use a multiple of {chunks}"
            )
    return [[total // chunks] * chunks for total in totals]


def _checked_list(
    num_layers: int, counts: Sequence[Sequence[int]], ranks: int, chunks: int
) -> list[list[int]]:
    if len(counts) != ranks or any(len(row) != chunks for row in counts):
        raise ConfigError(
            f"num_layer_list={[list(row) for row in counts]} must have one row for each of the "
            f"pipeline_model_parallel_size={ranks} ranks, each with virtual_pipeline_model_parallel_size={chunks} "
            f"counts"
        )
    total = sum(map(sum, counts))
    if total != num_layers or min(map(min, counts)) < 0:
        raise ConfigError(
            f"num_layer_list={[list(row) for row in counts]} adds up to {total}, not num_layers={num_layers}"
        )
    return [list(row) for row in counts]
