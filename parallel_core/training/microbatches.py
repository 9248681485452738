"""How many microbatches an iteration has, with a batch size that may ramp up. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_core.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """Global batch size as a function of the samples seen.

    Attributes:
        global_batch_size: samples of one iteration over all ranks, after the ramp-up.
        micro_batch_size: samples of one microbatch of one rank.
        data_parallel_size: data parallel ranks.
        rampup: (start, increment, samples): begin with `start` samples, grow by `increment` at equal distances until
            `samples` samples are seen; empty: none.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    rampup: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        unit = self.micro_batch_size * self.data_parallel_size
        for size in self._sizes():
            if size % unit:
                raise ConfigError(
                    f"batch size {size} is not a multiple of micro_batch_size={self.micro_batch_size} x data parallel "
                    f"size {self.data_parallel_size} = {unit}; choose global_batch_size (and rampup_batch_size) so "
                    f"that it is, for example {max(1, round(size / unit)) * unit}"
                )

    def current(self, consumed_samples: int) -> int:
        """Return the global batch size of the iteration that follows `consumed_samples` samples."""
        if not self.rampup:
            return self.global_batch_size
        start, increment, samples = self.rampup
        if consumed_samples > samples:
            return self.global_batch_size
        steps = (self.global_batch_size - start) // increment
        if steps == 0:
            return self.global_batch_size
        return min(start + int(consumed_samples / (samples / steps)) * increment, self.global_batch_size)

    def num_microbatches(self, consumed_samples: int) -> int:
        """Return the microbatches of one rank in the iteration that follows `consumed_samples` samples."""
        return self.current(consumed_samples) // (self.micro_batch_size * self.data_parallel_size)

    def iterations_of(self, train_samples: int) -> int:
        """Return how many whole iterations `train_samples` samples give."""
        iterations = consumed = 0
        if self.rampup:
            while consumed <= self.rampup[2] and consumed + self.current(consumed) <= train_samples:
                consumed += self.current(consumed)
                iterations += 1
        return iterations + (train_samples - consumed) // self.global_batch_size

    def _sizes(self) -> list[int]:
        if not self.rampup:
            return [self.global_batch_size]
        start, increment, _ = self.rampup
        if increment < 1 or (self.global_batch_size - start) % increment or start > self.global_batch_size:
            raise ConfigError(
                f"rampup_batch_size={' '.join(map(str, self.rampup))}: global_batch_size={self.global_batch_size} is "
                f"not reached from {start} in steps of {increment}; choose an increment that divides the difference"
            )
        return list(range(start, self.global_batch_size + 1, increment))
