"""What the crash tests save, and a process that saves without end until it is killed."""

from __future__ import annotations

import numpy as np

from parallel_core.checkpoint import CheckpointWriter, TensorShard

SHAPE = (64, 32)


def shards_of(value, rank, world_size):
    """Return one rank's part of a tensor filled with `value`."""
    shard = TensorShard.split("w", SHAPE, "float32", 0, rank, world_size)
    return {"w": (shard, np.full(shard.local_shape, value, np.float32))}


def save(root, iteration, world_size=2, keep=0, **options):
    """Save an iteration from every rank, in one process."""
    writers = [CheckpointWriter(root, iteration, rank, world_size, **options) for rank in range(world_size)]
    writers[0].begin()
    manifests = [w.write_rank_file(shards_of(iteration, w.rank, world_size)) for w in writers]
    return writers[0].commit(manifests, {"step": iteration}, keep)


def save_until_killed(root, start, announce):
    """Save every iteration twice, so that replacing one is a moment to be killed at too, and announce each save."""
    for half in range(start * 2, start * 2 + 100_000):
        save(root, half // 2, keep=2)
        announce.send(half // 2)
