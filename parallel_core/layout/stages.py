"""Which global layers sit on which pipeline rank and chunk. Pure Python; the rules are Megatron-LM's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from parallel_core.errors import ConfigError

MOST_LAYERS = 100_000
"""A model of more layers than this is a slip of the pen, and a layout of so many would fill the memory."""


class LayerSplit(Protocol):
    """How layers are shared out over stages; `config.schema.ModelParallelConfig` is one, with each field's meaning."""

    @property
    def pipeline_model_parallel_size(self) -> int:
        """Pipeline ranks."""

    @property
    def virtual_pipeline_model_parallel_size(self) -> int:
        """Model chunks on each rank."""

    @property
    def num_layer_list(self) -> tuple[tuple[int, ...], ...]:
        """Layers of [pipeline rank][chunk]; empty: by the other fields."""

    @property
    def decoder_first_pipeline_num_layers(self) -> int:
        """Layers of the first rank; 0: its equal share."""

    @property
    def decoder_last_pipeline_num_layers(self) -> int:
        """Layers of the last rank; 0: its equal share."""

    @property
    def account_for_embedding_in_pipeline_split(self) -> bool:
        """The embedding counts as a layer."""

    @property
    def account_for_loss_in_pipeline_split(self) -> bool:
        """The loss counts as a layer."""

    @property
    def standalone_embedding_stage(self) -> bool:
        """The first stage holds the embedding and no layer."""


@dataclass(frozen=True)
class Placement:
    """Which stage of the pipeline each rank's chunks are; every other module asks this one.

    Attributes:
        table: the stage of [rank][chunk]; stages are numbered from 0 in the order in which data passes them.
    """

    table: tuple[tuple[int, ...], ...]

    @classmethod
    def in_turn(cls, num_ranks: int, num_chunks: int = 1) -> Placement:
        """Return Megatron-LM's placement: chunk 0 on ranks 0..P-1, then chunk 1 on ranks 0..P-1, and so on."""
        return cls(tuple(tuple(chunk * num_ranks + rank for chunk in range(num_chunks)) for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks P."""
        return len(self.table)

    @property
    def num_chunks(self) -> int:
        """Model chunks per rank V."""
        return len(self.table[0])

    @property
    def num_stages(self) -> int:
        """Stages P * V."""
        return self.num_ranks * self.num_chunks

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        return {stage: (rank, chunk) for rank, row in enumerate(self.table) for chunk, stage in enumerate(row)}

    def stage(self, rank: int, chunk: int) -> int:
        """Return the stage that `chunk` of `rank` is."""
        return self.table[rank][chunk]

    def place(self, stage: int) -> tuple[int, int]:
        """Return the (rank, chunk) of a stage."""
        return self._places[stage]

    def neighbour(self, rank: int, chunk: int, step: int) -> tuple[int, int] | None:
        """Return the (rank, chunk) that is `step` stages further (1 or -1), or None past the pipeline's ends."""
        return self._places.get(self.table[rank][chunk] + step)

    def is_first(self, rank: int, chunk: int) -> bool:
        """Whether this is the stage with the embedding."""
        return self.table[rank][chunk] == 0

    def is_last(self, rank: int, chunk: int) -> bool:
        """Whether this is the stage with the output layer and the loss."""
        return self.table[rank][chunk] == self.num_stages - 1


@dataclass(frozen=True)
class StageLayout:
    """Layers of every stage; `layers[rank][chunk]` are global layer numbers from 0, in the placement's stage order."""

    layers: tuple[tuple[range, ...], ...]
    placement: Placement

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks P."""
        return self.placement.num_ranks

    @property
    def num_chunks(self) -> int:
        """Model chunks per rank V."""
        return self.placement.num_chunks

    def is_first(self, rank: int, chunk: int) -> bool:
        """Whether this is the stage with the embedding."""
        return self.placement.is_first(rank, chunk)

    def is_last(self, rank: int, chunk: int) -> bool:
        """Whether this is the stage with the output layer and the loss."""
        return self.placement.is_last(rank, chunk)

    def counts(self) -> tuple[tuple[int, ...], ...]:
        """Return the number of layers of [rank][chunk]."""
        return tuple(tuple(len(layers) for layers in row) for row in self.layers)


def stage_layout(num_layers: int, split: LayerSplit) -> StageLayout:
    """Return the layers of every stage.

    Args:
        num_layers: layers of the model, `noop_layers` among them.
        split: the layout's sizes and how layers are shared out: `num_layer_list`, the first and last stage's counts,
            `account_for_*`, `standalone_embedding_stage`, or evenly.

    Raises:
        ConfigError: if the layers cannot be shared out that way.
    """
    ranks, chunks = split.pipeline_model_parallel_size, split.virtual_pipeline_model_parallel_size
    if split.num_layer_list:
        counts = _checked_list(num_layers, split.num_layer_list, ranks, chunks)
    elif split.decoder_first_pipeline_num_layers or split.decoder_last_pipeline_num_layers:
        counts = _uneven_ends(num_layers, ranks, chunks, split)
    elif split.standalone_embedding_stage and ranks > 1:
        counts = _standalone_embedding(num_layers, ranks, chunks)
    else:
        counts = _even(num_layers, ranks, chunks, split)
    placement = Placement.in_turn(ranks, chunks)
    return StageLayout(_number(counts, placement), placement)


def _number(counts: Sequence[Sequence[int]], placement: Placement) -> tuple[tuple[range, ...], ...]:
    """Give layer numbers out in stage order."""
    layers = [[range(0)] * placement.num_chunks for _ in range(placement.num_ranks)]
    start = 0
    for stage in range(placement.num_stages):
        rank, chunk = placement.place(stage)
        layers[rank][chunk] = range(start, start + counts[rank][chunk])
        start += counts[rank][chunk]
    return tuple(tuple(row) for row in layers)


def _even(num_layers: int, ranks: int, chunks: int, split: LayerSplit) -> list[list[int]]:
    embedding, loss = split.account_for_embedding_in_pipeline_split, split.account_for_loss_in_pipeline_split
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


def _uneven_ends(num_layers: int, ranks: int, chunks: int, split: LayerSplit) -> list[list[int]]:
    first, last = split.decoder_first_pipeline_num_layers, split.decoder_last_pipeline_num_layers
    middle_ranks = ranks - bool(first) - bool(last)
    middle = num_layers - first - last
    if middle_ranks <= 0 and middle:
        ends = " and ".join(
            f"decoder_{end}_pipeline_num_layers={count}" for end, count in (("first", first), ("last", last)) if count
        )
        raise ConfigError(
            f"num_layers={num_layers} is not what {ends} hold{'' if first and last else 's'} on "
            f"pipeline_model_parallel_size={ranks}, which has no other stage; give {first + last} layers, other counts "
            "or more stages"
        )
    # Middle stages without layers are what Megatron builds too when the ends take all.
    if middle_ranks < 0 or middle < 0 or (middle % middle_ranks if middle_ranks else middle):
        raise ConfigError(
            f"num_layers={num_layers} less decoder_first_pipeline_num_layers={first} and "
            f"decoder_last_pipeline_num_layers={last} leaves {middle} layers for {max(middle_ranks, 0)} "
            f"stage{'' if middle_ranks == 1 else 's'} between: that is not an equal share each"
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


# ---- Megatron's --pipeline-model-parallel-layout --------------------------------------------------------------------
def parse_layout(text: str, ranks: int) -> tuple[tuple[str, ...], ...]:
    """Return what is on [pipeline rank][chunk] by a layout such as `Et*3|(tt|)*6,L`, as in `Ettt`.

    `E` is the embedding, `t` a decoder layer, `m` a layer of multi-token prediction, `L` the loss; `|` ends a stage,
    `x*n` and `(...)*n` repeat, commas are for the eye. Stages come in the order of `Placement.in_turn`. A `|` at the
    end makes one more stage, without layers, as in Megatron.

    Raises:
        ConfigError: The text is not a layout, or its stages do not fill `ranks`.
    """
    stages = _unrolled(text.replace(",", "").replace(" ", "").strip("'\"")).split("|")
    if len(stages) % ranks:
        hint = "; a | at the end makes a stage of its own" if not stages[-1] else ""
        raise ConfigError(f"has {len(stages)} stages, not a multiple of pipeline_model_parallel_size={ranks}{hint}")
    flat = "".join(stages)
    if flat.count("E") != 1 or not stages[0].startswith("E") or flat.count("L") != 1 or not stages[-1].endswith("L"):
        raise ConfigError("must have E once, at the start of the first stage, and L once, at the end of the last")
    if re.search("m.*t", flat):
        raise ConfigError("has t after m; layers of multi-token prediction come last")
    placement = Placement.in_turn(ranks, len(stages) // ranks)
    return tuple(tuple(stages[stage] for stage in row) for row in placement.table)


def decoder_layers(contents: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """Return the number of decoder layers of [pipeline rank][chunk] of a parsed layout."""
    return tuple(tuple(stage.count("t") for stage in row) for row in contents)


def _unrolled(text: str) -> str:
    """Return the layout with every repetition written out."""
    open_groups: list[list[str]] = [[]]
    position = 0
    while position < len(text):
        symbol = text[position]
        position += 1
        if symbol == "(":
            open_groups.append([])
            continue
        if symbol == ")":
            if len(open_groups) == 1:
                raise ConfigError("has a ) without its (")
            symbol = "".join(open_groups.pop())
        elif symbol not in "EtmL|":
            raise ConfigError(f"has {symbol!r}; it is made of E, t, m, L, |, * and parentheses")
        count = re.compile(r"\*([0-9]+)").match(text, position)
        if count is not None:
            position = count.end()
            times = int(count[1]) if len(count[1]) < 10 else MOST_LAYERS + 1
            if times * max(1, len(symbol)) > MOST_LAYERS:
                raise ConfigError(f"repeats to more than {MOST_LAYERS} layers and stages")
            symbol *= times
        open_groups[-1].append(symbol)
    if len(open_groups) > 1:
        raise ConfigError("has an unclosed parenthesis")
    flat = "".join(open_groups[0])
    if len(flat) > MOST_LAYERS:
        raise ConfigError(f"has more than {MOST_LAYERS} layers and stages")
    return flat
