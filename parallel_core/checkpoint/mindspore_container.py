"""MindSpore's own `.ckpt` files as containers of a native checkpoint (`ckpt_format="ckpt"`).

The only part of the checkpoint layer that needs MindSpore, which is imported when a file is written or read. Unlike
safetensors a `.ckpt` cannot be read in part: a file is loaded whole, and kept until another one is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from parallel_core.checkpoint.dtypes import as_storage
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import Range, region


def write_ckpt(path: Path, tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Write arrays (with their dtype tags) into a MindSpore `.ckpt` file and flush it to the disk."""
    import mindspore

    bfloat16 = mindspore.Tensor([0.0], mindspore.bfloat16).asnumpy().dtype
    items = []
    for name, (array, tag) in tensors.items():
        bits = np.ascontiguousarray(as_storage(array, tag)).reshape(array.shape)
        items.append({"name": name, "data": mindspore.Tensor(bits.view(bfloat16) if tag == "bfloat16" else bits)})
    mindspore.save_checkpoint(items, str(path))
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@lru_cache(maxsize=1)
def _load(path: Path) -> dict[str, np.ndarray]:
    import mindspore

    try:
        return {name: value.asnumpy() for name, value in mindspore.load_checkpoint(str(path)).items()}
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read by mindspore.load_checkpoint: {error}") from None


@dataclass(frozen=True)
class CkptBlob:
    """One tensor of a `.ckpt` file, or a rectangle of it, loaded when read."""

    path: Path
    entry: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    def crop(self, ranges: Sequence[Range]) -> CkptBlob:
        """Return the rectangle `ranges` of this one."""
        inner = tuple((first + a, first + b) for (a, b), (first, _) in zip(ranges, self.ranges))
        return CkptBlob(self.path, self.entry, self.dtype, self.shape, inner)

    def read_into(self, out: np.ndarray) -> None:
        """Copy the rectangle into `out`."""
        tensors = _load(self.path)
        if self.entry not in tensors or tensors[self.entry].shape != self.shape:
            raise CheckpointError(f"{self.path} does not hold {self.entry} with shape {list(self.shape)}")
        values = as_storage(tensors[self.entry], self.dtype)
        np.copyto(out, region(values, self.ranges))
