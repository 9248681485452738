"""What follows from other values, one function each: used by the schema, the rules, the plan, the run and the readers.

The formulas are Megatron-LM's. Nothing here knows where a value came from, and nothing imports MindSpore.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from parallel_core.errors import ConfigError

ROTARY = ("rope", "yarn")
"""Kinds of positions that turn queries and keys."""


def feed_forward_width(hidden_size: int, gated: bool) -> int:
    """Return the MLP's width: 4h; for a gated MLP two thirds of it, rounded down to a multiple of 64 (at least 64)."""
    return (int(4 * hidden_size * 2 / 3) // 64 * 64 or 64) if gated else 4 * hidden_size


def head_size(hidden_size: int, num_attention_heads: int) -> int:
    """Return the size of one attention head: an equal part of the width, rounded down; 0 heads count as one."""
    return hidden_size // max(num_attention_heads, 1)


def key_value_heads(num_attention_heads: int, num_query_groups: int, grouped: bool) -> int:
    """Return the number of key/value heads: one for each query head, or one for each group of them."""
    return (num_query_groups or 1) if grouped else num_attention_heads


def default_activation(add_bias_linear: bool, bias_gelu_fusion: bool = True) -> str:
    """Return the activation nobody named: GELU, in the tanh form where Megatron fuses it with the bias."""
    return "gelu_tanh" if bias_gelu_fusion and add_bias_linear else "gelu"


def rotary_fusion_applies(position_embedding_type: str, rotary_interleaved: bool) -> bool:
    """Whether there is anything for the fused rotary kernel to compute: rope over the two halves of a head."""
    return position_embedding_type in ROTARY and not rotary_interleaved


def yarn_concentration(factor: float, weight: float) -> float:
    """Return 0.1 weight ln(factor) + 1, and 1 for factors up to 1: what YaRN makes of a longer context."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def padded_vocab_size(size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Return `size` rounded up to a multiple of `divisible_by` x `tensor_parallel`."""
    multiple = divisible_by * tensor_parallel
    return -(-size // multiple) * multiple


def weight_decay_range(weight_decay: float, start: float | None, end: float | None) -> tuple[float, float]:
    """Return the first and the last weight decay: as given, and where one is not, the constant `weight_decay`."""
    return weight_decay if start is None else start, weight_decay if end is None else end


def layers_below_query(num_layers: int) -> tuple[int, ...]:
    """Return 1 for every layer but the last, the query layer, which has an MLP where the others have experts."""
    return (1,) * (num_layers - 1) + (0,)


def decay_length(decay: int | None, run: int | None) -> int:
    """Return the length of the learning rate's decay: as given, else the run's; 0 where neither is known."""
    return decay or run or 0


def layers_to_place(num_layers: int, embedding_counts: bool, loss_counts: bool) -> int:
    """Return the layers that stages share out, with the embedding and the loss where they count as one each."""
    return num_layers + embedding_counts + loss_counts


def chunks_per_rank(to_place: int, ranks: int, layers_per_chunk: int) -> int:
    """Return the model chunks on each pipeline rank that holds chunks of `layers_per_chunk` layers.

    Raises:
        ConfigError: the layers are not a whole number of such chunks on every rank.
    """
    if layers_per_chunk < 1 or ranks < 1 or to_place % (ranks * layers_per_chunk):
        raise ConfigError(f"{to_place} layers are not a whole number of chunks of {layers_per_chunk} on each of "
                          f"{ranks} ranks")
    return to_place // ranks // layers_per_chunk


@dataclass(frozen=True)
class BatchSizes:
    """Global batch size as a function of the samples seen.

    Attributes:
        global_batch_size: samples of one iteration over all ranks, after the ramp-up.
        micro_batch_size: samples of one microbatch of one rank.
        data_parallel_size: data parallel ranks.
        rampup: (start, increment, samples): begin with `start` samples, grow by `increment` at equal distances until
            `samples` samples are seen; empty: none.

    Raises:
        ConfigError: the ramp-up does not arrive at the batch size, or one of its sizes is not a whole number of
            microbatches.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    rampup: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rampup:
            self._check_rampup()
        unit = self.micro_batch_size * self.data_parallel_size
        for size in (self.global_batch_size, *self.sizes()[:2]):  # the others differ by as much as the first two
            if size % unit:
                raise ConfigError(
                    f"batch size {size} is not a multiple of micro_batch_size={self.micro_batch_size} x data parallel "
                    f"size {self.data_parallel_size} = {unit}; choose global_batch_size (and rampup_batch_size) so "
                    f"that it is, for example {max(1, round(size / unit)) * unit}"
                )

    def _check_rampup(self) -> None:
        if len(self.rampup) != 3 or min(self.rampup) <= 0:
            raise ConfigError("rampup_batch_size takes three numbers above zero: start, increment, samples")
        start, increment, _ = self.rampup
        if start >= self.global_batch_size or (self.global_batch_size - start) % increment:
            raise ConfigError(
                f"a ramp-up from {start} in steps of {increment} does not arrive at {self.global_batch_size}; choose "
                "an increment that divides the difference"
            )
        if len(self.sizes()) > _MOST_SIZES:
            raise ConfigError(
                f"a ramp-up from {start} to {self.global_batch_size} in steps of {increment} has {len(self.sizes())} "
                f"sizes, more than {_MOST_SIZES}; choose a larger increment"
            )

    def sizes(self) -> range:
        """Return every size that an iteration can have, the smallest first."""
        start, increment, _ = self.rampup or (self.global_batch_size, 1, 0)
        return range(start, self.global_batch_size + 1, increment)

    def current(self, consumed_samples: int) -> int:
        """Return the global batch size of the iteration that follows `consumed_samples` samples."""
        if not self.rampup or consumed_samples > self.rampup[2]:
            return self.global_batch_size
        start, increment, _ = self.rampup
        return min(start + int(consumed_samples / self._distance) * increment, self.global_batch_size)

    @property
    def _distance(self) -> float:
        """Samples between two sizes of the ramp-up."""
        return self.rampup[2] / (len(self.sizes()) - 1)

    def num_microbatches(self, consumed_samples: int) -> int:
        """Return the microbatches of one rank in the iteration that follows `consumed_samples` samples."""
        return self.microbatches_of(self.current(consumed_samples))

    def microbatches_of(self, size: int) -> int:
        """Return the microbatches of one rank in an iteration of `size` samples."""
        return size // (self.micro_batch_size * self.data_parallel_size)

    def iterations_of(self, train_samples: int) -> int:
        """Return the iterations of a run over `train_samples` samples, as Megatron-LM counts them.

        An iteration of the ramp-up counts although it goes beyond `train_samples`; after it, a partial last batch does
        not.
        """
        iterations = consumed = 0
        for size, number in self._ramp_up(train_samples):
            iterations, consumed = iterations + number, consumed + number * size
        return iterations + max(0, train_samples - consumed) // self.global_batch_size

    def samples_of(self, iterations: int) -> int:
        """Return the samples that the first `iterations` iterations take."""
        left, consumed = iterations, 0
        for size, number in self._ramp_up(iterations * self.global_batch_size):
            taken = min(left, number)
            left, consumed = left - taken, consumed + taken * size
        return consumed + left * self.global_batch_size

    def _ramp_up(self, limit: int) -> Iterator[tuple[int, int]]:
        """Yield (size, number of iterations) through the ramp-up, as long as at most `limit` samples are consumed."""
        end, consumed = min(self.rampup[2], limit) if self.rampup else -1, 0
        while consumed <= end:
            size = self.current(consumed)
            # All iterations of this size but the last ones in one step: a ramp-up may be 10^12 samples long.
            growth = int(((size - self.rampup[0]) // self.rampup[1] + 1) * self._distance)
            number = max(1, (min(growth, end) - consumed) // size - 1)
            yield size, number
            consumed += number * size


_MOST_SIZES = 100_000
"""So that checking every size of a ramp-up takes no time."""
