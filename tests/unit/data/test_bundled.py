from __future__ import annotations

import json
import multiprocessing
import os
import pathlib

import pytest

from parallel_core.data import (
    IndexedDataset,
    build_tokenizer,
    bundled_tokenizer_model,
    prepare_bundled_corpus,
)
from parallel_core.data import bundled as module
from parallel_core.errors import DataError

DATA = pathlib.Path(__file__).parents[3] / "data"


def test_corpus_is_prepared_once_and_losslessly(tmp_path):
    prefix = prepare_bundled_corpus(str(tmp_path))
    made = os.stat(prefix + ".idx").st_mtime_ns
    assert prepare_bundled_corpus(str(tmp_path)) == prefix and os.stat(prefix + ".idx").st_mtime_ns == made
    dataset = IndexedDataset(prefix)
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=bundled_tokenizer_model())
    texts = [json.loads(line)["text"] for line in (DATA / "corpus.jsonl").read_text().splitlines()]
    assert len(dataset) == len(texts) == 426 and dataset.num_tokens == 315145
    for index in range(0, 426, 25):
        tokens = dataset.get(index).tolist()
        assert tokens[-1] == tokenizer.eod and tokenizer.detokenize(tokens[:-1]) == texts[index]


def _prepare(folder, barrier, results):
    barrier.wait()
    prefix = prepare_bundled_corpus(folder)
    results.put(IndexedDataset(prefix).num_tokens)


def test_several_processes_may_prepare_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_prepare, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [315145] * 3
    for process in processes:
        process.join(60)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".lock"]


def test_a_newer_model_makes_it_again(tmp_path):
    prefix = prepare_bundled_corpus(str(tmp_path))
    os.utime(prefix + ".idx", (1, 1))
    prepare_bundled_corpus(str(tmp_path))
    assert os.path.getmtime(prefix + ".idx") > 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache-path"):
        prepare_bundled_corpus(str(tmp_path / "file"))


def test_an_installed_package_without_data_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "shared_folder", lambda: tmp_path)
    with pytest.raises(DataError, match="Restore it, or give --data-path"):
        bundled_tokenizer_model()


def test_the_readme_states_origin_and_licence():
    text = (DATA / "README.md").read_text()
    assert "public domain" in text and "janeaustenr" in text
