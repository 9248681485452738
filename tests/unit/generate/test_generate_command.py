"""The command line: prompts and files in, text and lines of JSON out, and what cannot be in a sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from generate_models import computed, directory_of, prompts

from parallel_core.generate.arguments import unescaped
from parallel_core.generate.command import main


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return str(directory_of("llama", tmp_path_factory.mktemp("models")))


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_answers(load, tmp_path, capsys) -> None:
    first, second = prompts("llama", 12, 12)
    asked = [
        {"tokens": first, "id": "one"},
        {"tokens": second, "max_new_tokens": 3, "logprobs": 1, "prompt_logprobs": True},
        {"tokens": second, "temperature": 0.9, "seed": 4, "n": 2, "max_new_tokens": 2},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)) + "\n\n")
    words = ["--load", load, "--prompts-file", str(tmp_path / "in.jsonl"), "--ignore-eos"]
    words += ["--temperature", "0", "--max-new-tokens", "24"]
    assert main([*words, "--output", str(tmp_path / "out.jsonl")]) == 0
    got, greedy = lines_of(tmp_path / "out.jsonl"), computed("llama")["greedy"]
    assert [line["id"] for line in got] == ["one", 1, 2, 2] and [line.get("sample") for line in got[2:]] == [0, 1]
    assert got[0] == {
        "id": "one", "text": "", "tokens": greedy[0].tolist(), "logprobs": None, "finish_reason": "length",
        "prompt_tokens": 12,
    }  # fmt: skip
    assert got[1]["tokens"] == greedy[1, :3].tolist() and len(got[1]["prompt_logprobs"]) == 12
    for token, logprob, ((best, highest),) in zip(got[1]["tokens"], got[1]["logprobs"], got[1]["top_logprobs"]):
        assert (token, logprob) == (best, highest)
    assert main(words) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == got


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "give --prompt TEXT or --prompts-file FILE"),
        ("--prompt a --context-parallel-size 2", "--context-parallel-size 2: .* any layout loads any layout"),
        ("--prompt a --virtual-pipeline-model-parallel-size 2", "any layout loads any layout"),
        ("--prompt a --tensor-model-parallel-size 3", "has 4 attention heads, no multiple of it; give one of 1, 2"),
        ("--prompt a --pipeline-model-parallel-size 9", "the model has 3 layers; give up to 3"),
        ("--prompt a --top-p 7", "top_p=7.0: give a number, above 0, up to 1"),
        ("--prompt a", "a text needs a tokenizer .* knows of no tokenizer"),
        ("--prompts-file /nowhere/f", "No such file"),
        ("--prompt a --prompt b --stream", "--stream prints one answer"),
    ],
)
def test_what_cannot_be_is_refused(load, capsys, words: str, told: str) -> None:
    assert main(["--load", load, *words.split()]) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "in.jsonl:2"),
        ("[1]", "in.jsonl:2: give a JSON object"),
        ('{"prompt": "a", "tokens": [1]}', 'in.jsonl:2: give "prompt"'),
        ('{"tokens": [true]}', 'in.jsonl:2: "tokens" is no list'),
        ('{"tokens": [1], "temprature": 1}', "in.jsonl:2: temprature: no such parameter"),
        ('{"tokens": [1], "seed": -1}', "in.jsonl:2: seed=-1"),
        ('{"tokens": [], "id": "x"}', "prompt x: the prompt is empty"),
    ],
)
def test_a_wrong_line_is_named(load, tmp_path, capsys, line: str, told: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"tokens": [1]}\n' + line + "\n")
    assert main(["--load", load, "--prompts-file", str(tmp_path / "in.jsonl")]) == 2
    assert told in capsys.readouterr().err


def test_signs_in_stop_texts() -> None:
    assert unescaped(r"a\n\t\\n\x" + "\\") == "a\n\t\\n\\x\\"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", ""])
def test_ranks_are_started_and_give_the_same(load, tmp_path, layout: str) -> None:
    asked = [{"tokens": prompt, "seed": 3} for prompt in prompts("llama", 5, 20, 12)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    words = ["--load", load, "--prompts-file", str(tmp_path / "in.jsonl"), "--ignore-eos", "--max-new-tokens", "9"]
    environment = {**os.environ, "NPROC": "2"} if layout else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-m", "parallel_core.generate", *words, *layout.split()],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main([*words, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == lines_of(tmp_path / "out.jsonl")
