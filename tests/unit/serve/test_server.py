"""The server as clients see it: a process of its own, asked over HTTP."""

from __future__ import annotations

import concurrent.futures
import http.client
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, TensorShard
from parallel_core.config import load_config
from parallel_core.generate.generator import Generator
from parallel_core.generate.requests import SamplingParams
from parallel_core.layout.shard import shard_of
from parallel_core.training.checkpointing import stored_settings
from parallel_core.transformer import GPTModel, ModelStage

MISSING = [name for name in ("starlette", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: pip install 'parallel_core[serve]'")

WORDS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 96 --micro-batch-size 1 "
    "--position-embedding-type rope --init-method-std 0.3 --train-iters 1 --lr 0.1"
)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A native checkpoint of random weights, with the bundled tokenizer and a chat template."""
    root, config = tmp_path_factory.mktemp("served"), load_config(WORDS.split()).config
    writer = CheckpointWriter(root, 1, 0, 1)
    writer.begin()
    model = GPTModel(ModelStage(config.model_config))
    shards = {}
    for parameter in model.trainable_params():
        name = shard_of(parameter).name
        shards[name] = (TensorShard.full(name, parameter.shape, "float32"), parameter.asnumpy())
    told = {"iteration": 1, "model_config": stored_settings(config), "config": config.to_dict()}
    path = writer.commit([writer.write_rank_file(shards)], told)
    (Path(path) / "chat_template.jinja").write_text(TEMPLATE)
    return root


@contextmanager
def serving(folder: Path, *words: str, **variables: str):
    """Give the port of a server, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "parallel_core.serve", "--load", str(folder), "--port", str(port), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **variables}
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            try:
                if ask(port, "GET", "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        yield port, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()


def ask(port: int, method: str, path: str, body=None, headers=None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def told(port: int, path: str, body, method: str = "POST") -> dict:
    status, text = ask(port, method, path, body)
    assert status == 200, text
    return json.loads(text)


@pytest.fixture(scope="module")
def port(folder):
    with serving(folder, "--max-batch-size", "4", "--max-queue", "30", "--max-new-tokens", "6") as (port, _):
        yield port


@pytest.fixture(scope="module")
def local(folder):
    """The same model in this process."""
    return Generator(folder, max_batch_size=4)


def greedy(local, prompt, count: int = 8):
    return local.generate(prompt, SamplingParams(max_new_tokens=count, temperature=0))[0]


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- OpenAI's -------------------------------------------------------------------------------------------------------
def test_completions(port, local) -> None:
    answer = told(port, "/v1/completions", {"model": "x", "prompt": "It is a truth", **GREEDY})
    want = greedy(local, "It is a truth")
    assert answer["choices"] == [{"index": 0, "text": want.text, "logprobs": None, "finish_reason": "length"}]
    assert answer["object"] == "text_completion" and answer["usage"] == {
        "prompt_tokens": want.prompt_tokens, "completion_tokens": 8, "total_tokens": want.prompt_tokens + 8,
    }  # fmt: skip
    several = told(port, "/v1/completions", {"prompt": ["It is", "a truth"], "n": 2, "seed": 3, "max_tokens": 5})
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    params = SamplingParams(max_new_tokens=5, n=2, seed=3)
    assert [c["text"] for c in several["choices"]] == [c.text for c in local.generate(["It is", "a truth"], params)]


def test_scoring_as_lm_evaluation_harness_asks(port, local) -> None:
    """Prompts come back with an entry a token, None first, the generated one last; top holds the best token."""
    rows = [local.tokens_of(text) for text in ("It is a truth universally", "acknowledged")]
    body = {"model": "x", "prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = told(port, "/v1/completions", body)["choices"]
    for row, choice in zip(rows, sorted(choices, key=lambda c: c["index"])):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(found["tokens"]) == len(row) + 1
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        want = local.generate([row], SamplingParams(max_new_tokens=1, temperature=0, logprobs=1, prompt_logprobs=True))
        entries = [*want[0].prompt_logprobs, *want[0].logprobs]
        np.testing.assert_allclose(found["token_logprobs"][1:], [x.logprob for x in entries], atol=1e-9)
        for value, top, entry in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], entries):
            assert (value == max(top.values())) == (entry.top[0][0] == entry.token)
    only = told(port, "/v1/completions", {**body, "max_tokens": 0})["choices"][0]
    assert len(only["logprobs"]["tokens"]) == len(rows[0]) and only["text"] == "It is a truth universally"


@pytest.mark.parametrize("echo", [False, True])
def test_streams(port, local, echo: bool) -> None:
    body = {"prompt": "It is", **GREEDY, "stream": True, "stream_options": {"include_usage": True}, "echo": echo}
    status, text = ask(port, "POST", "/v1/completions", body)
    *parts, last = events(text)
    whole = "".join(part["choices"][0]["text"] for part in parts)
    assert status == 200 and whole == ("It is" if echo else "") + greedy(local, "It is").text
    assert [p["choices"][0]["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8 and all(p["usage"] is None for p in parts)


def test_stop_texts_are_neither_shown_nor_streamed(port, local) -> None:
    text = greedy(local, "It is", 12).text
    stop = text[4:7]
    for stream in (False, True):
        body = {"prompt": "It is", "temperature": 0, "max_tokens": 12, "stop": [stop], "stream": stream}
        _, answer = ask(port, "POST", "/v1/completions", body)
        parts = [part["choices"][0] for part in (events(answer) if stream else [json.loads(answer)])]
        assert "".join(p["text"] for p in parts) == text[: text.find(stop)] and parts[-1]["finish_reason"] == "stop"


def test_chat(port, local) -> None:
    parts = [{"type": "text", "text": "hi"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    want = greedy(local, "system: be brief\nuser: hi\nassistant: ")
    body = {"messages": messages, **GREEDY, "logprobs": True, "top_logprobs": 2}
    answer = told(port, "/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text} and answer["object"] == "chat.completion"
    assert len(choice["logprobs"]["content"]) == 8 and len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    _, text = ask(port, "POST", "/v1/chat/completions", {**body, "stream": True, "logprobs": False, "top_logprobs": 0})
    deltas = [part["choices"][0]["delta"] for part in events(text)]
    assert deltas[0]["role"] == "assistant" and "".join(d.get("content", "") for d in deltas) == want.text


def test_models_and_tokens(port, local) -> None:
    (model,) = told(port, "/v1/models", None, "GET")["data"]
    assert model["object"] == "model" and model["max_model_len"] == 96
    tokens = told(port, "/tokenize", {"prompt": "It is a truth"})
    assert tokens["tokens"] == local.tokens_of("It is a truth") and tokens["count"] == len(tokens["tokens"])
    assert told(port, "/detokenize", {"tokens": tokens["tokens"]})["prompt"] == "It is a truth"
    assert set(told(port, "/tokenizer_info", None, "GET")) == {"eos_token", "bos_token", "pad_token", "chat_template"}


# ---- others' --------------------------------------------------------------------------------------------------------
def test_megatron(port, local) -> None:
    body = {"prompts": ["It is", "a truth"], "tokens_to_generate": 4, "top_k": 1, "logprobs": True}
    answer = told(port, "/api", body, "PUT")
    for i, prompt in enumerate(body["prompts"]):
        want = local.generate(prompt, SamplingParams(max_new_tokens=4, temperature=0))[0]
        assert answer["text"][i] == prompt + want.text and answer["tokens"][i][-4:] == want.tokens
        assert len(answer["logprobs"][i]) == len(answer["tokens"][i]) - 1 == len(answer["segments"][i]) - 1
    scored = told(port, "/api", {"prompts": ["It is a truth"], "tokens_to_generate": 0, "logprobs": True}, "PUT")
    assert scored["text"] == ["It is a truth"] and len(scored["logprobs"][0]) == len(scored["tokens"][0]) - 1
    unasked = [{"prompts": []}, {"prompts": [""]}, {"prompts": "a"}, {"prompts": ["a"], "tokens_to_generate": 0}]
    for wrong in (*unasked, {**body, "beam_width": 2}, {**body, "max_len": 3}):
        assert ask(port, "PUT", "/api", wrong)[0] == 400


def test_pangus_page_query_and_route(port) -> None:
    status, page = ask(port, "GET", "/")
    assert status == 200 and "生成" in page
    answer = told(port, "/query?u=It%20is", None, "GET")
    assert answer["ok"] and answer["rsvp"].startswith("It is")
    body = {"instances": [{"input_sentence": "It is", "max_generate_length": 3}]}
    (one,) = told(port, "/model/pangu/version/0:predict", body)["instances"]
    assert one["output_sentence"].startswith("It is")
    body = {"instances": [{"input_sentence": "It is a truth", "prompt": "It", "return_scores": True}]}
    assert told(port, "/model/pangu:predict", body)["instances"][0]["output_sentence"] > 0
    assert "error_msg" in ask(port, "POST", "/model/pangu:predict", {"instances": 3})[1]


# ---- what cannot be -------------------------------------------------------------------------------------------------
WRONG = [
    (b"{", 400, "the body is damaged"),
    (b'{"prompt": "\xff"}', 400, "the body"),
    (b"[]", 400, "send a JSON object"),
    (b"[" * 100_000, 400, "the body"),
    ({"prompt": 3}, 400, "prompt is 3; send a text or a list"),
    ({}, 400, "prompt: send a text"),
    ({"prompt": []}, 400, "prompt: send"),
    ({"prompt": [1, "a"]}, 400, "prompt: send"),
    ({"prompt": "a", "max_tokens": "x"}, 400, "max_tokens is 'x'; send a whole number"),
    ({"prompt": "a", "max_tokens": 10**30}, 400, "beyond 64 bits"),
    ({"prompt": "a", "temperature": True}, 400, "temperature"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature=-1"),
    ({"prompt": "a", "n": 1000}, 400, "n=1000"),
    ({"prompt": "a", "top_q": 1}, 400, "unknown field"),
    ({"prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias"),
    ({"prompt": "a", "stream": "yes"}, 400, "stream"),
    ({"prompt": [999_999]}, 400, "token 999999 does not exist"),
    ({"prompt": "truth " * 200}, 400, "there is room for 96"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0 asks for nothing"),
    ({"prompt": "a" * (2 << 20)}, 413, "larger than 1048576 bytes"),
    ({"prompt": ["a"] * 60}, 429, "over the limit of 34"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG, ids=[m + str(i) for i, (_, _, m) in enumerate(WRONG)])
def test_wrong_requests(port, body, status: int, message: str) -> None:
    got, text = ask(port, "POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert got == status and message in error["message"] and error["type"] == "invalid_request_error"
    assert ask(port, "GET", "/health")[0] == 200


def test_wrong_places(port) -> None:
    assert ask(port, "GET", "/v1/nothing")[0] == 404 and ask(port, "GET", "/v1/completions")[0] == 405
    for messages in (None, [], [1], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        assert ask(port, "POST", "/v1/chat/completions", {"messages": messages})[0] == 400
    assert "calls of tools" in ask(
        port, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}
    )[1]


def metrics(port: int) -> dict[str, float]:
    lines = ask(port, "GET", "/metrics")[1].splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def settled(port: int) -> dict[str, float]:
    """Return the metrics once nothing is held."""
    for _ in range(200):
        found = metrics(port)
        if not found["parallel_core_answers_held"] and not found["parallel_core_answers_running"]:
            return found
        time.sleep(0.05)
    raise AssertionError(f"answers are held that nobody waits for: {found}")


RUBBISH = [
    b"{", b"\xff\xfe", b'{"prompt": "\xc3', {"prompt": None}, {"prompt": "a", "max_tokens": "many"},
    {"prompt": {"a": 1}}, {"prompt": "truth " * 200, "max_tokens": 4}, [1, 2],
]  # fmt: skip
"""Not JSON, not UTF-8, wrong types, and a prompt that is too long."""


def load(port: int, local, clients: int, rounds: int, prompts: list[str]) -> None:
    """Many clients at once: some ask, some go away, some send rubbish; each answer is what it would be alone."""
    want = {prompt: greedy(local, prompt, 10).text for prompt in prompts}

    def client(number: int) -> int:
        rng, answered = random.Random(number), 0
        for _ in range(rounds):
            prompt = rng.choice(prompts)
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 10, "stream": rng.random() < 0.5}
            kind = rng.random()
            if kind < 0.2:  # goes away
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    data = json.dumps({**body, "max_tokens": 60}).encode()
                    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                    if rng.random() < 0.3:
                        connection.sendall((head + data)[:-5])
                        continue
                    connection.sendall(head + data)
                    if rng.random() < 0.5:
                        connection.recv(100)
                continue
            if kind < 0.3:
                assert ask(port, "POST", "/v1/completions", rng.choice(RUBBISH))[0] == 400
                continue
            if kind < 0.32:
                assert ask(port, "POST", "/v1/completions", b"x" * 10_000_000)[0] == 413
                continue
            status, text = ask(port, "POST", "/v1/completions", body)
            if status == 429:
                time.sleep(0.05)
                continue
            assert status == 200, text
            parts = events(text) if body["stream"] else [json.loads(text)]
            assert "".join(p["choices"][0]["text"] for p in parts) == want[prompt]
            answered += 1
        return answered

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answered = sum(pool.map(client, range(clients)))
    assert answered > 0
    found = settled(port)
    assert found["parallel_core_cache_rows_free"] == 4 and ask(port, "GET", "/health")[0] == 200


def test_many_clients_at_once(port, local) -> None:
    load(port, local, 24, 3, ["It is", "a truth universally", "acknowledged, that", "x"])


@pytest.mark.slow
def test_two_hundred_clients(folder, local) -> None:
    with serving(folder, "--max-batch-size", "4", "--max-queue", "400") as (port, _):
        load(port, local, 200, 5, ["It is", "a truth universally", "acknowledged, that", "x", "single man in"])


# ---- starting and ending --------------------------------------------------------------------------------------------
def test_a_key_is_asked_for_and_ctrl_c_ends_it(folder) -> None:
    with serving(folder, "--max-batch-size", "2", PARALLEL_CORE_API_KEY="secret") as (port, process):
        body = {"prompt": "It is", "max_tokens": 90}
        assert ask(port, "POST", "/v1/completions", body)[0] == 401
        assert ask(port, "POST", "/v1/completions", body, {"Authorization": "Bearer wrong"})[0] == 401
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = [
                pool.submit(ask, port, "POST", "/v1/completions", body, {"Authorization": "Bearer secret"})
                for _ in range(3)
            ]
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert {one.result()[0] for one in asked} <= {200, 503}
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port 99999: give 0 to 65535"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7"),
        (["--context-parallel-size", "2"], "any layout loads any layout"),
    ],
)
def test_what_cannot_be_served_is_refused(folder, capsys, words: list[str], message: str) -> None:
    from parallel_core.serve.command import main

    assert main(["--load", str(folder), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", ""])
def test_ranks_serve_and_end_together(folder, local, layout: str) -> None:
    variables = {"NPROC": "2"}
    with serving(folder, "--max-batch-size", "4", *layout.split(), **variables) as (port, process):
        load(port, local, 8, 2, ["It is", "a truth universally"]) if layout else None
        answer = told(port, "/v1/completions", {"prompt": ["It is", "a truth"], **GREEDY})
        assert [c["text"] for c in answer["choices"]] == [greedy(local, p).text for p in ("It is", "a truth")]
        time.sleep(2.5)  # a few of the idle ranks' ticks
        assert ask(port, "GET", "/health")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@pytest.mark.slow
def test_a_dead_rank_turns_health_red_and_ends_the_job(folder) -> None:
    with serving(folder, "--tensor-model-parallel-size", "2") as (port, process):
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        ranks = [int(p) for p in listed.stdout.split()]
        victims = [p for p in ranks if b"RANK_ID=1" in Path(f"/proc/{p}/environ").read_bytes()]
        os.kill(victims[0], signal.SIGKILL)
        seen = set()
        while process.poll() is None:
            try:
                seen.add(ask(port, "GET", "/health")[0])
            except OSError:
                time.sleep(0.02)
        assert process.wait(60) != 0 and 503 in seen
