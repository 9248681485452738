"""lm-evaluation-harness and the `openai` client, as they are published, against the server and in process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel_core.evaluate.score import logprobs_of, windows_of
from parallel_core.generate.generator import Generator
from parallel_core.generate.requests import SamplingParams
from tests.helpers.letters import chatting_llama

sys.path.insert(0, str(Path(__file__).parent))
from test_server import serving  # noqa: E402

PEER = os.environ.get("PARALLEL_CORE_LM_EVAL_PYTHON", "")
BESIDE_MINDSPORE = os.environ.get("PARALLEL_CORE_LM_EVAL_ADAPTER_PYTHON", "")
pytestmark = pytest.mark.slow
over_http = pytest.mark.skipif(
    not PEER, reason="PARALLEL_CORE_LM_EVAL_PYTHON names no python with lm_eval[api], transformers and openai"
)
ROOT = Path(__file__).resolve().parents[3]
LENGTH = 256
TEXTS = ["Once upon a time there was a tiny model of letters. " * n for n in (1, 3, 7)]
CHOICES = [{"q": f"The number after {i} is", "c": [f" {i + 1}", f" {i - 1}", " none"], "a": i % 3} for i in range(4)]
CHOICES.append({"q": "x" * 250, "c": [" long enough to be cut", " b", " c"], "a": 0})
QUESTIONS = [{"q": f"Say {i}", "a": "x"} for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model, and the harness's tasks beside it."""
    root = tmp_path_factory.mktemp("clients")
    chatting_llama(root)
    kinds = {
        "choice": (CHOICES, 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\n'
                   'doc_to_target: "{{a}}"\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n'),
        "roll": ([{"text": text} for text in TEXTS], 'output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
                 'doc_to_target: "{{text}}"\nmetric_list:\n  - metric: bits_per_byte\n'),
        "gen": (QUESTIONS, 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
                'generation_kwargs:\n  until: ["Q"]\n  max_gen_toks: 12\n  do_sample: false\n'
                "metric_list:\n  - metric: exact_match\n"),
    }  # fmt: skip
    (root / "tasks").mkdir()
    for name, (lines, task) in kinds.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        head = f"task: own_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {root}/{name}.jsonl\n"
        (root / "tasks" / f"{name}.yaml").write_text(f"{head}test_split: test\n{task}")
    return root


@pytest.fixture(scope="module")
def it(folder):
    return Generator(folder / "llama")


@pytest.fixture(scope="module")
def port(folder):
    with serving(folder / "llama", "--max-batch-size", "4") as (port, _):
        yield port


def run(*words: str, python: str = PEER) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if python != PEER:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([python, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def harness(folder: Path, model: str, words: str, tasks: str = "own_choice,own_roll,own_gen", *more: str) -> dict:
    """Return what the harness was answered, by task and document."""
    out = folder / f"out_{abs(hash((model, words)))}"
    run("-m", "lm_eval", "--model", model, "--model_args", words, "--tasks", tasks, "--include_path",
        str(folder / "tasks"), "--log_samples", "--output_path", str(out), *more)  # fmt: skip
    found: dict[str, list] = {}
    for file in sorted(out.rglob("samples_*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        name = re.search(r"samples_(own_\w+?)_\d", file.name)[1]
        found[name] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return found


def scores(it: Generator, first: int, longest: int) -> dict[str, list]:
    """Return what `score` says of the same; `first` stands before a text, `longest` is a window's length."""
    choices = []
    for one in CHOICES:
        pairs = [(it.tokens_of(one["q"]), it.tokens_of(text)) for text in one["c"]]
        rows = [[*question, *answer][-longest:] for question, answer in pairs]
        found = [
            logprobs[-len(answer) :] for (_, answer), logprobs in zip(pairs, logprobs_of(it, rows, num_top=1))
        ]
        choices.append([(sum(x.logprob for x in own), all(x.top[0][0] == x.token for x in own)) for own in found])
    rolls = []
    for text in TEXTS:
        windows = list(windows_of([first, *it.tokens_of(text)], longest, longest - 1))
        found = logprobs_of(it, [window.tokens for window in windows])
        rolls.append(sum(x.logprob for w, row in zip(windows, found) for x in row[w.first - 1 :]))
    params = SamplingParams(max_new_tokens=12, temperature=0, stop=("Q",))
    answers = [answer.text for answer in it.generate([one["q"] for one in QUESTIONS], params)]
    return {"own_choice": choices, "own_roll": rolls, "own_gen": answers}


@over_http
@pytest.mark.parametrize("words", ["tokenizer={folder}/llama", "tokenizer_backend=remote,num_concurrent=4"])
def test_the_harness_hears_from_the_server_what_score_says(folder, port, it, words):
    base = f"base_url=http://127.0.0.1:{port}/v1/completions,model=llama,max_length={LENGTH}"
    found = harness(folder, "local-completions", f"{base},{words.format(folder=folder)}")
    want = scores(it, first=1, longest=LENGTH - 1)  # the harness leaves a place for the token it has to ask for
    for answers, expected in zip(found["own_choice"], want["own_choice"], strict=True):
        for ((value, greedy),), (logprob, likeliest) in zip(answers, expected, strict=True):
            assert float(value) == pytest.approx(logprob, abs=1e-4) and greedy == str(likeliest)
    for ((value,),), expected in zip(found["own_roll"], want["own_roll"], strict=True):
        assert float(value) == pytest.approx(expected, rel=1e-6)
    assert [answer for ((answer,),) in found["own_gen"]] == want["own_gen"]


@over_http
def test_the_harness_chats(folder, port, it):
    base = f"base_url=http://127.0.0.1:{port}/v1/chat/completions,model=llama,max_length={LENGTH}"
    found = harness(folder, "local-chat-completions", base, "own_gen", "--apply_chat_template")
    params = SamplingParams(max_new_tokens=12, temperature=0, stop=("Q",))
    prompts = [f"user: {one['q']}\nassistant: " for one in QUESTIONS]
    assert [answer for ((answer,),) in found["own_gen"]] == [one.text for one in it.generate(prompts, params)]


@pytest.mark.skipif(
    not BESIDE_MINDSPORE, reason="PARALLEL_CORE_LM_EVAL_ADAPTER_PYTHON names no python with lm_eval and MindSpore"
)
def test_the_adapter_in_process_says_what_score_says(folder, it):
    script = ROOT / "tools" / "lm_eval_adapter.py"
    tasks = ("--tasks", "own_choice,own_roll,own_gen", "--include-path", str(folder / "tasks"))
    found = json.loads(run(str(script), "--load", str(folder / "llama"), *tasks, python=BESIDE_MINDSPORE))
    want = scores(it, first=1, longest=LENGTH)
    best = [max(range(3), key=lambda i, row=row: row[i][0]) for row in want["own_choice"]]
    right = [choice == one["a"] for choice, one in zip(best, CHOICES)]
    assert found["own_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    bits = -sum(want["own_roll"]) / sum(map(len, TEXTS)) / 0.6931471805599453
    assert found["own_roll"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-9)


OPENAI = """
import json, sys
import openai
client = openai.OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="any", max_retries=0)
told = {"models": [m.id for m in client.models.list()]}
one = client.completions.create(model="llama", prompt="Once", max_tokens=8, temperature=0, logprobs=2, echo=True)
told["completion"] = [one.choices[0].text, one.choices[0].finish_reason, one.usage.total_tokens]
told["offsets"] = [len(getattr(one.choices[0].logprobs, name)) for name in ("tokens", "token_logprobs", "top_logprobs")]
stream = client.completions.create(model="llama", prompt="Once", max_tokens=8, temperature=0, stream=True,
                                   stream_options={"include_usage": True})
pieces = list(stream)
told["streamed"] = "".join(p.choices[0].text for p in pieces if p.choices)
told["usage"] = pieces[-1].usage.completion_tokens
messages = [{"role": "user", "content": "Say 1"}]
chat = client.chat.completions.create(model="llama", messages=messages, max_completion_tokens=8, temperature=0,
                                      logprobs=True, top_logprobs=3, n=2, seed=3)
told["chat"] = [c.message.content for c in chat.choices]
told["top"] = [len(t.top_logprobs) for t in chat.choices[0].logprobs.content]
told["chat_streamed"] = "".join(
    p.choices[0].delta.content or ""
    for p in client.chat.completions.create(model="llama", messages=messages, max_tokens=8, temperature=0, stream=True)
)
for name, call in {
    "too long": lambda: client.completions.create(model="llama", prompt="x" * 999, max_tokens=8),
    "wrong type": lambda: client.completions.create(model="llama", prompt="x", max_tokens="many"),
}.items():
    try:
        call()
    except openai.BadRequestError as error:
        told[name] = error.status_code
print(json.dumps(told))
"""


@over_http
def test_the_openai_client_is_answered(folder, port, it):
    told = json.loads(run("-c", OPENAI, str(port)))
    params = SamplingParams(max_new_tokens=8, temperature=0)
    plain, chat = (one.text for one in it.generate(["Once", "user: Say 1\nassistant: "], params))
    assert told["models"] == ["llama"]
    assert told["completion"] == ["Once" + plain, "length", 12] and told["offsets"] == [12, 12, 12]
    assert told["streamed"] == plain and told["usage"] == 8
    assert told["chat"] == [chat, chat] and told["top"] == [3] * 8 and told["chat_streamed"] == chat
    assert told["too long"] == told["wrong type"] == 400
