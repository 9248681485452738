"""Loading any checkpoint into any layout."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.dtypes import convert, storage_dtype
from parallel_core.checkpoint.source import TensorSource
from parallel_core.errors import CheckpointError, bullet_list
from parallel_core.layout.shard import Box, TensorShard, intersect, region

VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
"""Tensors whose first dim is the padded vocabulary, which another tensor parallel size may pad differently."""


@dataclass
class LoadReport:
    """What loading did on this rank.

    Attributes:
        tensors: how many tensors were filled.
        bytes: how many bytes they have.
        resliced: a line per tensor that was not stored the way this rank holds it.
        converted: a line per tensor whose dtype changed, or that was filled from another key.
        padded: a line per vocabulary tensor whose padding changed.
    """

    tensors: int = 0
    bytes: int = 0
    resliced: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)

    def text(self, limit: int = 3) -> str:
        """Return the report in one paragraph, with at most `limit` examples of each kind."""
        lines = [f"loaded {self.tensors} tensors, {self.bytes / 1e6:.1f} MB on this rank"]
        for what, items in (("re-sliced", self.resliced), ("converted", self.converted), ("re-padded", self.padded)):
            if items:
                more = f" and {len(items) - limit} more" if len(items) > limit else ""
                lines.append(f"{len(items)} {what}: " + "; ".join(items[:limit]) + more)
        return ". ".join(lines)


def load_shards(
    source: TensorSource | str | Path,
    wanted: Mapping[str, TensorShard],
    *,
    all_keys: Collection[str] | None = None,
    bfloat16: np.dtype | None = None,
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Return this rank's arrays, cut out of a checkpoint of any format and layout.

    Each needed byte is read once, and the memory in use is what is returned plus one tensor at most. A dtype that
    differs is converted (rounding to nearest even). Two keys stand in for one another where the values are the same:
    `NAME@master` is filled from a float32 `NAME`, and a float32 `NAME` from `NAME@master` when only narrower weights
    are stored. Rows that a larger padded vocabulary adds repeat the last stored row (zeros for Adam's moments).

    Args:
        source: an opened checkpoint, or the directory of one.
        wanted: by key, the part of which tensor this rank holds.
        all_keys: the keys of the whole model over all ranks; when given, other keys in the checkpoint are an error.
        bfloat16: the NumPy dtype to give bfloat16 arrays; they are `uint16` bits when None.

    Returns:
        The arrays, of each shard's `local_shape`, by key; and what was re-sliced or converted.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape: the first ten of each, and how many.
    """
    if isinstance(source, (str, Path)):
        from parallel_core.checkpoint.opening import open_checkpoint

        source = open_checkpoint(source)
    present = set(source.keys())
    stored_keys = {key: _stand_in(source, present, key, shard) for key, shard in wanted.items()}
    _check_keys(source, wanted, stored_keys, all_keys)
    arrays: dict[str, np.ndarray] = {}
    report = LoadReport()
    for key, shard in wanted.items():
        stored = stored_keys[key] or key
        arrays[key] = _load_one(source, key, stored, shard, report)
        if bfloat16 is not None and shard.dtype == "bfloat16":
            arrays[key] = arrays[key].view(bfloat16)
    return arrays, report


def read_shard(source: TensorSource, key: str, shard: TensorShard) -> np.ndarray:
    """Return one rank's part of one stored tensor, converted to the shard's dtype and with its vocabulary padding."""
    return _load_one(source, key, key, shard, LoadReport())


def compare_model_config(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return one line per model setting that differs: `key: saved ..., asked ...`; empty when they agree.

    A key that only one side has is listed too, as "not set" on the other.

    Args:
        saved: settings stored in the checkpoint.
        asked: settings of this run, with the same keys.
    """
    lines = []
    for key in sorted({*saved, *asked}):
        old, new = saved.get(key, _NOT_SET), asked.get(key, _NOT_SET)
        if isinstance(old, tuple) or isinstance(new, tuple):  # JSON turns tuples into lists
            old, new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
        if old is _NOT_SET or new is _NOT_SET or old != new or isinstance(old, bool) != isinstance(new, bool):
            lines.append(f"{key}: saved {_show(old)}, asked {_show(new)}")
    return lines


_NOT_SET = object()


def _show(value: Any) -> str:
    return "(not set)" if value is _NOT_SET else repr(value)


def _stand_in(source: TensorSource, stored: set[str], key: str, shard: TensorShard) -> str | None:
    """Return the stored key that fills `key`, or None when there is none."""
    name, _, kind = key.partition("@")
    if key in stored:
        narrow = kind == "" and shard.dtype == "float32" and source.info(key).dtype in ("bfloat16", "float16")
        return f"{name}@master" if narrow and f"{name}@master" in stored else key
    if kind == "master" and name in stored and source.info(name).dtype == "float32":
        return name
    return None


def _check_keys(
    source: TensorSource,
    wanted: Mapping[str, TensorShard],
    stored_keys: Mapping[str, str | None],
    all_keys: Collection[str] | None,
) -> None:
    missing = [key for key, stored in stored_keys.items() if stored is None]
    wrong = []
    for key, stored in stored_keys.items():
        if stored is None:
            continue
        found, asked = source.info(stored).shape, wanted[key].global_shape
        if found != asked and not _is_repadded(source, wanted[key], found):
            wrong.append(f"{key}: the checkpoint has {list(found)}, the model {list(asked)}")
    unexpected = [] if all_keys is None else sorted(set(source.keys()) - set(all_keys) - _used(stored_keys))
    if all_keys is not None:  # masters that a float32 model does not keep apart are no surprise
        unexpected = [key for key in unexpected if not (key.endswith("@master") and key[:-7] in all_keys)]
    parts = [
        f"{len(items)} {what}:\n{bullet_list(items)}"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if items
    ]
    if parts:
        raise CheckpointError(f"{source.path} ({source.format}) does not fit this model; tensors " + "\n".join(parts))


def _used(stored_keys: Mapping[str, str | None]) -> set[str]:
    return {key for key in stored_keys.values() if key is not None}


def _is_repadded(source: TensorSource, shard: TensorShard, found: tuple[int, ...]) -> bool:
    """Tell whether two shapes differ by vocabulary padding alone, with no real row lost."""
    if shard.name not in VOCABULARY_TENSORS or not found or not found[0] or found[1:] != shard.global_shape[1:]:
        return False
    true_size = source.common.get("model_config", {}).get("vocab_size")
    return shard.global_shape[0] > found[0] or (true_size is not None and true_size <= shard.global_shape[0])


def _load_one(source: TensorSource, key: str, stored: str, shard: TensorShard, report: LoadReport) -> np.ndarray:
    info = source.info(stored)
    out = np.empty(shard.local_shape, storage_dtype(info.dtype))
    boxes: Sequence[Box] = shard.boxes
    if info.shape != shard.global_shape:
        boxes = _fill_padding(source, key, stored, shard, out)
        report.padded.append(f"{key} {list(info.shape)} -> {list(shard.global_shape)}")
    pieces = 0
    for box in boxes:
        target = region(out, box.local).reshape(box.shape)
        pieces += source.read_into(stored, box.globe, target)
    whole = math.prod(shard.local_shape) == math.prod(shard.global_shape)
    if pieces != len(shard.boxes) or (pieces and not whole and not _stored_alike(source, stored, shard)):
        report.resliced.append(f"{key} ({pieces} stored part(s) -> {len(shard.boxes)} box(es) here)")
    if info.dtype != shard.dtype or stored != key:
        report.converted.append(f"{key} {shard.dtype} from {stored} {info.dtype}")
    report.tensors += 1
    report.bytes += math.prod(shard.local_shape) * storage_dtype(shard.dtype).itemsize
    return convert(out, info.dtype, shard.dtype)


def _stored_alike(source: TensorSource, key: str, shard: TensorShard) -> bool:
    """Tell whether every box of the shard is exactly one stored piece."""
    pieces = getattr(source, "pieces", None)
    stored = {piece.globe for piece in pieces(key)} if pieces else set()
    return all(box.globe in stored for box in shard.boxes)


def _fill_padding(source: TensorSource, key: str, stored: str, shard: TensorShard, out: np.ndarray) -> list[Box]:
    """Fill the rows of `out` that the checkpoint has no rows for, and return the boxes that it has."""
    rows, *widths = source.info(stored).shape
    whole = [(0, width) for width in widths]
    last = np.zeros((1, *widths), out.dtype)
    if "@exp_avg" not in key:
        source.read_into(stored, [(rows - 1, rows), *whole], last)
    present = []
    for box in shard.boxes:
        target = region(out, box.local).reshape(box.shape)
        (row, row_end), *columns = box.globe
        split = min(max(rows, row), row_end)
        held = (slice(None), *(slice(*span) for span in columns))
        target[split - row :] = last[held]
        kept = intersect(box.globe, [(0, rows), *whole])
        if kept is not None:
            count = math.prod(stop - start for start, stop in kept)
            if len(box.local) == 1:
                local: tuple[tuple[int, int], ...] = ((box.local[0][0], box.local[0][0] + count),)
            else:
                local = ((box.local[0][0], box.local[0][0] + split - row), *box.local[1:])
            present.append(Box(local, kept))
    return present
