from __future__ import annotations

import re

import numpy as np

from parallel_core.data import bundled_tokenizer_model
from parallel_core.data.__main__ import main
from parallel_core.data.inspection import length_histogram
from tests.unit.data.helpers import write_pair


def test_files_and_batches_are_shown(pair, capsys):
    arguments = ["inspect", pair, "--seq-length", "8", "--split", "1,0,0", "--batches", "1"]
    arguments += ["--data-parallel-size", "2"]
    assert main([*arguments, "--micro-batch-size", "2", "--consumed-samples", "4"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"documents +40\n", output) and "stored as int32" in output
    assert "data parallel rank 0, micro-batch 0: samples [4, 5]" in output
    assert "data parallel rank 1, micro-batch 0: samples [6, 7]" in output
    assert re.search(r"x 1 epochs = \d+ samples", output) and re.search(r"data order: [0-9a-f]{64}", output)
    assert main([*arguments, "--dataloader-type", "cyclic", "--no-data-sharding"]) == 0


def test_text_is_decoded_and_ids_outside_are_counted(tmp_path, capsys):
    prefix = write_pair(tmp_path / "x", [[1178, 380, 2048], [267, 6]])
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", bundled_tokenizer_model()]
    assert main(["inspect", prefix, *tokenizer, "--documents", "0"]) == 0
    assert "WARNING: 1 ids are not in the vocabulary of 2048" in capsys.readouterr().out
    prefix = write_pair(tmp_path / "y", [[1178, 380, 6]])
    assert main(["inspect", prefix, *tokenizer, "--legacy-tokenizer"]) == 0
    output = capsys.readouterr().out
    assert "all ids are in the vocabulary" in output and "It is<EOD>" in output


def test_empty_pairs_and_mistakes(tmp_path, capsys):
    assert main(["inspect", write_pair(tmp_path / "empty", [])]) == 0
    assert main(["inspect", str(tmp_path / "missing")]) == 1
    assert "DataError: data path" in capsys.readouterr().err


def test_histogram_bins_are_powers_of_two():
    counts = [line.split()[:2] for line in length_histogram(np.array([0, 1, 1, 2, 3, 4, 1023, 1024]))]
    assert counts[:4] == [["0", "1"], ["1", "2"], ["2-3", "2"], ["4-7", "1"]]
    assert counts[-2:] == [["512-1,023", "1"], ["1,024-2,047", "1"]]
