"""Checkpoints as global tensors: crash-safe saving, loading into any layout, and Megatron's formats without torch.

Saving, with the caller's own barriers between the phases (see `writer`):

    writer = CheckpointWriter(root, iteration, rank, world_size)
    writer.begin()                                        # rank 0, then a barrier
    manifest = writer.write_rank_file({key: (TensorShard, array)})
    writer.commit(all_manifests, common, keep_checkpoint_max)   # rank 0

Loading, the same for native, Megatron and Hugging Face checkpoints:

    path = find_checkpoint(root, step)                    # rank 0, which tells the others
    arrays, report = load_shards(path, {key: TensorShard})
    common = open_checkpoint(path).common

Keys are `NAME` for parameters and `NAME@master`, `NAME@exp_avg`, `NAME@exp_avg_sq` for optimizer state, where NAME is
Megatron-core's parameter name with the global layer number.
"""

from __future__ import annotations

from parallel_core.checkpoint.async_save import AsyncSaver
from parallel_core.checkpoint.loading import LoadReport, compare_model_config, load_shards
from parallel_core.checkpoint.native import NativeCheckpoint, find_checkpoint, holds_checkpoint, verify
from parallel_core.checkpoint.opening import open_checkpoint
from parallel_core.checkpoint.source import TensorInfo, TensorSource, read_tensor
from parallel_core.checkpoint.writer import CheckpointWriter, share_among_replicas
from parallel_core.layout.shard import Box, TensorShard

__all__ = [
    "AsyncSaver",
    "Box",
    "CheckpointWriter",
    "LoadReport",
    "NativeCheckpoint",
    "TensorInfo",
    "TensorShard",
    "TensorSource",
    "compare_model_config",
    "find_checkpoint",
    "holds_checkpoint",
    "load_shards",
    "open_checkpoint",
    "read_tensor",
    "share_among_replicas",
    "verify",
]
