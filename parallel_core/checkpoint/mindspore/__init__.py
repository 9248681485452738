"""Checkpoints that MindSpore's static-graph systems wrote: `.ckpt` files, whole or in slices with a strategy file."""

from __future__ import annotations

from parallel_core.checkpoint.mindspore.mindformers import (
    MindFormersCheckpoint,
    is_mindformers_directory,
    write_mindformers,
)
from parallel_core.checkpoint.mindspore.pangu import PanguCheckpoint, is_pangu
from parallel_core.checkpoint.mindspore.writer import write_pangu

__all__ = [
    "MindFormersCheckpoint",
    "PanguCheckpoint",
    "is_mindformers_directory",
    "is_pangu",
    "write_mindformers",
    "write_pangu",
]
