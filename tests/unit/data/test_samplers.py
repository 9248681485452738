from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.data import MegatronPretrainingRandomSampler, MegatronPretrainingSampler
from parallel_core.data.samplers import torch_randperm
from parallel_core.errors import ConfigError, DataError


def batches_of_all(total, consumed, mbs, dp, **options):
    return [list(MegatronPretrainingSampler(total, consumed, mbs, rank, dp, **options)) for rank in range(dp)]


@given(st.integers(1, 200), st.integers(0, 199), st.integers(1, 5), st.integers(1, 6))
def test_ranks_are_disjoint_and_complete_at_any_size(total, consumed, mbs, dp):
    if consumed >= total:
        return
    ranks = batches_of_all(total, consumed, mbs, dp)
    assert len({len(batches) for batches in ranks}) == 1
    seen = sorted(itertools.chain(*itertools.chain(*ranks)))
    whole = (total - consumed) // (mbs * dp) * mbs * dp
    assert seen == list(range(consumed, consumed + whole))
    everything = batches_of_all(total, consumed, mbs, dp, drop_last=False)
    assert sorted(itertools.chain(*itertools.chain(*everything))) == list(range(consumed, total))
    assert len({len(batches) for batches in everything}) == 1


@given(st.integers(1, 8), st.integers(1, 4), st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=4))
def test_stopping_and_resuming_at_other_sizes_repeats_and_loses_nothing(mbs, first_dp, resumes):
    total, consumed, seen = 400, 0, []
    for dp, steps in [(first_dp, 3), *resumes]:
        ranks = [iter(MegatronPretrainingSampler(total, consumed, mbs, rank, dp)) for rank in range(dp)]
        for _ in range(steps):
            if consumed + mbs * dp > total:
                break
            seen += itertools.chain(*[next(rank) for rank in ranks])
            consumed += mbs * dp
        if consumed == total:
            break
    assert seen == list(range(consumed))


def test_microbatches_of_a_ramped_up_batch_size_follow_one_another():
    # global batch 4, then 8, at dp 2 and mbs 1: 2 then 4 micro-batches an iteration
    ranks = [iter(MegatronPretrainingSampler(100, 0, 1, rank, 2)) for rank in range(2)]
    first = [[next(rank) for rank in ranks] for _ in range(2)]
    second = [[next(rank) for rank in ranks] for _ in range(4)]
    assert first == [[[0], [1]], [[2], [3]]] and second == [[[4], [5]], [[6], [7]], [[8], [9]], [[10], [11]]]


def test_randperm_is_torchs():
    # torch.manual_seed(0); torch.randperm(10)
    assert torch_randperm(10, 0).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 500), st.integers(0, 2**32 - 1))
def test_randperm_equals_swap_after_swap(n, seed):
    values = list(range(n))
    draws = np.frombuffer(np.random.RandomState(seed).bytes(4 * max(n - 1, 0)), "<u4")
    for i in range(n - 1):
        j = i + int(draws[i]) % (n - i)
        values[i], values[j] = values[j], values[i]
    assert torch_randperm(n, seed).tolist() == values


def test_randperm_refuses_sizes_it_cannot_reproduce():
    with pytest.raises(DataError, match="dataloader-type single"):
        torch_randperm(2**32 // 20, 0)


@pytest.mark.parametrize("sharding", [True, False])
@pytest.mark.parametrize(("total", "mbs", "dp"), [(53, 2, 3), (48, 4, 2), (10, 1, 1)])
def test_cyclic_epochs_visit_every_active_sample_once(total, mbs, dp, sharding):
    active = total // (mbs * dp) * mbs * dp
    ranks = [iter(MegatronPretrainingRandomSampler(total, 0, mbs, rank, dp, sharding)) for rank in range(dp)]
    steps = active // (mbs * dp)
    epochs = []
    for _ in range(2):
        seen = sorted(itertools.chain(*[next(rank) for rank in ranks for _ in range(steps)]))
        assert len(seen) == len(set(seen)) == active
        epochs.append(seen)
    if sharding or total == active:
        assert epochs == [list(range(active))] * 2


@pytest.mark.parametrize("sharding", [True, False])
def test_cyclic_resume_continues_the_same_order(sharding):
    total, mbs, dp = 48, 2, 2
    whole = list(itertools.islice(MegatronPretrainingRandomSampler(total, 0, mbs, 1, dp, sharding), 40))
    for step in (0, 3, 12, 13, 25):
        resumed = MegatronPretrainingRandomSampler(total, step * mbs * dp, mbs, 1, dp, sharding)
        assert list(itertools.islice(resumed, 40 - step)) == whole[step:]


def test_cyclic_epochs_differ_and_sharded_ranks_own_their_bucket():
    sampler = MegatronPretrainingRandomSampler(40, 0, 2, 1, 2)
    batches = list(itertools.islice(sampler, 20))
    first, second = sum(batches[:10], []), sum(batches[10:], [])
    assert first != second and sorted(first) == sorted(second) == list(range(20, 40))
    assert first == (torch_randperm(20, 0) + 20).tolist() and second == (torch_randperm(20, 1) + 20).tolist()


def test_wrong_arguments_are_named():
    with pytest.raises(DataError, match="no samples are left: 10 of 10"):
        MegatronPretrainingSampler(10, 10, 1, 0, 1)
    with pytest.raises(DataError, match="no samples to draw from"):
        MegatronPretrainingSampler(0, 0, 1, 0, 1)
    with pytest.raises(ConfigError, match="data_parallel_rank=2"):
        MegatronPretrainingSampler(10, 0, 1, 2, 2)
    with pytest.raises(ConfigError, match="micro_batch_size=0"):
        MegatronPretrainingSampler(10, 0, 0, 0, 1)
    with pytest.raises(ConfigError, match="consumed_samples=-1"):
        MegatronPretrainingRandomSampler(10, -1, 1, 0, 1)
    with pytest.raises(DataError, match="fewer than micro_batch_size=4"):
        MegatronPretrainingRandomSampler(7, 0, 4, 0, 2)
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size x data_parallel_size = 4"):
        MegatronPretrainingRandomSampler(40, 6, 2, 0, 2)
