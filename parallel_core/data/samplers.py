"""Which samples each data parallel rank gets, and in which order: Megatron's batch samplers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parallel_core.errors import ConfigError, DataError

# from here on torch draws 64-bit numbers, whose order is not reproduced
_MAX_PERMUTATION = 2**32 // 20


class _Sampler:
    """Arguments common to both samplers, checked."""

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if total_samples <= 0:
            raise DataError(f"there are no samples to draw from (total_samples={total_samples}).")
        if consumed_samples < 0:
            raise ConfigError(f"consumed_samples={consumed_samples} must be 0 or more.")
        if micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size={micro_batch_size} must be 1 or more.")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigError(
                f"data_parallel_rank={data_parallel_rank} must be in [0, data_parallel_size={data_parallel_size})."
            )
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size


class MegatronPretrainingSampler(_Sampler):
    """Yields this rank's micro-batches in dataset order from `consumed_samples` on, once or again and again.

    Micro-batch m of rank r holds samples `consumed + m * mbs * dp + r * mbs ...`; together the ranks see every sample
    once, whatever `data_parallel_size` is.

    Args:
        total_samples: Samples of the dataset.
        consumed_samples: Samples all ranks have seen before.
        micro_batch_size: Samples per micro-batch of one rank.
        data_parallel_rank: This rank.
        data_parallel_size: Number of ranks that share the samples.
        drop_last: Leave out a last group that does not fill all ranks; otherwise ranks get what there is, which may be
            fewer samples or none.
        wraps: After the last whole group start again with the first sample; `consumed_samples` then counts over all
            rounds, and an incomplete last group is left out.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool = True,
        wraps: bool = False,
    ) -> None:
        super().__init__(total_samples, consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        group = self.micro_batch_times_data_parallel_size
        self.wraps = wraps
        if wraps:
            if total_samples < group:
                raise DataError(
                    f"{total_samples} samples are fewer than micro_batch_size={micro_batch_size} x "
                    f"data_parallel_size={data_parallel_size} = {group}. Use more data or smaller batches."
                )
            self.consumed_samples %= total_samples // group * group
        elif consumed_samples >= total_samples:
            raise DataError(
                f"no samples are left: {consumed_samples} of {total_samples} are consumed. Train with more data or "
                "fewer iterations."
            )
        self.drop_last = drop_last

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        group = self.micro_batch_times_data_parallel_size
        offset = self.data_parallel_rank * self.micro_batch_size
        full_end = self.consumed_samples + (self.total_samples - self.consumed_samples) // group * group
        for start in range(self.consumed_samples + offset, full_end, group):
            yield list(range(start, start + self.micro_batch_size))
        while self.wraps:
            for start in range(offset, self.total_samples // group * group, group):
                yield list(range(start, start + self.micro_batch_size))
        if full_end < self.total_samples and not self.drop_last:
            start = full_end + offset
            yield list(range(start, min(start + self.micro_batch_size, self.total_samples)))


class MegatronPretrainingRandomSampler(_Sampler):
    """Yields this rank's micro-batches in a random order, epoch after epoch without end.

    The order of epoch e is the permutation torch draws with seed e. With `data_sharding` every rank permutes its own
    share of the dataset, so the order depends on the micro-batch size and on the number of ranks; without, ranks take
    turns in one permutation.

    Args:
        total_samples: Samples of the dataset.
        consumed_samples: Samples all ranks have seen before, over all epochs.
        micro_batch_size: Samples per micro-batch of one rank.
        data_parallel_rank: This rank.
        data_parallel_size: Number of ranks that share the samples.
        data_sharding: Give each rank a fixed share of the samples.

    Raises:
        DataError: An epoch has fewer samples than one micro-batch of every rank.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        data_sharding: bool = True,
    ) -> None:
        super().__init__(total_samples, consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
        self.data_sharding = data_sharding
        group = self.micro_batch_times_data_parallel_size
        self.active_total_samples = total_samples - total_samples % group
        if self.active_total_samples == 0:
            raise DataError(
                f"{total_samples} samples are fewer than micro_batch_size={micro_batch_size} x "
                f"data_parallel_size={data_parallel_size} = {group}. Use more data or smaller batches."
            )
        if consumed_samples % self.active_total_samples % group:
            raise ConfigError(
                f"consumed_samples={consumed_samples} is {consumed_samples % self.active_total_samples} into an epoch "
                f"of {self.active_total_samples}, not a multiple of micro_batch_size x data_parallel_size = {group}. "
                "Resume the cyclic sampler with a product that divides it, or use --dataloader-type single."
            )

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        consumed = self.consumed_samples
        while True:
            epoch, in_epoch = divmod(consumed, self.active_total_samples)
            indices = self._epoch(epoch, in_epoch)
            # Megatron's ranks disagree about the end of an unsharded epoch that they do not divide evenly; here all end
            # it together, after the samples that count as consumed
            num_batches = (self.active_total_samples - in_epoch) // self.micro_batch_times_data_parallel_size
            for row in indices[: num_batches * self.micro_batch_size].reshape(-1, self.micro_batch_size):
                consumed += self.micro_batch_times_data_parallel_size
                yield row.tolist()

    def _epoch(self, epoch: int, in_epoch: int) -> np.ndarray:
        if self.data_sharding:
            bucket = self.total_samples // self.micro_batch_times_data_parallel_size * self.micro_batch_size
            order = torch_randperm(bucket, epoch)[in_epoch // self.data_parallel_size :]
            return order + self.data_parallel_rank * bucket
        whole = self.total_samples // self.micro_batch_size * self.micro_batch_size
        return torch_randperm(whole, epoch)[in_epoch:][self.data_parallel_rank :: self.data_parallel_size]


def torch_randperm(n: int, seed: int) -> np.ndarray:
    """Return `torch.randperm(n)` of a CPU generator seeded with `seed`, computed without torch.

    torch swaps entry i with entry `t_i = i + draw_i % (n - i)` for i = 0, 1, .... What a swap finds at a place was put
    there by the last earlier swap with the same target, or is the place's own number. So both the value found at `i`
    and the one found at `t_i` follow from "the last earlier swap with target x", and the chains that leads to are
    resolved for all i at once by pointer doubling.

    Returns:
        int64 [n].

    Raises:
        DataError: n is 2^32 / 20 or more, where torch draws 64-bit numbers.
    """
    if n >= _MAX_PERMUTATION:
        raise DataError(
            f"a random order of {n} samples: the cyclic sampler shuffles fewer than {_MAX_PERMUTATION} samples per "
            "rank. Use --dataloader-type single, whose order the dataset's own index shuffles."
        )
    if n < 2:
        return np.arange(n, dtype=np.int64)
    draws = np.frombuffer(np.random.RandomState(seed).bytes(4 * (n - 1)), "<u4")
    steps = np.arange(n - 1, dtype=np.int64)
    targets = steps + draws % (n - steps)
    moved = np.flatnonzero(targets != steps)
    # last_swap[x]: the last i with t_i == x and i < x (NumPy keeps the last of repeated assignments)
    last_swap = np.full(n, -1, np.int64)
    last_swap[targets[moved]] = moved
    root = np.where(last_swap >= 0, last_swap, np.arange(n, dtype=np.int64))
    while True:
        further = root[root]
        if np.array_equal(further, root):
            break
        root = further
    # swap i takes what lies at t_i: the root of the previous swap with that target, or t_i itself
    result = np.empty(n, np.int64)
    order = moved[np.argsort(targets[moved], kind="stable")]
    same_target = np.empty(len(order), bool)
    same_target[:1] = False
    same_target[1:] = targets[order[1:]] == targets[order[:-1]]
    result[order] = targets[order]
    repeated = np.flatnonzero(same_target)
    result[order[repeated]] = root[order[repeated - 1]]
    unmoved = np.flatnonzero(targets == steps)
    result[unmoved] = root[unmoved]
    result[n - 1] = root[n - 1]
    return result
