"""Micro-batches, made ready in the background."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from parallel_core.data.samplers import MegatronPretrainingRandomSampler, MegatronPretrainingSampler
from parallel_core.errors import ConfigError

Batch = dict[str, np.ndarray]


class SampleSource(Protocol):
    """Anything with samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def collate(samples: Sequence[dict[str, np.ndarray]]) -> Batch:
    """Return a batch of `samples`: each array gets a leading dimension."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


@dataclass
class LoaderStatistics:
    """How long the consumer waited."""

    batches: int = 0
    """Batches handed over."""
    batches_ready: int = 0
    """Of these, finished before they were asked for."""
    wait_s: float = 0.0
    """Seconds the consumer was blocked, in total."""
    first_batch_s: float = 0.0
    """Seconds from the start of the loader to its first batch."""


_GIVE_WAY_S = 0.001
"""How long reading ahead waits where a batch is ready."""


class PretrainingDataLoader:
    """An iterator of collated micro-batches; threads keep the next ones ready.

    Order does not depend on the number of threads. An exception in a thread is raised by the `next` that would have
    returned its batch. Close it (or use `with`) to stop the threads; a loader that is dropped stops them too.

    Args:
        dataset: Samples by number.
        batch_sampler: Lists of sample numbers, one per micro-batch.
        num_workers: Threads; 0 makes each batch when it is asked for.
        prefetch_factor: Batches in preparation per thread.
    """

    def __init__(
        self,
        dataset: SampleSource,
        batch_sampler: Iterable[Sequence[int]],
        num_workers: int = 2,
        prefetch_factor: int = 2,
    ) -> None:
        if num_workers < 0 or prefetch_factor < 1:
            raise ConfigError(
                f"num_workers={num_workers} must be 0 or more and prefetch_factor={prefetch_factor} 1 or more."
            )
        self._dataset = dataset
        self._indices = iter(batch_sampler)
        self._pending: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None
        self._depth = num_workers * prefetch_factor
        self._started = time.perf_counter()
        self._closed = False
        self.statistics = LoaderStatistics()
        self._fill(self._load)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch: arrays with leading dimension micro_batch_size.

        Raises:
            StopIteration: The sampler is exhausted, or the loader is closed.
        """
        if self._closed:
            raise StopIteration
        started = time.perf_counter()
        if self._pool is None:
            batch, ready = self._load(next(self._indices)), False
        else:
            if not self._pending:
                self.close()
                raise StopIteration
            future = self._pending.popleft()
            ready = future.done()
            self._fill(self._load_meanwhile if ready else self._load)
            try:
                batch = future.result()
            except BaseException:
                self.close()
                raise
        now = time.perf_counter()
        statistics = self.statistics
        if statistics.batches == 0:
            statistics.first_batch_s = now - self._started
        statistics.batches += 1
        statistics.batches_ready += ready
        statistics.wait_s += now - started
        return batch

    def close(self) -> None:
        """Stop the threads; batches in preparation are thrown away."""
        self._closed = True
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PretrainingDataLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        pool = getattr(self, "_pool", None)
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self, load: Callable[[Sequence[int]], Batch]) -> None:
        # the sampler runs here, in the consumer's thread, so the order is the sampler's whatever the threads do
        while self._pool is not None and len(self._pending) < self._depth:
            indices = next(self._indices, None)
            if indices is None:
                return
            self._pending.append(self._pool.submit(load, indices))

    def _load_meanwhile(self, indices: Sequence[int]) -> Batch:
        # Python's threads take turns: what starts at once holds up the consumer on its way to a kernel of milliseconds.
        time.sleep(_GIVE_WAY_S)
        return self._load(indices)

    def _load(self, indices: Sequence[int]) -> Batch:
        if not len(indices):  # a rank that gets nothing of a last, incomplete group
            return {name: array[:0] for name, array in collate([self._dataset[0]]).items()}
        return collate([self._dataset[index] for index in indices])


def build_pretraining_data_loader(
    dataset: Any,
    consumed_samples: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    dataloader_type: str = "single",
    num_workers: int = 2,
    prefetch_factor: int = 2,
    data_sharding: bool = True,
    drop_last: bool = True,
    wraps: bool = False,
) -> PretrainingDataLoader | Any | None:
    """Return an iterator of this rank's micro-batches, starting after `consumed_samples`.

    A ramped-up batch size needs nothing here: an iteration takes as many micro-batches as it has, and
    `consumed_samples` counts samples.

    Args:
        dataset: Samples by number; None gives None. With `dataloader_type="external"` whatever the dataset provider
            made: an iterator of micro-batches, or what can be iterated, which with `wraps` begins again at its end.
        consumed_samples: Samples all ranks have seen before.
        micro_batch_size: Samples per micro-batch of one rank.
        data_parallel_rank: This rank.
        data_parallel_size: Number of data parallel ranks.
        dataloader_type: `single` (dataset order, once), `cyclic` (random, without end) or `external`.
        num_workers: Prefetching threads; 0 for none.
        prefetch_factor: Micro-batches in preparation per thread.
        data_sharding: For `cyclic`: each rank permutes its own share.
        drop_last: For `single`: leave out a last group that does not fill all ranks.
        wraps: Go through the dataset again and again: for `single` whole groups only, for `external` where that can be.

    Raises:
        ConfigError: An argument is out of range.
        DataError: No samples are left.
    """
    if dataset is None:
        return None
    if dataloader_type == "external":
        # An iterator gives itself here and cannot begin again; a list, a data loader or a class with __iter__ can.
        return _again_and_again(dataset) if wraps and iter(dataset) is not dataset else iter(dataset)
    if dataloader_type not in ("single", "cyclic"):
        raise ConfigError(f"dataloader_type={dataloader_type!r}: use 'single', 'cyclic' or 'external'.")
    position = (len(dataset), consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size)
    sampler: Iterable[list[int]]
    if dataloader_type == "single":
        sampler = MegatronPretrainingSampler(*position, drop_last=drop_last, wraps=wraps)
    else:
        sampler = MegatronPretrainingRandomSampler(*position, data_sharding=data_sharding)
    return PretrainingDataLoader(dataset, sampler, num_workers, prefetch_factor)


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    empty = False
    while not empty:
        empty = True
        for batch in batches:
            empty = False
            yield batch
