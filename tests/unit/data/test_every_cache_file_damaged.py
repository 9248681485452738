"""Every file of an index cache and of a data pair, damaged in every way: made again, or named; never silently used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_masked_words import dataset_of, prefix  # noqa: F401 - a fixture

from parallel_core.data import GPTDataset, IndexedDataset, Split
from parallel_core.errors import DataError
from tests.helpers.damage import WAYS, damage
from tests.unit.data.helpers import make_config, numbered_documents, write_pair


def harmed(original: Path, copy: Path, flips: int):
    """Yield each file's name and the way in which it is damaged in the copy, which is made anew each time."""
    rng = random.Random(4)
    for file in sorted(path for path in original.iterdir() if path.suffix != ".lock"):
        for way in [*WAYS, *(rng.randrange(8 * file.stat().st_size) for _ in range(flips))]:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(original, copy)
            damage(copy / file.name, way)
            yield file.name, way


@pytest.mark.parametrize("kind", ["GPT", pytest.param("BERT", marks=pytest.mark.slow)])
def test_every_file_of_a_cache(kind, tmp_path, prefix):  # noqa: F811 - the fixture
    pair = write_pair(tmp_path / "pair", numbered_documents([10, 20, 30]))

    def read(cache: Path):
        if kind == "BERT":
            found = dataset_of(prefix, path_to_cache=str(cache))
        else:
            data = IndexedDataset(pair)
            config = make_config(pair, path_to_cache=str(cache))
            found = GPTDataset(data, pair, np.arange(3, dtype=np.int32), 12, Split.train, config)
        return found, [{key: value.tolist() for key, value in found[i].items()} for i in range(len(found))]

    _, right = read(tmp_path / "good")
    assert not read(tmp_path / "good")[0].built_anew_on_cache_miss
    for name, way in harmed(tmp_path / "good", tmp_path / "copy", 6):
        dataset, samples = read(tmp_path / "copy")
        assert samples == right and dataset.built_anew_on_cache_miss, (name, way)


def test_every_file_of_a_pair(tmp_path):
    """Tokens have no checksum in Megatron's format: a changed one is found where it is none of the vocabulary's."""
    (tmp_path / "good").mkdir()
    write_pair(tmp_path / "good" / "x", numbered_documents([10, 20, 30]))
    right = [IndexedDataset(str(tmp_path / "good" / "x"))[i].tolist() for i in range(3)]
    for name, way in harmed(tmp_path / "good", tmp_path / "copy", 60):
        if name.endswith(".bin") and not isinstance(way, str):
            continue
        try:
            data = IndexedDataset(str(tmp_path / "copy" / "x"))
            found = [data[i].tolist() for i in range(len(data))]
        except (DataError, FileNotFoundError) as error:
            assert "x" in str(error)
            continue
        assert found == right and not isinstance(way, str), (name, way)
