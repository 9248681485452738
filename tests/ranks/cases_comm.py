"""Every operation of `Group`, the same tests for MCCL and for shared memory."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core.comm import shm
from parallel_core.comm.factory import carrier_of, group_factory
from parallel_core.comm.interface import Group
from parallel_core.config.schema import ModelParallelConfig
from parallel_core.context import ParallelContext
from parallel_core.errors import CommError, ConfigError
from tests.helpers.cases import CaseContext, case
from tests.ranks.support import gather_values

BACKENDS = [{"backend": "mccl"}, {"backend": "shm"}]
SHM = [{"backend": "shm"}]
SIZES = (2, 3)


@functools.cache
def factory(backend: str, rank: int, world_size: int):
    return group_factory(backend, 60.0, rank, world_size)


@functools.cache
def group(backend: str, rank: int, world_size: int, label: str = "world") -> Group:
    return factory(backend, rank, world_size)(label, list(range(world_size)))


def of(ctx: CaseContext, backend: str) -> Group:
    return group(backend, ctx.rank, ctx.world_size)


def data(rank: int, *shape: int, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(100 + rank)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(-100, 100, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


@case(world_size=SIZES, variants=BACKENDS)
def test_all_reduce(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    for shape in [(1,), (3, 5), (70_001,), (400_000,)]:
        # The largest takes both backends in pieces, whatever the type; it is slow enough to be done for one.
        for dtype in (np.float32, np.int32, np.int64, np.float16) if shape != (400_000,) else (np.float32,):
            parts = [data(r, *shape, dtype=dtype) for r in range(g.size)]
            for op, numpy_op in (("sum", np.add), ("max", np.maximum), ("min", np.minimum)):
                x = Tensor(parts[g.rank])
                want = functools.reduce(numpy_op, parts)
                got = g.all_reduce(x, op).asnumpy()
                # Sums of up to three numbers in any order; 16-bit ones may be rounded once or at every addition.
                tolerance = {np.float32: 1e-6, np.float16: 4e-3}.get(dtype, 0)
                np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * 5, err_msg=f"{shape} {dtype} {op}")
                np.testing.assert_array_equal(x.asnumpy(), parts[g.rank])
                assert g.all_reduce_(x, op) is x
                np.testing.assert_array_equal(x.asnumpy(), got)


@case(world_size=SIZES, variants=BACKENDS)
def test_all_reduce_bfloat16(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    x = Tensor(np.arange(1000, dtype=np.float32) / 8).astype(ms.bfloat16)
    got = g.all_reduce(x).astype(ms.float32).asnumpy()
    np.testing.assert_allclose(got, x.astype(ms.float32).asnumpy() * g.size, rtol=2**-8)


@case(world_size=SIZES, variants=BACKENDS)
def test_all_reduce_gives_every_rank_the_same_bits(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    sums = [g.all_reduce(Tensor(data(g.rank, 100_003))).asnumpy() for _ in range(3)]
    for other in gather_values(g, sums[0]) + sums[1:]:
        np.testing.assert_array_equal(other, sums[0])


@case(world_size=SIZES, variants=BACKENDS)
def test_all_gather_and_reduce_scatter_along_every_dim(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    for shape in [(6, 12, 18), (6, 600, 66)]:
        parts = [data(r, *shape) for r in range(g.size)]
        total = sum(parts)
        for dim in (0, 1, 2, -1):
            got = g.all_gather(Tensor(parts[g.rank]), dim).asnumpy()
            np.testing.assert_array_equal(got, np.concatenate(parts, dim))
            got = g.reduce_scatter(Tensor(parts[g.rank]), dim).asnumpy()
            np.testing.assert_allclose(got, np.split(total, g.size, dim)[g.rank], atol=2e-6)


@case(world_size=SIZES, variants=BACKENDS)
def test_collectives_take_non_contiguous_tensors(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    parts = [data(r, 12, 6) for r in range(g.size)]
    x = Tensor(parts[g.rank]).transpose(1, 0)
    np.testing.assert_array_equal(g.all_gather(x).asnumpy(), np.concatenate([p.T for p in parts]))
    want = np.split(sum(parts).T, g.size)[g.rank]
    np.testing.assert_allclose(g.reduce_scatter(x).asnumpy(), want, atol=2e-6)


@case(world_size=SIZES, variants=BACKENDS)
def test_all_to_all(ctx: CaseContext, backend: str) -> None:
    """The whole tensor is exchanged, not its first row."""
    g = of(ctx, backend)
    for shape in [(6, 12, 4), (12, 6, 30_000)]:
        parts = [data(r, *shape) for r in range(g.size)]
        for split, concat in [(0, 0), (0, 1), (1, 0), (1, 2)]:
            want = np.concatenate([np.split(p, g.size, split)[g.rank] for p in parts], concat)
            np.testing.assert_array_equal(g.all_to_all(Tensor(parts[g.rank]), split, concat).asnumpy(), want)


@case(world_size=SIZES, variants=BACKENDS)
def test_broadcast_barrier_and_objects(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    for src in range(g.size):
        for n in (1, 200_000):
            x = Tensor(data(g.rank, n))
            assert g.broadcast_(x, src) is x
            np.testing.assert_array_equal(x.asnumpy(), data(src, n))
    g.barrier()
    values = [{"rank": r, "text": "x" * (r * 100_000)} for r in range(g.size)]
    assert g.all_gather_object(values[g.rank]) == values
    assert g.broadcast_object(values[g.rank], 1) == values[1]
    assert g.all_gather_object((g.rank, None, "é")) == [[r, None, "é"] for r in range(g.size)]
    with pytest.raises(CommError, match="cannot be sent, it is not JSON"):
        g.all_gather_object(np.ones(3))


@case(world_size=2, variants=BACKENDS)
def test_what_a_member_sends_is_data(ctx: CaseContext, backend: str) -> None:
    """A pickle in place of the JSON text is refused, by name, and not run."""
    g = of(ctx, backend)
    words = pickle.dumps(exit)
    words = np.frombuffer(words.ljust(-(-len(words) // 4) * 4), np.int32).copy()
    if g.rank == 1:
        g.all_gather(Tensor(np.array([words.nbytes], np.int32)))
        g.all_gather(Tensor(words))
    else:
        with pytest.raises(CommError, match="what rank 1 sent in group .* is damaged"):
            g.all_gather_object("x" * (words.nbytes - 2))  # as long, quotes included


@case(world_size=SIZES, variants=BACKENDS)
def test_messages_arrive_in_order(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    after, before = (g.rank + 1) % g.size, (g.rank - 1) % g.size
    shapes = [(3,), (70, 1000), (1,), (1_500_000,), (17, 2)]
    for i, shape in enumerate(shapes):  # everyone sends before anyone receives
        g.send(Tensor(data(10 * g.rank + i, *shape)), after)
    handles = [g.receive(shape, ms.float32, before) for shape in shapes]
    for i in (2, 0, 1, 4, 3):  # waiting in another order must not change what arrives where
        np.testing.assert_array_equal(handles[i].wait().asnumpy(), data(10 * before + i, *shapes[i]))
    assert handles[0].wait() is handles[0].wait()
    g.barrier()


@case(world_size=SIZES, variants=BACKENDS)
def test_sent_tensors_may_be_overwritten(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    buffer = np.full(50_000, g.rank, np.float32)
    g.send(Tensor.from_numpy(buffer), (g.rank + 1) % g.size)
    buffer[:] = -1
    got = g.receive((50_000,), ms.float32, (g.rank - 1) % g.size).wait().asnumpy()
    np.testing.assert_array_equal(got, np.full(50_000, (g.rank - 1) % g.size, np.float32))
    g.barrier()


@case(world_size=SIZES, variants=BACKENDS)
def test_flat_buckets(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    n = 3_000 * g.size
    parts = [data(r, n) for r in range(g.size)]
    shard = g.reduce_scatter_start(Tensor(parts[g.rank])).wait()
    np.testing.assert_allclose(shard.asnumpy(), np.split(sum(parts), g.size)[g.rank], atol=2e-6)
    np.testing.assert_allclose(g.all_gather_start(shard).wait().asnumpy(), sum(parts), atol=2e-6)
    buffer = parts[g.rank].copy()
    g.all_reduce_start_(Tensor.from_numpy(buffer)).wait()
    np.testing.assert_allclose(buffer, sum(parts), atol=2e-6)  # views of flat buffers are reduced in place


@case(world_size=3, variants=BACKENDS)
def test_groups_of_some_ranks(ctx: CaseContext, backend: str) -> None:
    make = factory(backend, ctx.rank, 3)
    of(ctx, backend)
    ranks = [0, 2] if ctx.rank != 1 else [1]
    g = make("ends", ranks)
    assert (g.size, g.ranks) == (len(ranks), tuple(ranks))
    assert g.all_gather_object(ctx.rank) == ranks
    got = g.all_reduce(Tensor(np.full(5, ctx.rank, np.float32))).asnumpy()
    np.testing.assert_array_equal(got, np.full(5, sum(ranks), np.float32))
    if g.size == 2:
        g.send(Tensor(np.full(3, ctx.rank, np.int32)), 1 - g.rank)
        got = g.receive((3,), ms.int32, 1 - g.rank).wait().asnumpy()
        np.testing.assert_array_equal(got, np.full(3, g.ranks[1 - g.rank]))
    g.barrier()  # a sender's memory goes with its group


@case(world_size=2, variants=SHM)
def test_many_messages_to_a_late_receiver(ctx: CaseContext, backend: str) -> None:
    """Both send far more than any fixed buffer before either receives: nothing blocks."""
    g = of(ctx, backend)
    for i in range(300):
        g.send(Tensor(np.full(1 + 97 * i, i, np.float32)), 1 - g.rank)
    big = np.full(8_000_000, g.rank, np.float32)
    g.send(Tensor(big), 1 - g.rank)
    for i in range(300):
        got = g.receive((1 + 97 * i,), ms.float32, 1 - g.rank).wait().asnumpy()
        assert (got == i).all() and got.size == 1 + 97 * i
    assert (g.receive(big.shape, ms.float32, 1 - g.rank).wait().asnumpy() == 1 - g.rank).all()


@case(world_size=2, variants=SHM)
def test_other_dtypes(ctx: CaseContext, backend: str) -> None:
    g = of(ctx, backend)
    for dtype in (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_):
        x = Tensor(np.array([[0, 1], [1, 1]]).astype(dtype))
        assert g.all_gather(x).dtype == x.dtype
        g.send(x, 1 - g.rank)
        np.testing.assert_array_equal(g.receive(x.shape, x.dtype, 1 - g.rank).wait().asnumpy(), x.asnumpy())
    b = Tensor(np.arange(6, dtype=np.float32)).astype(ms.bfloat16)
    g.send(b, 1 - g.rank)
    assert (g.receive((6,), ms.bfloat16, 1 - g.rank).wait().astype(ms.float32).asnumpy() == np.arange(6)).all()
    with pytest.raises(CommError, match="cannot be cut into 2"):
        g.reduce_scatter(Tensor(np.zeros(3, np.float32)))


@case(world_size=2, variants=SHM)
def test_ranks_that_differ_are_told_so(ctx: CaseContext, backend: str) -> None:
    """A disagreement names both sides; it poisons the group, so each gets one of its own."""
    make = factory(backend, ctx.rank, 2)
    of(ctx, backend)
    g = make("quarrel", [0, 1])
    x = Tensor(np.zeros(4 + ctx.rank, np.float32))
    with pytest.raises(CommError, match=r"all_reduce\(sum\) in group quarrel .* of (16|20) bytes of float32"):
        g.all_reduce(x)
    g = make("letters", [0, 1])
    if ctx.rank == 0:
        g.send(x, 1)
    else:
        with pytest.raises(CommError, match="a message of 16 bytes of float32"):
            g.receive((4,), ms.int32, 0).wait()


@case(world_size=2, variants=SHM)
def test_time_limit(ctx: CaseContext, backend: str) -> None:
    make = factory(backend, ctx.rank, 2)
    world = of(ctx, backend)
    g = make("alone", [0, 1])
    g.timeout_s = 0.3
    if ctx.rank == 0:
        with pytest.raises(CommError, match="receive.*group alone.*0.3 s.*rank 1"):
            g.receive((2,), ms.float32, 1).wait()
        with pytest.raises(CommError, match="barrier in group alone .* waiting for rank 1"):
            g.barrier()
    world.barrier()


def held() -> tuple[int, int]:
    """Return this process's open descriptors and its mappings of groups' memory."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("parallel_core-group") + maps.count("memfd:")


@case(world_size=4)
def test_destroyed_groups_leave_nothing_behind(ctx: CaseContext) -> None:
    config = ModelParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, distributed_backend="shm"
    )
    counts = []
    for _ in range(3):
        context = ParallelContext.create(config, ctx.rank, 4)
        context.tp.all_reduce(Tensor(np.ones(300_000, np.float32)))
        if context.pp.rank == 0:
            context.pp.send(Tensor(np.ones(300_000, np.float32)), 1)
        else:
            context.pp.receive((300_000,), ms.float32, 0).wait()
        inside = held()
        context.destroy()
        counts.append(held())
        assert inside[1] > counts[-1][1]
        with pytest.raises(CommError, match="has been closed"):
            context.tp.barrier()
    assert counts[0] == counts[1] == counts[2], counts


@case(world_size=2)
def test_a_forgotten_group_is_closed_too(ctx: CaseContext) -> None:
    counts = []
    for _ in range(3):
        group_factory("shm", 60.0, ctx.rank, 2)("world", [0, 1]).barrier()
        counts.append(held())
    assert counts[0] == counts[1] == counts[2], counts


@case(world_size=3)
def test_groups_of_one_host_share_memory_and_those_that_cross_hosts_do_not(ctx: CaseContext) -> None:
    facts = shm._facts
    shm._facts = lambda: {**facts(), "host": "here" if ctx.rank < 2 else "there"}
    try:
        make = group_factory("auto", 60.0, ctx.rank, 3)
        with pytest.raises(ConfigError, match="several hosts"):
            group_factory("shm", 60.0, ctx.rank, 3)
    finally:
        shm._facts = facts
    groups = {"pair": ([0, 1], "shared memory"), "ends": ([0, 2], "MCCL"), "all": ([0, 1, 2], "MCCL")}
    for label, (ranks, carrier) in groups.items():
        if ctx.rank in ranks:
            g = make(label, ranks)
            assert carrier_of(g) == carrier
            assert g.all_reduce(Tensor(np.full(3, ctx.rank + 1.0, np.float32))).asnumpy().tolist() == [
                sum(ranks) + len(ranks)
            ] * 3
            g.close()
