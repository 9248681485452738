from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from parallel_core.data import build_pretraining_data_loader
from parallel_core.data.loader import PretrainingDataLoader
from parallel_core.errors import ConfigError


class Numbers:
    """Samples that hold their own number; `gates` can hold some of them back."""

    def __init__(self, length, fail_at=None, gates=None):
        self.length, self.fail_at, self.gates, self.loaded = length, fail_at, gates or {}, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.gates:
            assert self.gates[index].wait(30)
        if index == self.fail_at:
            raise ValueError(f"sample {index} is broken")
        self.loaded.append(index)
        return {"tokens": np.full(3, index, np.int32), "loss_mask": np.ones(3, np.float32)}


def first_tokens(loader):
    return [batch["tokens"][:, 0].tolist() for batch in loader]


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_order_does_not_depend_on_the_number_of_threads(num_workers):
    loader = build_pretraining_data_loader(
        Numbers(23), 4, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=2, num_workers=num_workers
    )
    assert first_tokens(loader) == [[6, 7], [10, 11], [14, 15], [18, 19]]


def test_batches_have_a_leading_dimension_and_keep_their_dtypes():
    batch = next(build_pretraining_data_loader(Numbers(8), 0, micro_batch_size=4))
    assert batch["tokens"].shape == (4, 3) and batch["tokens"].dtype == np.int32
    assert batch["loss_mask"].dtype == np.float32


def test_a_slow_sample_does_not_change_the_order():
    gate = threading.Event()
    loader = PretrainingDataLoader(Numbers(6, gates={0: gate}), [[index] for index in range(6)], 2, 2)
    threading.Timer(0.05, gate.set).start()
    assert first_tokens(loader) == [[index] for index in range(6)]


def test_batches_are_made_ready_ahead_and_no_further_than_asked():
    dataset = Numbers(100)
    with PretrainingDataLoader(dataset, [[index] for index in range(100)], num_workers=2, prefetch_factor=3) as loader:
        for future in loader._pending:
            future.result(30)
        assert sorted(dataset.loaded) == list(range(6))
        next(loader)
        for future in loader._pending:
            future.result(30)
        assert sorted(dataset.loaded) == list(range(7))
        assert loader.statistics.batches == loader.statistics.batches_ready == 1


def test_an_error_reaches_the_batch_it_belongs_to_and_stops_the_threads():
    loader = build_pretraining_data_loader(Numbers(10, fail_at=5), 0, micro_batch_size=2)
    assert next(loader)["tokens"][0, 0] == 0 and next(loader)["tokens"][0, 0] == 2
    with pytest.raises(ValueError, match="sample 5 is broken"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    assert not data_threads()


def test_closing_and_dropping_stop_the_threads():
    with build_pretraining_data_loader(Numbers(1000), 0, micro_batch_size=2) as loader:
        next(loader)
        assert data_threads()
    assert not data_threads()
    loader = build_pretraining_data_loader(Numbers(1000), 0, micro_batch_size=2)
    next(loader)
    threads = data_threads()
    del loader
    gc.collect()
    for thread in threads:
        thread.join(30)
    assert not data_threads()


def test_an_incomplete_last_group_may_leave_a_rank_with_nothing():
    loaders = [
        build_pretraining_data_loader(
            Numbers(5), 0, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2, drop_last=False
        )
        for rank in range(2)
    ]
    assert [first_tokens(loader) for loader in loaders] == [[[0, 1], [4]], [[2, 3], []]]


def test_kinds_of_loaders():
    provider = iter([{"tokens": np.zeros((1, 3))}])
    assert build_pretraining_data_loader(provider, 0, micro_batch_size=1, dataloader_type="external") is provider
    assert build_pretraining_data_loader(None, 0, micro_batch_size=1) is None
    cyclic = build_pretraining_data_loader(Numbers(4), 0, micro_batch_size=1, dataloader_type="cyclic")
    assert sorted(next(cyclic)["tokens"][0, 0] for _ in range(4)) == [0, 1, 2, 3]
    cyclic.close()
    with pytest.raises(ConfigError, match="dataloader_type='random'"):
        build_pretraining_data_loader(Numbers(4), 0, micro_batch_size=1, dataloader_type="random")
    with pytest.raises(ConfigError, match="num_workers=-1"):
        build_pretraining_data_loader(Numbers(4), 0, micro_batch_size=1, num_workers=-1)
