"""Names and small durable file operations of a checkpoint directory.

* DIR/latest_checkpointed_iteration.txt      the iteration to load, written last
* DIR/iter_0000100/checkpoint.json           index: tensors, files with checksums, everything that is no tensor
* DIR/iter_0000100/checksums.txt             checksum of checkpoint.json and of every other file
* DIR/iter_0000100/model-00000-of-00004.safetensors
* DIR/iter_0000110.tmp-TOKEN/                a save in progress, or what a crash left of one
* DIR/iter_0000100.replaced/                 for an instant, while iteration 100 is saved again
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from parallel_core.errors import CheckpointError
from parallel_core.files import create_file

TRACKER_NAME = "latest_checkpointed_iteration.txt"
INDEX_NAME = "checkpoint.json"
CHECKSUMS_NAME = "checksums.txt"
FORMAT_NAME = "parallel_core"
FORMAT_VERSION = 1
CONTAINERS = ("safetensors", "ckpt")
"""Kinds of data files, by their ending."""
_ITERATION_PATTERN = re.compile(r"iter_(\d{7,})(\.replaced)?")


def iteration_dir_name(iteration: int) -> str:
    """Return the directory name of an iteration, `iter_0000100` for 100."""
    return f"iter_{iteration:07d}"


def list_iterations(root: Path) -> dict[int, Path]:
    """Return the finished checkpoints under `root` by iteration, complete or not, native or Megatron's."""
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = _ITERATION_PATTERN.fullmatch(path.name)
        if match and path.is_dir() and int(match[1]) not in found:  # sorted: the plain name comes before `.replaced`
            found[int(match[1])] = path
    return found


@contextmanager
def os_errors_named(path: Path) -> Iterator[None]:
    """Turn an error of the operating system in the block into a `CheckpointError` about `path`.

    Raises:
        CheckpointError: a name that is too long, a directory that may not be read, a disk that fails.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def sealed_checksums(lines: Sequence[str]) -> str:
    """Return the text of `checksums.txt`: a line per file, and a last one with the checksum of those before it."""
    text = "".join(f"{line}\n" for line in lines)
    return f"{text}{zlib.crc32(text.encode()):08x} {len(text)} {CHECKSUMS_NAME}\n"


def fsync_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace the content of `path` so that a crash leaves either the old or the new content, never a mix."""
    partial = path.with_name(path.name + ".partial")
    with create_file(partial) as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
    fsync_directory(path.parent)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint directory so that a crash on the way never leaves half of it under its own name."""
    doomed = path.with_name(path.name + ".tmp-removing")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(root: Path, keep: Path | None = None) -> list[str]:
    """Remove what crashed saves and removals left under `root`, and return their names."""
    removed = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        leftover = re.fullmatch(r"iter_\d{7,}(\.replaced)?\.tmp-.*", path.name) or (
            path.name.endswith(".replaced") and path.with_name(path.name.removesuffix(".replaced")).is_dir()
        )
        if leftover and path.is_dir() and path != keep:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed
