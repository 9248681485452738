"""PanGu-alpha in use: prediction, C3 and serving from its own files, against whole passes of the training model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock
from urllib.parse import quote

import numpy as np
import pytest

from parallel_core.data.tokenizer import PanguTokenizer
from parallel_core.evaluate import c3
from parallel_core.evaluate.command import main as evaluate
from parallel_core.generate.command import main as generate
from tests.unit.generate.test_pangu_generation import directory, uncached, vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
from test_server import ask, serving, told  # noqa: E402

TEXT = "问：谁先？\n答：甲乙\n该答案来自对话：甲：你好。乙：再见。男：走。做什么？走坐谁女\n"
C3 = [
    [["甲：你好。", "乙：再见。"], [{"question": "谁先？", "choice": ["甲", "乙", "你"], "answer": "乙"}], "1"],
    [["男：走。"], [{"question": "做什么？", "choice": ["走", "坐"], "answer": "走"},
                    {"question": "谁？", "choice": ["男", "女"], "answer": "女"}], "2"],
]  # fmt: skip


@pytest.fixture(scope="module", params=["norm_before", "norm_after"])
def folder(request, tmp_path_factory) -> Path:
    """A random model with a small vocabulary beside it, as the published one lies beside the slices."""
    made = directory(tmp_path_factory.mktemp(request.param), request.param, positions=96)
    vocabulary(made, TEXT * 30, 60)
    return made


@pytest.fixture(autouse=True)
def letters():
    """Words are letters, in place of jieba's."""
    with mock.patch("parallel_core.data.tokenizer.pangu._jieba", lambda: list):
        yield


def logprobs(folder: Path, row: list[int]) -> np.ndarray:
    """Return those of each token after the first, among the ids that the tokenizer has."""
    known = uncached(folder, row)[:-1, : PanguTokenizer(str(folder / "vocab.model"), list).vocab_size]
    return known[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(known).sum(-1))


def test_c3_is_scored_by_the_dialogue_after_the_answer(folder, tmp_path, capfd):
    """Not its first token, which the prompt's last one predicts; but the padding's after its last one."""
    (tmp_path / "c3-d-dev.json").write_text(json.dumps(C3, ensure_ascii=False), encoding="utf-8")
    seen, scored = [], c3.scores_of
    with mock.patch.object(c3, "scores_of", lambda *args: seen.append(scored(*args)) or seen[-1]):
        assert evaluate(["c3", "--load", str(folder), "--data", str(tmp_path / "c3-d-dev.json")]) == 0
    tokenizer, right = PanguTokenizer(str(folder / "vocab.model"), list), 0
    found = iter(seen)
    for lines, questions, _ in C3:
        for question in questions:
            scores = []
            for choice in question["choice"]:
                head = f"问：{question['question']}\n答：{choice}\n该答案来自对话："
                row = [*tokenizer.tokenize(head + "".join(lines)), 6]
                scores.append(-logprobs(folder, row)[len(tokenizer.tokenize(head)) :].sum() / 1024)
            np.testing.assert_allclose(next(found), scores, rtol=1e-5)
            right += question["choice"][int(np.argmin(scores))] == question["answer"]
    printed = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert printed == {"top1_acc": right / 3, "questions": 3}


def test_prediction_goes_on_as_whole_passes_do(folder, tmp_path, capfd):
    prompt, words = "甲：你好。\n乙：", ["--temperature", "0", "--max-new-tokens", "9", "--ignore-eos"]
    answers = str(tmp_path / "o.jsonl")
    assert generate(["--load", str(folder), "--prompt", prompt, "--output", answers, *words]) == 0
    tokenizer = PanguTokenizer(str(folder / "vocab.model"), list)
    row = tokenizer.tokenize(prompt)
    length = len(row)
    for _ in range(9):
        row.append(int(uncached(folder, row)[-1, : tokenizer.vocab_size].argmax()))
    (line,) = Path(answers).read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["tokens"] == row[length:]
    capfd.readouterr()


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("jieba", "starlette", "uvicorn", "jinja2")),
    reason="no jieba, starlette, uvicorn or jinja2",
)
@pytest.mark.slow
def test_the_page_and_its_query_answer_with_the_model(folder):
    """A reply is text: no marks of pieces in it."""
    with serving(folder, "--max-new-tokens", "5", "--temperature", "0") as (port, _):
        status, page = ask(port, "GET", "/")
        assert status == 200 and "生成" in page
        answer = told(port, f"/query?u={quote('甲：你好。')}", None, "GET")
        assert answer["ok"] and answer["rsvp"].startswith("甲：你好。")
        assert not set("\u2581\u2582\u2583") & set(answer["rsvp"])
        body = {"instances": [{"input_sentence": "甲：你好。", "prompt": "甲：", "return_scores": True}]}
        assert told(port, "/model/pangu/version/0:predict", body)["instances"][0]["output_sentence"] > 0
        assert ask(port, "GET", "/query?u=")[0] == 400
