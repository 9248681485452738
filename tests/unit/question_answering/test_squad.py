"""SQuAD v1.1: windows, answers and scores are those of `transformers`, frozen here; eight paragraphs are learned."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parallel_core.checkpoint.huggingface.bert import BERT_CLASSES
from parallel_core.convert.cli import main as convert
from parallel_core.data.squad import Question, SpanDataset, as_arrays, features_of, read_squad, words_of
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import CheckpointError, ConfigError, DataError
from parallel_core.launch.report import LOG_DIR_VARIABLE
from parallel_core.question_answering.answerer import Answerer, split_input
from parallel_core.question_answering.answers import best_answers, exact_match, f1, score
from parallel_core.question_answering.command import main
from tests.helpers.launching import launcher_environment

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "squad"
FROZEN = np.load(GOLDEN / "features.npz")
LOGITS = np.stack([FROZEN["start_logits"], FROZEN["end_logits"]], -1)
NBEST = json.loads((GOLDEN / "nbest.json").read_text())["nbest"]
QUESTIONS = read_squad(GOLDEN / "made_up.json")
SIZES = {"seq_length": 64, "doc_stride": 24, "max_query_length": 10}
TOKENIZER = BertWordPieceTokenizer(str(GOLDEN / "vocab.txt"))


@pytest.mark.parametrize("training", [True, False])
def test_features_are_those_of_transformers(training):
    features = features_of(QUESTIONS, TOKENIZER, **SIZES, training=training)
    batch = as_arrays(features, 64, 0)
    np.testing.assert_array_equal(batch["tokens"], FROZEN["ids"])
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), FROZEN["length"])
    np.testing.assert_array_equal(batch["tokentype_ids"].argmax(1), FROZEN["second"])
    for name in ("start", "end"):
        wanted = FROZEN[name] if training else np.zeros_like(FROZEN[name])
        np.testing.assert_array_equal(batch[f"{name}_positions"], wanted)
    for row, feature in enumerate(features):
        there = slice(feature.first, feature.first + len(feature.words))
        np.testing.assert_array_equal(FROZEN["word"][row, there], feature.words)
        np.testing.assert_array_equal(FROZEN["max_context"][row, there], feature.max_context)
        assert (FROZEN["word"][row] >= 0).sum() == len(feature.words) and FROZEN["example"][row] == feature.question


def test_answers_and_their_scores_are_those_of_transformers():
    features = features_of(QUESTIONS, TOKENIZER, **SIZES)
    texts = {}
    for number, question in enumerate(QUESTIONS):
        mine = [i for i, feature in enumerate(features) if feature.question == number]
        answers = best_answers(question, [features[i] for i in mine], LOGITS[mine], TOKENIZER)
        for answer, (text, probability) in zip(answers, NBEST[question.name]):
            assert " ".join(answer.text.split()) == text and answer.text == question.context[answer.start : answer.end]
            assert answer.probability == pytest.approx(probability, abs=1e-6)
        assert sum(answer.probability for answer in answers) == pytest.approx(1.0)
        texts[question.name] = answers[0].text
    assert score(QUESTIONS, texts) == pytest.approx({"exact_match": 0.0, "f1": 1.5840220385674932})


PAIRS = [
    ("The Ida Thorne!", "ida thorne", 1.0, 1.0), ("a drum", "drum", 1.0, 1.0), ("drum beats", "drum", 0.0, 2 / 3),
    ("", "the", 1.0, 0.0), ("bell bell", "bell", 0.0, 2 / 3), ("31 km", "40 miles", 0.0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "right", "exact", "common"), PAIRS)
def test_the_official_measures(text, right, exact, common):
    assert exact_match(text, right) == exact and f1(text, right) == pytest.approx(common)


def test_the_best_of_several_right_answers_counts_and_a_missing_one_scores_nothing():
    questions = [Question("a", "?", "x y", (("x y", 0), ("x", 0))), Question("b", "?", "x y", (("y", 2),))]
    assert score(questions, {"a": "x"}) == {"exact_match": 50.0, "f1": 50.0}


def test_offsets_hold_with_any_white_space_and_hyphens():
    """Words part at spaces, tabs and line ends; text == context[start:end] whatever stands between them."""
    context = "My  name is\n\u00c9lise-Anne  Brandt,\tand I live in Berlin."
    question = Question("a", "Where do I live?", context)
    (feature,) = features_of([question], TOKENIZER, **SIZES)
    words = [context[a:b] for a, b in words_of(context).spans]
    assert words == context.split()
    for first, last, wanted in ((3, 4, "\u00c9lise-Anne  Brandt"), (9, 9, "Berlin")):
        at = [i + feature.first for i, word in enumerate(feature.words) if first <= word <= last]
        logits = np.full((64, 2), -20.0, np.float32)
        logits[at[0], 0] = logits[at[-2], 1] = 20.0  # the last piece is a comma or a point
        (best, *_) = best_answers(question, [feature], [logits], TOKENIZER)
        assert best.text == wanted == context[best.start : best.end] and best.as_dict()["score"] == 1.0
    (empty,) = best_answers(Question("b", "?", " \n"), [], [], TOKENIZER)
    assert (empty.text, empty.start, empty.end) == ("", 0, 0)


def test_an_answer_that_does_not_stand_there_is_left_out_in_training():
    questions = [Question("a", "?", "one two", (("two", 0),)), Question("b", "?", "one two", (("two", 4),))]
    (feature,) = features_of(questions, TOKENIZER, **SIZES, training=True)
    assert feature.question == 1 and feature.start > 0


@pytest.mark.parametrize(
    ("content", "told"),
    [("{}", "no SQuAD v1.1"), ('{"data": []}', "has no questions"), ("[", "JSON"),
     ('{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 1, "question": "q", "answers": '
      '[{"text": "y", "answer_start": 9}]}]}]}]}', "starts outside its context")],
)  # fmt: skip
def test_another_file_is_told(tmp_path, content, told):
    (tmp_path / "train-v1.1.json").write_text(content)
    with pytest.raises(DataError, match=told):
        read_squad(tmp_path)


def test_windows_without_room_are_refused():
    with pytest.raises(ConfigError, match="leaves windows of 11 pieces; doc_stride=24"):
        features_of(QUESTIONS, TOKENIZER, seq_length=24, doc_stride=24, max_query_length=10)


def test_every_epoch_has_every_window_in_another_order():
    features = features_of(QUESTIONS, TOKENIZER, **SIZES, training=True)
    dataset = SpanDataset(features, 180, 64, 0, 7)
    epochs = [[dataset[88 * epoch + i]["tokens"].tobytes() for i in range(88)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert dataset[3]["tokens"].tobytes() == epochs[0][3] and len(dataset) == 180


@pytest.mark.parametrize("text", ["no question", " - a", "a - ", {"context": "a"}])
def test_what_is_no_question_is_told(text):
    with pytest.raises(ConfigError):
        split_input(text)


def test_an_input_is_cut_at_its_last_dash():
    question = split_input("A night train - blue-green - leaves. - When?")
    assert (question.context, question.text) == ("A night train - blue-green - leaves.", "When?")


# ---- a model that has learned ---------------------------------------------------------------------------------------
WORDS = f"""
    --bert-head question_answering --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128
    --doc-stride 48 --max-query-length 20 --micro-batch-size 8 --hidden-dropout 0 --attention-dropout 0 --lr 1e-3
    --norm-epsilon 1e-12 --lr-decay-style linear --lr-warmup-fraction 0.1 --make-vocab-size-divisible-by 1
    --tokenizer-type BertWordPieceLowerCase --vocab-file {GOLDEN / "vocab.txt"} --eval-iters 0 --log-interval 50
    --num-workers 0 --train-data-path {GOLDEN / "made_up.json"} --init-method-std 0.05
""".split()


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run pretrain_bert.py in this process."""
    spec = importlib.util.spec_from_file_location("pretrain_bert", ROOT / "pretrain_bert.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(folder)
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(folder / "log"))
    with mock.patch.object(sys, "argv", ["pretrain_bert.py", *WORDS, *words]):
        module.main()


@pytest.mark.slow
def test_eight_made_up_paragraphs_are_learned_by_heart(tmp_path, monkeypatch, capsys):
    train(tmp_path, monkeypatch, "--train-iters", "400", "--save", "ck")
    window = ["--seq-length", "128", "--doc-stride", "48", "--max-query-length", "20"]
    data = ["--data", str(GOLDEN / "made_up.json"), "--output", "answers.json"]
    capsys.readouterr()
    assert main(["evaluate", "--load", "ck", *data, *window]) == 0
    assert json.loads(capsys.readouterr().out) == {"exact_match": 100.0, "f1": 100.0}
    assert json.loads((tmp_path / "answers.json").read_text())["q01"] == "Ida Thorne"
    for ranks in (["--data-parallel-size", "2"], ["--tensor-model-parallel-size", "2"]):
        words = ["-m", "parallel_core.question_answering", "evaluate", "--load", "ck", *data[:2], *window, *ranks]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=launcher_environment(
            tmp_path / "ranks", OMP_NUM_THREADS="1"))  # fmt: skip
        assert json.loads(done.stdout) == {"exact_match": 100.0, "f1": 100.0}, done.stderr
    assert convert(["--to", "hf", "--load", "ck", "--save", "hf", "--quiet"]) == 0
    capsys.readouterr()
    asked = f"{QUESTIONS[13].context} - {QUESTIONS[13].text}"
    assert main(["predict", "--load", "hf", asked, "--top-k", "2", *window]) == 0
    (answers,) = json.loads(capsys.readouterr().out)
    assert answers[0]["text"] == QUESTIONS[13].answers[0][0] and len(answers) == 2
    assert answers[0]["text"] == QUESTIONS[13].context[answers[0]["start"] : answers[0]["end"]]
    assert set(answers[0]) == {"text", "score", "start", "end"} and answers[0]["score"] > 0.5


def test_a_head_begins_anew_on_an_encoder_with_another(tmp_path, monkeypatch):
    """--finetune takes the layers of a model with another head; without it, the other head is told."""
    small = ["--train-iters", "1", "--num-layers", "1", "--hidden-size", "16"]
    train(tmp_path, monkeypatch, *small, "--save", "ck")
    assert convert(["--to", "hf", "--load", "ck", "--save", "first", "--quiet"]) == 0
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    head = {name: kind for name, kind in BERT_CLASSES.items() if kind == "encoder"}
    (tmp_path / "first" / "config.json").write_text(json.dumps({**config, "architectures": list(head)}))
    tensors = {name: value for name, value in load_file(tmp_path / "first" / "model.safetensors").items()
               if not name.startswith("qa_outputs")}  # fmt: skip
    pooler = {f"bert.pooler.dense.{kind}": np.zeros(shape, np.float32) for kind, shape in
              (("weight", (16, 16)), ("bias", (16,)))}  # fmt: skip
    save_file({**tensors, **pooler}, tmp_path / "first" / "model.safetensors")
    sizes = ["--train-iters", "1", "--use-checkpoint-args"]  # the sizes are the checkpoint's, the head is the run's
    train(tmp_path, monkeypatch, *sizes, "--load", "first", "--finetune", "--lr", "0", "--save", "second")
    assert convert(["--to", "hf", "--load", "second", "--save", "third", "--quiet"]) == 0
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert set(third) == set(tensors) | {"qa_outputs.weight", "qa_outputs.bias"}
    for name, value in tensors.items():
        np.testing.assert_array_equal(third[name], value, err_msg=name)
    with pytest.raises(CheckpointError, match="bert_head: saved 'encoder', asked 'question_answering'"):
        train(tmp_path, monkeypatch, *small, "--load", "first", "--no-load-optim")


def test_only_a_head_for_answers_answers_and_a_missing_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Answerer.load(tmp_path / "nothing")
    assert main(["predict", "--load", str(tmp_path), "a - b"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
