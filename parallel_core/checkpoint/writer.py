"""Writing a native checkpoint so that a crash at any instant leaves a loadable latest one.

The phases, which the caller orders with its own barriers:

    writer = CheckpointWriter(root, iteration, rank, world_size)
    rank 0:     writer.begin()                       # clears leftovers, makes the directory     -- barrier --
    every rank: manifest = writer.write_rank_file(shards)                                        -- gather  --
    rank 0:     writer.commit(manifests, common)     # index, rename, tracker, then the old ones go

With no gather (a background thread must not communicate), rank 0 collects the manifests from the directory instead:
`writer.commit(writer.collect_manifests(), common)`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.common import checked_common
from parallel_core.checkpoint.dtypes import as_storage
from parallel_core.checkpoint.layout_files import (
    CHECKSUMS_NAME,
    CONTAINERS,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    TRACKER_NAME,
    fsync_directory,
    iteration_dir_name,
    list_iterations,
    remove_checkpoint,
    remove_leftovers,
    sealed_checksums,
    write_durably,
)
from parallel_core.checkpoint.safetensors_file import StreamTensor, file_digest, write_safetensors
from parallel_core.checkpoint.source import check_tiling
from parallel_core.errors import CheckpointError, bullet_list
from parallel_core.files import read_regular
from parallel_core.layout.shard import TensorShard, region
from parallel_core.records import Record, parse_json, show

Shards = Mapping[str, tuple[TensorShard, np.ndarray]]
"""What a rank saves: `NAME`, `NAME@master`, `NAME@exp_avg` or `NAME@exp_avg_sq` -> where it belongs, and the values."""
Manifest = dict[str, Any]
MAX_MANIFEST_BYTES = 1 << 30


class CheckpointWriter:
    """One save of one iteration, as seen by one rank."""

    def __init__(
        self,
        root: str | Path,
        iteration: int,
        rank: int,
        world_size: int,
        *,
        ckpt_format: str = "safetensors",
        ckpt_prefix: str = "model",
        token: str = "0",
    ) -> None:
        """Name the directories; nothing is written yet.

        Args:
            root: the `--save` directory.
            iteration: iterations completed.
            rank: this rank; it writes one file.
            world_size: number of ranks that write.
            ckpt_format: container of the rank files, "safetensors" or "ckpt" (MindSpore's own).
            ckpt_prefix: start of the rank files' names.
            token: the same string on every rank and different in every launch, so that what an earlier launch left
                behind is never taken for this save's.

        Raises:
            CheckpointError: the format is unknown, or prefix or token cannot be part of a file name.
        """
        if ckpt_format not in CONTAINERS:
            raise CheckpointError(f"ckpt_format={ckpt_format!r} is not one of {', '.join(CONTAINERS)}")
        for what, text in (("ckpt_prefix", ckpt_prefix), ("token", token)):
            if not re.fullmatch(r"[A-Za-z0-9_.+-]+", text) or text.startswith("."):
                raise CheckpointError(f"{what}={text!r} cannot be part of a file name; use letters, digits and _.+-")
        self.root = Path(root)
        self.iteration, self.rank, self.world_size = iteration, rank, world_size
        self.final_path = self.root / iteration_dir_name(iteration)
        self.partial_path = self.root / f"{self.final_path.name}.tmp-{token}"
        self._container = ckpt_format
        self._file_name = f"{ckpt_prefix}-{rank:05d}-of-{world_size:05d}.{ckpt_format}"

    def begin(self) -> None:
        """Clear what crashed saves left and make the directory; rank 0, before any rank writes.

        Raises:
            CheckpointError: the directory cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)
            self.partial_path.mkdir()
        except OSError as error:
            raise CheckpointError(f"--save {self.root} cannot be written: {error}") from None

    def write_rank_file(self, shards: Shards) -> Manifest:
        """Write this rank's file, flushed to the disk, and return what it contains, for `commit`.

        Args:
            shards: by key, where the values belong and the values. Each element of each tensor comes from one rank
                only: replicas either share the tensors (`share_among_replicas`) or stay silent.

        Raises:
            CheckpointError: an array does not fit its description, or the file cannot be written (disk full).
        """
        return self._write(*_entries(shards))

    def write_stream(self, tensors: Mapping[str, StreamTensor]) -> Manifest:
        """Write this rank's file from whole tensors that are produced one at a time; otherwise as `write_rank_file`.

        Args:
            tensors: by key, the whole global tensors this rank writes.
        """
        index = {}
        for key, tensor in tensors.items():
            shape = list(tensor.shape)
            where = {"start": [0] * len(shape), "shape": shape}
            index[key] = {"key": key, "global_shape": shape, "dtype": tensor.dtype, **where}
        return self._write(dict(tensors), index)

    def _write(self, entries: dict[str, StreamTensor], index: dict[str, dict[str, Any]]) -> Manifest:
        path = self.partial_path / self._file_name
        try:
            self.partial_path.mkdir(parents=True, exist_ok=True)
            offsets: dict[str, int] = {}
            if self._container == "ckpt":
                from parallel_core.checkpoint.mindspore_container import write_ckpt

                write_ckpt(path, {name: (tensor.array(), tensor.dtype) for name, tensor in entries.items()})
                digest = file_digest(path)
            else:
                digest, offsets = write_safetensors(path, entries, {"format": "np", FORMAT_NAME: json.dumps(index)})
            manifest: Manifest = {
                "rank": self.rank,
                "file": self._file_name,
                "bytes": digest.bytes,
                "crc32": digest.crc32,
                "entries": {entry: {**spec, "offset": offsets.get(entry)} for entry, spec in index.items()},
            }
            write_durably(self._manifest_path(self.rank), json.dumps(manifest))
        except OSError as error:
            reason = f"rank {self.rank} could not write {path}: {error}"
            self.report_failure(reason)
            raise CheckpointError(reason) from None
        return manifest

    def abandon(self) -> None:
        """Remove what this save has written so far; rank 0, when it is given up."""
        shutil.rmtree(self.partial_path, ignore_errors=True)

    def report_failure(self, reason: str) -> None:
        """Leave a note that this rank will not deliver, so that `collect_manifests` on rank 0 stops waiting."""
        try:
            write_durably(self._manifest_path(self.rank), json.dumps({"rank": self.rank, "failed": reason}))
        except OSError:
            return  # a full disk cannot take the note either; rank 0 then ends by its timeout

    def collect_manifests(
        self,
        timeout_s: float = math.inf,
        poll_s: float = 0.05,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[Manifest]:
        """Return every rank's manifest, read from the directory; rank 0, without communication.

        Args:
            timeout_s: how long to wait; a healthy rank may need any time for a large file.
            poll_s: seconds between two looks.
            given_up: tells that a rank will not deliver and could not say so in the directory.

        Raises:
            CheckpointError: a rank reported a failure, some have not written within `timeout_s` seconds, or the save
                is given up.
        """
        deadline = time.monotonic() + timeout_s
        manifests: dict[int, Manifest] = {}
        while True:
            for rank in range(self.world_size):
                path = self._manifest_path(rank)
                if rank not in manifests and path.exists():
                    manifests[rank] = _read_manifest(path)
                    if "failed" in manifests[rank]:
                        raise CheckpointError(f"{self.final_path.name} was not saved: {manifests[rank]['failed']}")
            if len(manifests) == self.world_size:
                return [manifests[rank] for rank in range(self.world_size)]
            if time.monotonic() > deadline or given_up():
                late = [str(rank) for rank in range(self.world_size) if rank not in manifests]
                within = f" within {timeout_s:g} s" if time.monotonic() > deadline else ""
                raise CheckpointError(
                    f"{self.final_path.name} was not saved: rank(s) {', '.join(late)} wrote nothing{within}"
                )
            time.sleep(poll_s)

    def commit(self, manifests: Sequence[Manifest], common: Mapping[str, Any], keep_checkpoint_max: int = 0) -> Path:
        """Publish the checkpoint on rank 0, after every rank wrote: index, rename, tracker; then old ones are removed.

        Args:
            manifests: what `write_rank_file` returned, of every rank, in any order.
            common: everything that is not a tensor, as JSON can hold it; `iteration` is added.
            keep_checkpoint_max: how many checkpoints up to this iteration stay, this one included; 0 keeps all.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointError: a rank is missing, elements of a tensor are missing or written twice, or the disk is full.
                The previous checkpoint is untouched.
        """
        index = self._index(manifests, common)
        try:
            text = json.dumps(index, indent=None, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"`common` of {self.final_path.name} holds what JSON cannot: {error}") from None
        try:
            self._write_index(index, text)
            self._publish()
        except OSError as error:
            raise CheckpointError(f"{self.final_path} could not be published: {error}") from None
        if keep_checkpoint_max > 0:
            self._prune(keep_checkpoint_max)
        remove_leftovers(self.root)
        return self.final_path

    def _manifest_path(self, rank: int) -> Path:
        return self.partial_path / f"manifest-{rank:05d}.json"

    def _index(self, manifests: Sequence[Manifest], common: Mapping[str, Any]) -> dict[str, Any]:
        missing = sorted(set(range(self.world_size)) - {manifest["rank"] for manifest in manifests})
        if missing:
            raise CheckpointError(f"{self.final_path.name} was not saved: no manifest from rank(s) {missing[:10]}")
        tensors: dict[str, dict[str, Any]] = {}
        conflicts = []
        for manifest in sorted(manifests, key=lambda m: m["rank"]):
            for entry, spec in manifest["entries"].items():
                tensor = tensors.setdefault(
                    spec["key"], {"shape": spec["global_shape"], "dtype": spec["dtype"], "pieces": []}
                )
                if tensor["shape"] != spec["global_shape"] or tensor["dtype"] != spec["dtype"]:
                    conflicts.append(
                        f"{spec['key']}: {tensor['dtype']} {tensor['shape']} and, from rank "
                        f"{manifest['rank']}, {spec['dtype']} {spec['global_shape']}"
                    )
                where = {"file": manifest["file"], "entry": entry, "offset": spec["offset"]}
                tensor["pieces"].append({**where, "start": spec["start"], "shape": spec["shape"]})
        if conflicts:
            raise CheckpointError(f"ranks disagree about {len(conflicts)} tensors:\n{bullet_list(conflicts)}")
        for key, tensor in tensors.items():
            pieces = [(piece["start"], piece["shape"]) for piece in tensor["pieces"]]
            check_tiling(key, tensor["shape"], pieces, self.final_path.name)
        files = {manifest["file"]: {"bytes": manifest["bytes"], "crc32": manifest["crc32"]} for manifest in manifests}
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "container": self._container,
            "iteration": self.iteration,
            "world_size": self.world_size,
            "files": files,
            # By the reader's rules: what could not be loaded again is not saved.
            "common": checked_common({**common, "iteration": self.iteration}, self.final_path.name),
            "tensors": tensors,
        }

    def _write_index(self, index: Mapping[str, Any], text: str) -> None:
        for path in self.partial_path.iterdir():
            if path.name not in index["files"]:
                path.unlink()
        write_durably(self.partial_path / INDEX_NAME, text)
        digest = file_digest(self.partial_path / INDEX_NAME)
        lines = [f"{digest.crc32} {digest.bytes} {INDEX_NAME}"]
        lines += [f"{spec['crc32']} {spec['bytes']} {name}" for name, spec in index["files"].items()]
        write_durably(self.partial_path / CHECKSUMS_NAME, sealed_checksums(lines))

    def _publish(self) -> None:
        replaced = self.final_path.with_name(self.final_path.name + ".replaced")
        if self.final_path.exists():
            remove_leftovers(self.root, keep=self.partial_path)
            os.replace(self.final_path, replaced)
        os.replace(self.partial_path, self.final_path)
        fsync_directory(self.root)
        write_durably(self.root / TRACKER_NAME, str(self.iteration))

    def _prune(self, keep: int) -> None:
        # Iterations above this one belong to a branch the user went back from; they are not ours to count or remove.
        past = sorted(i for i in list_iterations(self.root) if i <= self.iteration)
        for iteration in past[:-keep]:
            remove_checkpoint(list_iterations(self.root)[iteration])


def _read_manifest(path: Path) -> Manifest:
    try:
        data = read_regular(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    manifest = Record(parse_json(data, str(path), CheckpointError), str(path), CheckpointError)
    if "failed" not in manifest.values:
        manifest.integer("rank"), manifest.text("file"), manifest.integer("bytes"), manifest.text("crc32")
        for _, entry in manifest.record("entries").items():
            entry.text("key"), entry.text("dtype"), entry.integers("start"), entry.integers("shape")
            entry.integers("global_shape")
    return dict(manifest.values)


def _entries(shards: Shards) -> tuple[dict[str, StreamTensor], dict[str, dict[str, Any]]]:
    """Cut shards into file entries: one per box, named by the key, with `#0`, `#1`, ... when there are several."""
    entries: dict[str, StreamTensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for key, (shard, array) in shards.items():
        if not key.isprintable():
            raise CheckpointError(f"{show(key)} cannot be a tensor's name: it cannot be printed")
        if key.split("@")[0] != shard.name:
            raise CheckpointError(f"key {key!r} does not belong to tensor {shard.name!r}")
        if tuple(array.shape) != shard.local_shape:
            raise CheckpointError(
                f"{key}: the array has shape {list(array.shape)}, its description says {list(shard.local_shape)}"
            )
        values = as_storage(array, shard.dtype)
        for i, box in enumerate(shard.boxes):
            entry = key if len(shard.boxes) == 1 else f"{key}#{i}"
            part = region(values, box.local)
            entries[entry] = StreamTensor.of(part.reshape(box.shape), shard.dtype)
            index[entry] = {
                "key": key,
                "global_shape": list(shard.global_shape),
                "dtype": shard.dtype,
                "start": [start for start, _ in box.globe],
                "shape": list(box.shape),
            }
    return entries, index


def share_among_replicas(bytes_by_key: Mapping[str, int], replica: int, num_replicas: int) -> list[str]:
    """Return the keys this replica writes, so that replicas write about equally many bytes and each key once.

    Args:
        bytes_by_key: the same on every replica.
        replica: this replica's position, for example its data parallel rank.
        num_replicas: number of replicas.
    """
    loads = [0] * num_replicas
    mine = []
    for key, size in sorted(bytes_by_key.items(), key=lambda item: (-item[1], item[0])):
        target = loads.index(min(loads))
        loads[target] += size
        if target == replica:
            mine.append(key)
    return [key for key in bytes_by_key if key in set(mine)]
