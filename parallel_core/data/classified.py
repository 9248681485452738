"""Texts with a class each, as files of the GLUE tasks, AG News and IMDb have them, and samples of them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.data.epochs import EpochOrder
from parallel_core.data.files import read_text
from parallel_core.data.mindrecord_reader import read_mindrecord
from parallel_core.data.record_dataset import mindrecord_files
from parallel_core.errors import DataError

_TEXTS, _CLASSES = ("sentence", "text", "content", "review"), ("label", "labels", "class", "sentiment")
_COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Classified:
    """A text and the name of its class."""

    text: str
    label: str


def read_classified(path: str | Path) -> list[Classified]:
    """Return the texts of a file or a folder.

    Read are: a table (`.tsv`, `.csv`) whose first line names a column of texts (sentence, text, content, review) and
    one of classes (label, class, sentiment), as SST-2's; CoLA's table without such a line (source, class, mark,
    sentence); AG News' (class from 1, title, text); lines of JSON (`.jsonl`) with the same names; and a folder with a
    folder of texts for each class, as IMDb's `neg` and `pos`.

    Raises:
        DataError: it cannot be read, or has none of these forms; the place is named.
    """
    place = Path(path)
    if place.is_dir():
        found = [
            Classified(read_text(str(file)).strip(), folder.name)
            for folder in sorted(one for one in place.iterdir() if one.is_dir())
            for file in sorted(folder.glob("*.txt"))
        ]
    elif place.suffix in (".jsonl", ".json"):
        found = [_of_entry(line, f"{place}:{number}") for number, line in _lines(place)]
    else:
        found = _of_table(place)
    if not found:
        raise DataError(f"{place}: has no texts with classes; give a .tsv, .csv, .jsonl or a folder of folders of .txt")
    return found


def classified_rows(
    path: str | Path, encode: Callable[[str], list[int]] | None, names: Sequence[str] | None = None
) -> tuple[list[tuple[list[int], int]], list[str]]:
    """Return (ids, class) of each text, and the classes' names by number.

    Args:
        path: see `read_classified`; or MindRecord files, or a folder of them, with the columns input_ids,
            attention_mask (1 where there is no padding) and labels, as MindFormers' scripts write them.
        encode: returns a text's ids; None where records have them.
        names: the classes; None: those of the data.

    Raises:
        DataError: as `read_classified`, a class is not one of `names`, or texts are given without `encode`.
    """
    files = mindrecord_files(str(path))
    if files:
        found = [
            (ids[: int(seen.sum())].tolist(), str(int(label.reshape(-1)[0])))
            for ids, seen, label in zip(*(read_mindrecord(files, name) for name in _COLUMNS))
        ]
    elif encode is None:
        raise DataError(f"{path}: holds texts, which need a tokenizer")
    else:
        found = [(encode(sample.text), sample.label) for sample in read_classified(path)]
    known = label_names([Classified("", label) for _, label in found]) if names is None else list(names)
    if names is None and files:  # classes of records are numbers already
        known = [str(i) for i in range(int(known[-1]) + 1)]
    strange = sorted({label for _, label in found} - set(known))
    if strange:
        raise DataError(f"{path}: classes {', '.join(strange)} are not of {', '.join(known)}")
    return [(ids, known.index(label)) for ids, label in found], known


def label_names(samples: Sequence[Classified]) -> list[str]:
    """Return the classes in the order of their numbers: numbers by value, names by the alphabet."""
    names = {sample.label for sample in samples}
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _lines(place: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(read_text(str(place)).split("\n"), 1) if line.strip()]


def _of_entry(line: str, where: str) -> Classified:
    try:
        entry = json.loads(line)
        text = next(entry[name] for name in _TEXTS if name in entry)
        label = next(entry[name] for name in _CLASSES if name in entry)
    except (ValueError, TypeError, StopIteration):
        raise DataError(f"{where}: has no {' or '.join(_TEXTS)} with a {' or '.join(_CLASSES)}") from None
    return Classified(str(text), str(label))


def _of_table(place: Path) -> list[Classified]:
    lines = [line for _, line in _lines(place)]
    if place.suffix == ".csv":
        rows = list(csv.reader(lines))
    else:
        rows = [line.rstrip("\r").split("\t") for line in lines]
    if not rows:
        return []
    head = [name.strip().lower() for name in rows[0]]
    texts, classes = ([head.index(name) for name in names if name in head][:1] for names in (_TEXTS, _CLASSES))
    found = []
    for number, row in enumerate(rows[1:] if texts and classes else rows, 1):
        if texts and classes and len(row) > max(texts[0], classes[0]):
            found.append(Classified(row[texts[0]].strip(), row[classes[0]].strip()))
        elif not texts and len(row) == 4 and row[1] in ("0", "1"):  # CoLA
            found.append(Classified(row[3].strip(), row[1]))
        elif not texts and len(row) == 3 and row[0].isdecimal():  # AG News
            found.append(Classified(f"{row[1].strip()} {row[2].strip()}", str(int(row[0]) - 1)))
        else:
            raise DataError(f"{place}: row {number} has {len(row)} columns of no form that is read; name the columns "
                            f"in the first line: {_TEXTS[0]} and {_CLASSES[0]}")  # fmt: skip
    return found


@dataclass
class ClassifiedDataset:
    """Texts as samples, shuffled anew in every epoch.

    Attributes:
        rows: (ids, class) of each text; longer texts are cut off, one without an id is its padding.
        num_samples: how many samples are drawn, over several epochs.
        seq_length: positions of a sample.
        pad: the id that fills short texts.
        seed: of the order.
    """

    rows: list[tuple[list[int], int]]
    num_samples: int
    seq_length: int
    pad: int
    seed: int

    def __post_init__(self) -> None:
        self._order = EpochOrder(len(self.rows), self.seed)

    @property
    def samples_per_epoch(self) -> int:
        """Number of texts."""
        return len(self.rows)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return sample `index`: tokens int32 [S], lengths and label, numbers."""
        ids, label = self.rows[self._order.place(index, self.num_samples)]
        tokens = np.full(self.seq_length, self.pad, np.int32)
        count = min(len(ids), self.seq_length)
        tokens[:count] = ids[:count]
        return {"tokens": tokens, "lengths": np.int32(max(count, 1)), "label": np.int32(label)}

    def order(self) -> dict[str, Any]:
        """Return what decides which sample comes when."""
        digest = hashlib.sha256(repr(self.rows).encode()).hexdigest()
        return {"class": "ClassifiedDataset", "rows_sha256": digest, "random_seed": self.seed}
