"""Samples straight from MindRecord files: a record of sequence length + 1 ids is a sample, in the order of the files.

MindRecord files are read in order alone, and a run needs any sample at any time, so their ids are kept once as an array
beside the indices of other datasets, under the same rules (`index_cache`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
import urllib.parse
from contextlib import closing
from typing import Any

import numpy as np

from parallel_core.data.config import GPTDatasetConfig, Split
from parallel_core.data.gpt_dataset import Samples
from parallel_core.data.index_cache import IndexCache
from parallel_core.data.indexed_dataset import IndexedDataset
from parallel_core.data.mindrecord_reader import read_mindrecord
from parallel_core.errors import DataError

COLUMN = "input_ids"


def is_mindrecord(path: str) -> bool:
    """Tell whether a data path is a MindRecord file, or a folder that holds some, and no `.bin/.idx` pair."""
    return bool(mindrecord_files(path)) and not IndexedDataset.exists(path)


def mindrecord_files(path: str) -> list[str]:
    """Return the MindRecord files at a path by name; none where no file there has its `.db` beside it."""
    if os.path.isfile(path):
        return [path] if os.path.isfile(f"{path}.db") else []
    if not os.path.isdir(path):
        return []
    names = [name for name in sorted(os.listdir(path)) if not name.startswith(".") and not name.endswith(".db")]
    files = [file for name in names if os.path.isfile(file := os.path.join(path, name))]
    return files if any(os.path.isfile(f"{file}.db") for file in files) else []


def count_records(path: str) -> int | None:
    """Return how many records the files at a path have, by their indices; None where one cannot tell."""
    files = mindrecord_files(path)
    total = 0
    for file in files:
        uri = f"file:{urllib.parse.quote(os.path.abspath(file))}.db?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as index:
                total += int(index.execute("SELECT COUNT(*) FROM INDEXES").fetchone()[0])
        except (sqlite3.Error, TypeError, ValueError):
            return None
    return total if files else None


class RecordDataset(Samples):
    """The records of one split; after the last one comes the first again.

    Args:
        records: int32 [N, S + 1], all of them.
        path: file or folder they are from.
        bounds: first record of the split, and the one after its last.
        num_samples: samples to have; None for one epoch.
        index_split: which split this is.
        config: options of the samples.
    """

    def __init__(
        self,
        records: np.ndarray,
        path: str,
        bounds: tuple[int, int],
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(path, index_split, config)
        self.records, self.bounds, self.num_samples = records, bounds, num_samples

    @property
    def samples_per_epoch(self) -> int:
        """Records of the split."""
        return self.bounds[1] - self.bounds[0]

    def __len__(self) -> int:
        return self.samples_per_epoch if self.num_samples is None else self.num_samples

    def _text(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        text = np.array(self.records[self.bounds[0] + index % self.samples_per_epoch])
        self._check_vocabulary(text, index)
        return text

    def describe_order(self) -> dict[str, Any]:
        """Return what decides which record comes when, in JSON types; see `data_order`."""
        first, end = self.bounds
        shown = np.linspace(first, end - 1, min(16, end - first)).astype(np.int64)
        return {
            "class": "RecordDataset",
            "path": self.dataset_path,
            "records_sha256": hashlib.sha256(np.ascontiguousarray(self.records[shown]).tobytes()).hexdigest(),
            "split": self.index_split.name,
            "first_record": first,
            "end_record": end,
            "sequence_length": self.config.sequence_length,
        }


def open_records(path: str, config: GPTDatasetConfig) -> np.ndarray:
    """Return the ids of a MindRecord file or folder, int32 [N, S + 1], mapped from the cache.

    Raises:
        DataError: a file cannot be read, or a record has another length.
    """
    files, length = mindrecord_files(path), config.sequence_length + 1
    description = json.dumps({"class": "RecordDataset", "path": path, "column": COLUMN, "length": length}, indent=4)
    folder = config.path_to_cache
    if folder is None:
        folder = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "cache", "RecordDataset")
    name = hashlib.md5(description.encode("utf-8"), usedforsecurity=False).hexdigest()
    cache = IndexCache(os.path.join(folder, f"{name}-RecordDataset"), description, _source_of(files), ("records",))
    return cache.get(lambda: {"records": _read(files, length)})[0]["records"]


def _source_of(files: list[str]) -> str:
    """Return a checksum of what tells that the files are still the same."""
    states = []
    for file in (file for name in files for file in (name, f"{name}.db") if os.path.exists(file)):
        state = os.stat(file)
        states.append((os.path.basename(file), state.st_size, state.st_mtime_ns))
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _read(files: list[str], length: int) -> np.ndarray:
    count = 0
    with tempfile.TemporaryFile() as rows:  # not in memory: the files may be larger than it
        for file in files:
            for number, ids in enumerate(read_mindrecord([file], COLUMN)):
                if len(ids) != length:
                    raise DataError(
                        f"{file}: record {number} has {len(ids)} ids, and a sequence of {length - 1} needs {length}; "
                        "give --seq-length what the records were made for, less one."
                    )
                if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
                    raise DataError(f"{file}: record {number} has an id that no vocabulary has.")
                rows.write(ids.astype(np.int32).tobytes())
                count += 1
        if not count:
            raise DataError(f"no records in {', '.join(files)}.")
        rows.flush()
        return np.memmap(rows, np.int32, "r", shape=(count, length))
