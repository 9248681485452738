"""The checksums inside Megatron's checkpoints: those of the zip files that `torch.save` writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from parallel_core.checkpoint.megatron.dcp import DistributedCheckpoint
from parallel_core.checkpoint.megatron.torch_zip import damaged_entries
from parallel_core.errors import CheckpointError


def verify_zips(path: Path, allow_inert: Iterable[str] = ()) -> list[str]:
    """Return what is wrong with the files of a Megatron checkpoint, one message per damaged entry; every byte is read.

    `.metadata` of the `torch_dist` format is a bare pickle without a checksum: only what it says can be checked.

    Args:
        path: an `iter_XXXXXXX` or `release` directory of either format.
        allow_inert: further class names that `.metadata` may mention.
    """
    try:
        zips: list[tuple[Path, int, int | None]] = [(file, 0, None) for file in sorted(path.glob("mp_rank_*/*.pt"))]
        if (path / ".metadata").exists():
            zips += DistributedCheckpoint(path, allow_inert).zips()
            zips += [(file, 0, None) for file in path.glob("common.pt")]
        return [
            f"{file} is damaged: {name} has another checksum than was written"
            for file, offset, length in zips
            for name in damaged_entries(file, offset, length)
        ]
    except CheckpointError as error:
        return [str(error)]
