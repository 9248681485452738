"""Groups over HCCL, whose calls are looked at: names, what a send keeps, gathers, and that MindSpore has the calls."""

from __future__ import annotations

import gc
import inspect
import weakref
from unittest import mock

import mindspore as ms
import mindspore.mint.distributed as dist
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.comm import mindspore_comm
from parallel_core.comm.factory import group_name
from parallel_core.comm.mindspore_comm import HcclGroup
from parallel_core.comm.watchdog import Watchdog

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
SIZE = 2


@pytest.fixture
def calls():
    """What is asked of `mint.distributed`, by name; each call has to fit MindSpore's signature."""
    found: list[str] = []

    def double(name: str):
        signature = inspect.signature(getattr(dist, name))

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs).arguments
            assert bound["group"] == "dp-0-1"
            found.append(name)
            if name == "all_gather_into_tensor":
                array = bound["input_tensor"].asnumpy()
                assert bound["output_tensor"].shape == (SIZE * array.shape[0], *array.shape[1:])
                bound["output_tensor"].copy_(Tensor(np.concatenate([array, array + 10])))
            return mock.Mock() if name in ("isend", "irecv") or bound.get("async_op") else None

        return call

    used = ("all_gather_into_tensor", "all_gather", "isend", "irecv", "reduce_scatter_tensor", "all_reduce",
            "all_to_all", "all_to_all_single", "broadcast", "barrier")  # fmt: skip
    with mock.patch.multiple(dist, **{name: double(name) for name in used}), \
            mock.patch.object(mindspore_comm.communication, "create_group"):
        yield found


def group() -> HcclGroup:
    return HcclGroup("dp-0-1", [0, 1], 0, Watchdog(60.0))


def test_names_of_large_groups_are_short_and_their_own():
    ranks = list(range(2048))
    names = {group_name(label, r) for label in ("dp", "model") for r in (ranks, ranks[1:], ranks[::-1], [5, 6])}
    assert len(names) == 8 and all(len(name.encode()) < 128 for name in names)
    assert group_name("tp", [8, 9]) == "tp-8-9"
    every_eighth = [list(range(r, 2048, 8)) for r in range(8)]
    assert len({group_name("dp_cp", r) for r in every_eighth}) == 8


def test_a_send_keeps_a_handle_and_no_tensor(calls):
    tensor = Tensor(np.ones((4, 4), np.float32))
    watched = weakref.ref(tensor)
    handle = group().send(tensor, 1)
    del tensor
    gc.collect()
    assert watched() is None and handle.wait() is None
    received = group().receive((4, 4), ms.float32, 1).wait()
    assert received.shape == (4, 4) and received.dtype == ms.float32
    assert calls == ["isend", "irecv"]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_gather_is_one_collective_whatever_the_dim(calls, dim):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    got = group().all_gather(Tensor(x), dim)
    assert np.array_equal(got.asnumpy(), np.concatenate([x, x + 10], dim)) and calls == ["all_gather_into_tensor"]


def test_every_collective_is_called_as_mindspore_has_it(calls):
    hccl, x = group(), Tensor(np.ones((4, 2), np.float32))
    counts = np.array([[1, 3], [2, 2]], np.int64)
    assert hccl.reduce_scatter(x, 0).shape == (2, 2) and hccl.reduce_scatter(x, 1).shape == (4, 1)
    assert hccl.all_to_all(x, 0, 1).shape == (2, 4) and hccl.all_to_all_rows(x, counts).shape == (3, 2)
    hccl.broadcast_(x)
    hccl.barrier()
    for start in (hccl.all_reduce_start_, hccl.reduce_scatter_start, hccl.all_gather_start):
        start(Tensor(np.ones(4, np.float32))).wait()
    assert len(calls) == 9
