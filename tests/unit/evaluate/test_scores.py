"""Log-probabilities of given text against the logits of `transformers`, windows, perplexity, choices."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from parallel_core.errors import ConfigError
from parallel_core.evaluate import c3, perplexity
from parallel_core.evaluate.score import likelihoods, logprobs_of, windows_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "generate"))
from generate_models import computed, generator, prompts  # noqa: E402


class Letters:
    """A tokenizer of a letter a token; ids above 300 are signs of its own."""

    eod, pad = 2, 3

    def tokenize(self, text: str) -> list[int]:
        return [4 + ord(c) % 300 for c in text]

    def detokenize(self, tokens) -> str:
        return "".join(map(chr, tokens))


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    made = generator("llama", tmp_path_factory.mktemp("models"), max_length=200)
    made.tokenizer = Letters()
    return made


def test_log_probabilities_are_those_of_transformers(it) -> None:
    values, tokens = computed("llama"), prompts("llama", 48, 48)
    logits = values["logits"].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, found, expected in zip(tokens, logprobs_of(it, tokens, num_top=3), want):
        for place, at in zip(values["positions"], expected):
            if place + 1 < len(row):
                entry = found[place]
                assert entry.token == row[place + 1]
                assert entry.logprob == pytest.approx(at[entry.token], abs=1e-5)
                assert [t for t, _ in entry.top] == np.argsort(-at, kind="stable")[:3].tolist()


@pytest.mark.parametrize(("length", "stride"), [(5, 4), (5, 1), (5, 2), (40, 3), (2, 1)])
def test_windows_count_every_token_once(length: int, stride: int) -> None:
    for count in (1, 2, 4, 5, 6, 23):
        tokens = list(range(count))
        windows = list(windows_of(tokens, length, stride))
        assert [t for w in windows for t in w.tokens[w.first :]] == tokens[1:]
        assert all(len(w.tokens) <= length and w.tokens == list(range(w.tokens[0], w.tokens[-1] + 1)) for w in windows)
        assert all(w.first == length - min(stride, len(w.tokens) - w.first) for w in windows[1:])
    with pytest.raises(ConfigError, match="give a stride from 1 to 4"):
        list(windows_of([1, 2], 5, 5))


def test_perplexity_of_documents_and_of_one_text(it, tmp_path) -> None:
    documents = ["one text of some length", "two", "", "three is longer than two, but not by much"]
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    assert perplexity.read_documents(tmp_path / "f.jsonl") == documents
    got = perplexity.perplexity(it, documents)
    rows = [[2, *it.tokenizer.tokenize(d)] for d in documents]
    alone = [[x.logprob for x in logprobs_of(it, [row])[0]] for row in rows]
    every = [x for row in alone for x in row]
    assert got["tokens"] == len(every) == sum(map(len, documents)) and got["documents"] == 4
    assert got["perplexity"] == pytest.approx(math.exp(-sum(every) / len(every)))
    assert got["mean_document_perplexity"] == pytest.approx(np.mean([math.exp(-np.mean(x)) for x in alone if x]))
    assert got["bits_per_byte"] == pytest.approx(-sum(every) / math.log(2) / sum(map(len, documents)))
    stream = [t for row in rows for t in row]
    rolling = perplexity.perplexity(it, documents, rolling=True)
    want = [x.logprob for x in logprobs_of(it, [stream])[0]]
    assert rolling["perplexity"] == pytest.approx(math.exp(-np.mean(want))) and rolling["tokens"] == len(stream) - 1
    cut = likelihoods(it, [stream * 4], stride=50)[0]
    assert cut.tokens == len(stream) * 4 - 1
    with pytest.raises(ConfigError, match="a stride of 0: give a stride from 1"):
        perplexity.perplexity(it, documents, stride=0)


def test_choices_are_scored_by_the_dialogue_after_them(it, tmp_path) -> None:
    data = [
        [["甲：你好。", "乙：再见。"], [{"question": "谁先？", "choice": ["甲", "乙", "丙"], "answer": "乙"}], "1"],
        [["男：走。"], [{"question": "做什么？", "choice": ["走", "坐"], "answer": "走"},
                        {"question": "谁？", "choice": ["男", "女"], "answer": "女"}], "2"],
    ]  # fmt: skip
    (tmp_path / "c3.json").write_text(json.dumps(data), encoding="utf-8")
    questions = c3.read_questions(tmp_path / "c3.json")
    assert [q.answer for q in questions] == [1, 0, 1] and questions[0].context == "甲：你好。乙：再见。"
    right = 0
    for question in questions:
        scores = []
        for choice in question.choices:
            head = f"问：{question.question}\n答：{choice}\n该答案来自对话："
            row = [*it.tokenizer.tokenize(head + question.context), 3]
            logprobs = [x.logprob for x in logprobs_of(it, [row])[0]]
            # The dialogue's first token is given by the one before it and is not counted; the padding's is.
            scores.append(-sum(logprobs[len(head) :]) / 1024)
            assert len(logprobs[len(head) :]) == len(question.context)
        np.testing.assert_allclose(c3.scores_of(it, question), scores, rtol=1e-6)
        right += int(np.argmin(scores)) == question.answer
    assert c3.evaluate(it, questions) == {"top1_acc": right / 3, "questions": 3}


OTHER = ["{", "[1]", "[]", '[[["a"], [{"question": "b", "choice": ["c"], "answer": "d"}], 1]]']


@pytest.mark.parametrize("text", OTHER)
def test_other_files_are_refused(tmp_path, text: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ConfigError, match="f.json"):
        c3.read_questions(tmp_path / "f.json")
    with pytest.raises(ConfigError, match="f.json"):
        perplexity.read_documents(tmp_path / "f.json", "body")
