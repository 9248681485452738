"""One rank of the collectives' piece: every operation of a group against NumPy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor  # noqa: E402

from parallel_core.comm.factory import group_factory  # noqa: E402
from parallel_core.comm.interface import Group  # noqa: E402
from parallel_core.optimizer import flat as flat_memory  # noqa: E402
from parallel_core.training.runtime import start_runtime  # noqa: E402

WRONG: list[str] = []


def main() -> None:
    """Run every operation of this job's ranks."""
    rank, size = start_runtime()
    operations(group_factory("auto", 120.0, rank, size), rank, size)
    sys.exit(1 if WRONG else 0)


def operations(make: Callable[[str, list[int]], Group], rank: int, size: int) -> None:
    """Run every operation of a backend's groups and print a line for each on the first rank; `WRONG` has what is."""
    world = make("world", list(range(size)))
    pair = make("pair", [rank - rank % 2, rank - rank % 2 + 1]) if rank - rank % 2 + 1 < size else None

    def part(r: int, *shape: int) -> np.ndarray:
        return np.random.default_rng(100 + r).standard_normal(shape).astype(np.float32)

    def check(what: str, got: Tensor, want: np.ndarray) -> None:
        right = got.shape == want.shape and np.allclose(got.astype(ms.float32).asnumpy(), want, atol=1e-4)
        if not right:
            WRONG.append(what)
        if rank == 0 or not right:
            print(f"INFO - {'ok  ' if right else 'BAD '} {what} (rank {rank})", flush=True)

    shape = (2 * size, 3 * size, 5)
    parts = [part(r, *shape) for r in range(size)]
    mine = Tensor(parts[rank])
    check("all_reduce", world.all_reduce(mine), sum(parts))  # type: ignore[arg-type]
    check("all_reduce max", world.all_reduce(mine, "max"), np.max(parts, 0))
    half = world.all_reduce(mine.astype(ms.bfloat16)).astype(ms.float32).asnumpy()
    near = Tensor((np.abs(half - sum(parts)) < 0.2).astype(np.float32))
    check("all_reduce bfloat16", near, np.ones(shape, np.float32))
    for dim in (0, 1):
        n = shape[dim] // size
        check(f"all_gather dim {dim}", world.all_gather(mine, dim), np.concatenate(parts, dim))
        cut = np.take(sum(parts), range(rank * n, rank * n + n), dim)
        check(f"reduce_scatter dim {dim}", world.reduce_scatter(mine, dim), cut)
    pieces = [np.split(p, size, 0)[rank] for p in parts]
    check("all_to_all", world.all_to_all(mine, 0, 1), np.concatenate(pieces, 1))
    counts = np.array([[(r + s) % 3 for s in range(size)] for r in range(size)], np.int64)
    rows = [part(r, int(counts[r].sum()), 4) for r in range(size)]
    ends = np.cumsum(np.concatenate([np.zeros((size, 1), np.int64), counts], 1), 1)
    want = np.concatenate([rows[r][ends[r, rank] : ends[r, rank + 1]] for r in range(size)])
    check("all_to_all_rows", world.all_to_all_rows(Tensor(rows[rank]), counts), want)
    check("broadcast_", world.broadcast_(Tensor(parts[rank]), 1), parts[1])
    arrived = world.shift_start(mine).wait()
    check("send and receive around a ring", arrived, parts[(rank - 1) % size])  # type: ignore[arg-type]
    flat = Tensor(parts[rank].reshape(-1))
    check("all_gather_start", world.all_gather_start(flat).wait(), np.concatenate([p.reshape(-1) for p in parts]))  # type: ignore[arg-type]
    n = flat.size // size
    summed = sum(p.reshape(-1) for p in parts)[rank * n : rank * n + n]  # type: ignore[index]
    check("reduce_scatter_start", world.reduce_scatter_start(flat).wait(), summed)  # type: ignore[arg-type]
    check("all_reduce_start_", world.all_reduce_start_(flat).wait(), sum(p.reshape(-1) for p in parts))  # type: ignore[arg-type]
    # What Adam's masters and buckets do: a part of a buffer is gathered, or reduced, into the buffer itself.
    per_rank = mine.size
    buffer, start = flat_memory.zeros(per_rank * size, "float32"), rank * per_rank
    own = buffer.part(start, start + per_rank)
    own.load(parts[rank].reshape(-1))
    gathered = world.all_gather_start(own.tensor(), buffer.tensor()).wait()
    if gathered is not None:
        buffer.write_(gathered)
    joined = np.concatenate([p.reshape(-1) for p in parts])
    check("all_gather_start into the buffer", Tensor(buffer.numpy().copy()), joined)
    buffer.load(joined * (rank + 1))
    reduced = world.reduce_scatter_start(buffer.tensor(), own.tensor()).wait()
    if reduced is not None:
        own.write_(reduced)
    share = joined[start : start + per_rank] * (size * (size + 1) / 2)
    check("reduce_scatter_start into the buffer", Tensor(own.numpy().copy()), share)
    if pair is not None and size > 2:
        check("all_reduce in a part of the ranks", pair.all_reduce(mine), sum(parts[r] for r in pair.ranks))  # type: ignore[arg-type]
    check("objects", Tensor(np.array(world.all_gather_object(rank), np.float32)), np.arange(size, dtype=np.float32))
    world.barrier()


if __name__ == "__main__":
    main()
