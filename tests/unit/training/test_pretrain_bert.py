"""pretrain_bert.py: Megatron's arguments, from files of sentences to a model that has learned."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.convert.cli import main as convert
from parallel_core.data import IndexedDatasetBuilder
from parallel_core.launch import train as launcher
from parallel_core.launch.report import LOG_DIR_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
VOCAB = ROOT / "tests" / "golden" / "squad" / "vocab.txt"
WORDS = f"""
    --num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 24 --micro-batch-size 16 --lr 1e-2
    --tokenizer-type BertWordPieceLowerCase --vocab-file {VOCAB} --make-vocab-size-divisible-by 8 --num-workers 0
    --lr-decay-style constant --split 90,10,0 --hidden-dropout 0 --attention-dropout 0 --eval-iters 1 --log-interval 1
    --init-method-std 0.1 --train-iters 40 --save ck
""".split()


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Documents of one word each, which the words that are not masked tell."""
    prefix, rng = str(tmp_path_factory.mktemp("data") / "d"), np.random.default_rng(0)
    with IndexedDatasetBuilder(f"{prefix}.bin", np.uint16) as builder:
        for word in rng.integers(5, 25, 80).tolist():
            builder.add_document(np.full(18, word), [6, 6, 6])
        builder.finalize(f"{prefix}.idx")
    return prefix


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict]:
    """Run the program in this process, and return its metrics."""
    spec = importlib.util.spec_from_file_location("pretrain_bert", ROOT / "pretrain_bert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(folder / "log"))
    with mock.patch.object(sys, "argv", ["pretrain_bert.py", *WORDS, *words]):
        module.main()
    return [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]


def test_a_small_one_learns_words_and_their_order(prefix, tmp_path, monkeypatch):
    rows = run(tmp_path / "both", monkeypatch, "--data-path", prefix)
    steps, evaluations = [row for row in rows if "split" not in row], [row for row in rows if "split" in row]
    assert steps[0]["loss"] > 4 and steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert 0.5 < steps[0]["sop loss"] < 1.0 and evaluations[-1]["loss"] < 0.5 * steps[0]["loss"]
    stored = open_checkpoint(find_checkpoint(str(tmp_path / "both" / "ck"))).common["model_config"]
    assert (stored["bert_head"], stored["hidden_act"], stored["vocab_size"]) == ("pretraining", "gelu", 461)
    there = ["--load", str(tmp_path / "both" / "ck"), "--save", str(tmp_path / "hf"), "--quiet"]
    assert convert(["--to", "hf", *there]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    assert (tmp_path / "hf" / "vocab.txt").read_text() == VOCAB.read_text()
    alone = run(tmp_path / "alone", monkeypatch, "--data-path", prefix, "--bert-no-binary-head", "--train-iters", "2")
    assert "sop loss" not in alone[0]
    stored = open_checkpoint(find_checkpoint(str(tmp_path / "alone" / "ck"))).common["model_config"]
    assert stored["bert_head"] == "masked_lm"


def test_the_script_asks_for_the_head_that_megatrons_arguments_do_not_name():
    with mock.patch.object(launcher, "launch", return_value=0) as start:
        launcher.main(["pretrain_bert.py", "--num-layers", "2", "--bert-no-binary-head"])
        launcher.main(["pretrain_bert.py", "--config", "mine.yaml"])
        launcher.main(["pretrain_bert.py"])
        launcher.main(["pretrain_gpt.py", "--num-layers", "2"])
    words = [call.args[0] for call in start.call_args_list]
    assert words[0][3:6] == ["--bert-head", "pretraining", "--num-layers"]
    assert words[2][1].endswith("configs/bert_tiny.yaml")
    assert not any("--bert-head" in line for line in words[1:])
