"""The engine against `transformers`' greedy continuations, and against the training model without a cache."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from unittest import mock

import numpy as np
import pytest
from generate_models import GOLDEN, computed, directory_of, generator, prompts
from mindspore import Tensor

from parallel_core import ops
from parallel_core.checkpoint import TensorShard, load_shards, open_checkpoint
from parallel_core.config.model_keys import model_of_settings
from parallel_core.convert.cli import main as convert
from parallel_core.generate import engine, stage
from parallel_core.generate.generator import Generator
from parallel_core.generate.layer import CachedLayer
from parallel_core.generate.requests import SamplingParams
from parallel_core.layout.shard import shard_of
from parallel_core.ops import reference
from parallel_core.ops.registry import KERNELS
from parallel_core.transformer import GPTModel, ModelStage
from tests.helpers.ascend_double import on_ascend_double

MODELS = ["gpt2", "llama", "llama_allbias", "qwen3", "mistral_window16"]
"""Learned and rotary positions, tied and not, grouped queries, normed queries, a window."""
SAMPLED = SamplingParams(
    max_new_tokens=16, temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=5,
    logprobs=2, ignore_eos=True,
)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    return request.param, generator(request.param, tmp_path_factory.mktemp("models"), max_batch_size=4)


def uncached_logprobs(path, rows) -> list[np.ndarray]:
    """Return the training model's log-probabilities at every position of each row."""
    source = open_checkpoint(path)
    settings = model_of_settings(source.common["model_config"])
    plain = GPTModel(ModelStage(dataclasses.replace(settings, attention_dropout_rate=0.0, hidden_dropout_rate=0.0)))
    names = [shard_of(p).name for p in plain.trainable_params()]
    shards = {n: TensorShard.full(n, p.shape, "float32") for n, p in zip(names, plain.trainable_params())}
    arrays, _ = load_shards(source, shards, all_keys=names)
    for name, parameter in zip(names, plain.trainable_params()):
        parameter.set_data(Tensor(arrays[name]))
    out = []
    for row in rows:
        logits = plain(Tensor(np.array([row], np.int32))).asnumpy()[0].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        out.append(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))
    return out


def test_greedy_continuations_are_those_of_transformers(model) -> None:
    name, it = model
    greedy = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)
    got = [c.tokens for c in it.generate(prompts(name, 12, 12), greedy)]
    np.testing.assert_array_equal(got, computed(name)["greedy"])


PEER = os.environ.get("PARALLEL_CORE_PEER_PYTHON", "")
GREEDY_OF_TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
path, made, prompts = sys.argv[1], sys.argv[2] == "made", json.loads(sys.argv[3])
torch.manual_seed(0)
if made:
    config = AutoConfig.from_pretrained(path)
    config.initializer_range = 0.2
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
out = []
for prompt in prompts:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(16):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    out.append(ids[len(prompt):])
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason="PARALLEL_CORE_PEER_PYTHON names no python with torch and transformers")
@pytest.mark.parametrize("name", ["qwen2", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_transformers_continues_alike(name: str, tmp_path) -> None:
    made = not (GOLDEN / "experts" / name).exists()
    path = tmp_path / name
    if made:
        path.mkdir()
        shutil.copy(GOLDEN / "configs" / f"{name}.json", path / "config.json")
    else:
        shutil.copytree(GOLDEN / "experts" / name, path)
    asked = [[int(t) for t in np.random.default_rng(n).integers(3, 300, n)] for n in (12, 3, 25)]
    words = [PEER, "-c", GREEDY_OF_TRANSFORMERS, str(path), "made" if made else "", json.dumps(asked)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    greedy = SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True)
    got = [c.tokens for c in Generator(path, max_batch_size=2).generate(asked, greedy)]
    assert got == json.loads(done.stdout.splitlines()[-1])


def test_cached_is_uncached(model) -> None:
    """Prompts in one piece and in chunks, then tokens one by one: every log-probability is the training model's."""
    name, it = model
    asked = prompts(name, 23, 9, 40)
    whole = it.generate(asked, dataclasses.replace(SAMPLED, prompt_logprobs=True))
    with mock.patch.object(engine, "PREFILL_CHUNK", 7):
        chunked = it.generate(asked, dataclasses.replace(SAMPLED, prompt_logprobs=True))
    rows = [[*prompt, *c.tokens] for prompt, c in zip(asked, whole)]
    for want, row, *answers in zip(uncached_logprobs(it.described.path, rows), rows, whole, chunked):
        expected = want[np.arange(len(row) - 1), row[1:]]
        for answer in answers:
            got = [x.logprob for x in (*answer.prompt_logprobs, *answer.logprobs)]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
            for place, entry in enumerate((*answer.prompt_logprobs, *answer.logprobs)):
                best = np.argsort(-want[place], kind="stable")[:2]
                np.testing.assert_allclose([v for _, v in entry.top], want[place][best], rtol=0, atol=1e-5)


def test_a_batch_is_each_alone(model) -> None:
    """To the bit: six prompts over four rows, so that some wait and enter when others leave."""
    name, it = model
    asked = prompts(name, 3, 40, 1, 17, 12, 29)
    each = [dataclasses.replace(SAMPLED, max_new_tokens=n) for n in (20, 3, 9, 1, 14, 30)]
    together = it.generate(asked, each)
    for prompt, params, answer in zip(asked, each, together):
        (alone,) = it.generate([prompt], params)
        assert (alone.tokens, alone.logprobs) == (answer.tokens, answer.logprobs)
    again = it.generate(asked[::-1], each[::-1])[::-1]
    assert [a.tokens for a in again] == [a.tokens for a in together]


def test_layers_in_one_call_are_their_cells_to_the_bit(model) -> None:
    name, it = model
    joined = [cell for _, cell in it.engine._runner._model.cells_and_names() if isinstance(cell, CachedLayer)]
    assert bool(joined) == (name != "qwen3"), "normed queries are the Cells'"
    with mock.patch.object(stage, "join_layers"):
        plain = Generator(it.described.path, max_batch_size=4)
    asked = prompts(name, 3, 40, 17)
    assert [(a.tokens, a.logprobs) for a in plain.generate(asked, SAMPLED)] == [
        (a.tokens, a.logprobs) for a in it.generate(asked, SAMPLED)
    ]


def test_plain_operators_give_the_same(tmp_path) -> None:
    compiled = generator("llama", tmp_path).generate(prompts("llama", 12, 5), SAMPLED)
    plain = generator("llama", tmp_path, kernels="local").generate(prompts("llama", 12, 5), SAMPLED)
    assert [a.tokens for a in plain] == [a.tokens for a in compiled]
    for one, other in zip(plain, compiled):
        np.testing.assert_allclose([x.logprob for x in one.logprobs], [x.logprob for x in other.logprobs], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_operators_of_ascend_give_the_same(name: str, tmp_path) -> None:
    """On the double of the device; keys and values of earlier tokens are the host's there too."""
    with on_ascend_double():
        it = generator(name, tmp_path)
        assert KERNELS["rms_norm"].selected is not reference.rms_norm
        got = it.generate(prompts(name, 12, 5), dataclasses.replace(SAMPLED, temperature=0.0))
    ops.use_kernels("local")
    want = generator(name, tmp_path).generate(prompts(name, 12, 5), dataclasses.replace(SAMPLED, temperature=0.0))
    assert [a.tokens for a in got] == [a.tokens for a in want]


@pytest.mark.parametrize("words", ["", "--to megatron", "--to megatron --target-format torch_dist"])
def test_directories_are_read_whatever_their_format(tmp_path, words: str) -> None:
    source, greedy = directory_of("llama", tmp_path), SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    cut = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 1" if words else ""
    arguments = f"--load {source} --save {tmp_path / 'converted'} --quiet {words} {cut}"
    assert convert(arguments.split()) == 0
    want, got = (Generator(path).generate(prompts("llama", 9), greedy) for path in (source, tmp_path / "converted"))
    assert [c.tokens for c in got] == [c.tokens for c in want]
