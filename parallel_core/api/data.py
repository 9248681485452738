"""What MindFormers' tasks are trained on, as rows of this project: MindSpore datasets, folders of MindRecord files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.data.mindrecord_reader import read_mindrecord
from parallel_core.data.record_dataset import mindrecord_files
from parallel_core.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """Rows of ids, and which of them count.

    Attributes:
        ids: int32, one array a row.
        seen: of each row's ids 1 where the id counts; empty: all.
    """

    ids: list[np.ndarray]
    seen: list[np.ndarray]

    def counted(self, number: int) -> np.ndarray:
        """Return which ids of a row but the first count, float32 [S]."""
        if not self.seen:
            return np.ones(len(self.ids[number]) - 1, np.float32)
        return self.seen[number][1:].astype(np.float32)


class RowDataset:
    """Rows of S + 1 ids as samples of S, in their order, as often as samples are asked for.

    Args:
        rows: of S + 1 ids.
        num_samples: samples to give.
        seq_length: S.

    Raises:
        ConfigError: there are none, or of another length.
    """

    def __init__(self, rows: Rows, num_samples: int, seq_length: int) -> None:
        wrong = sorted({len(row) for row in rows.ids} - {seq_length + 1})
        if wrong or not rows.ids:
            raise ConfigError(f"rows of {wrong or 'no'} ids: a model of {seq_length} positions takes {seq_length + 1}")
        self.rows, self.num_samples, self.seq_length = rows, num_samples, seq_length

    @property
    def samples_per_epoch(self) -> int:
        """Number of rows."""
        return len(self.rows.ids)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return sample `index`: tokens, labels, position_ids int32 [S], loss_mask float32 [S]."""
        number = index % self.samples_per_epoch
        row = self.rows.ids[number].astype(np.int32)
        places = np.arange(self.seq_length, dtype=np.int32)
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": self.rows.counted(number), "position_ids": places}


def read_rows(dataset: Any) -> Rows:
    """Return the rows of a dataset.

    Args:
        dataset: a MindSpore dataset, or anything that gives arrays or {"input_ids": array[, "attention_mask"]}, each a
            row or a batch of rows; or the path of a MindRecord file or of a folder with some.

    Raises:
        ConfigError: it gives something else.
        DataError: a file cannot be read.
    """
    if isinstance(dataset, (str, Path)):
        return _of_files(str(dataset))
    ids: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    with _alone(dataset):
        found: Iterable[Any] = dataset
        if hasattr(dataset, "create_dict_iterator"):
            found = dataset.create_dict_iterator(num_epochs=1, output_numpy=True)
        for one in found:
            ids += _rows_of(one["input_ids"] if isinstance(one, dict) else one)
            if isinstance(one, dict) and "attention_mask" in one:
                seen += _rows_of(one["attention_mask"])
    if seen and [len(row) for row in seen] != [len(row) for row in ids]:
        raise ConfigError("attention_mask: is of another shape than input_ids")
    return Rows(ids, seen)


def _rows_of(value: Any) -> list[np.ndarray]:
    rows = np.asarray(value)
    if rows.ndim not in (1, 2) or not np.issubdtype(rows.dtype, np.integer):
        raise ConfigError(f"input_ids of shape {rows.shape}, {rows.dtype}: give rows of ids, or batches of them")
    return list(np.atleast_2d(rows).astype(np.int32))


def _of_files(path: str) -> Rows:
    files = mindrecord_files(path)
    if not files:
        raise ConfigError(
            f"{path}: holds no MindRecord files with their .db; python tools/preprocess_data.py --mindrecord-length "
            "N writes them from texts"
        )
    return Rows([row.astype(np.int32) for row in read_mindrecord(files)], [])


@contextmanager
def _alone(dataset: Any) -> Iterator[None]:
    """Let a MindSpore dataset be read though another one is made of the same source, which MindSpore refuses."""
    parents: list[tuple[Any, list[Any]]] = []
    nodes = [dataset]
    for node in nodes:
        for child in getattr(node, "children", ()):
            parents.append((child, child.parent))
            child.parent = [node]
            nodes.append(child)
    try:
        yield
    finally:
        for child, before in parents:
            child.parent = before


def same_rows(dataset: Any, share: Callable[[Callable[[], list[np.ndarray]]], list[np.ndarray]]) -> Rows:
    """Return the rows that rank 0 reads, on every rank.

    Args:
        dataset: see `read_rows`.
        share: `job.rows_of_rank_0`.
    """
    kept: list[Rows] = []

    def ids() -> list[np.ndarray]:
        kept.append(read_rows(dataset))
        return kept[0].ids

    rows = share(ids)
    return Rows(rows, share(lambda: kept[0].seen))
