"""Experts and latents over the cache: what is continued in pieces is what the training model computes of the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from parallel_core.generate.generator import Generator
from parallel_core.generate.requests import SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))
from hf_models import logits_of  # noqa: E402
from own_models import LLAMA, config_of, model_of, save  # noqa: E402

ROPE = "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
LATENT = f"{ROPE} --multi-latent-attention --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6"
MOE = f"{LLAMA} --num-experts 4 --moe-router-topk 2"
SLOW = pytest.mark.slow
MODELS = {
    "mixtral": MOE,
    "qwen3_moe": f"{MOE} --moe-ffn-hidden-size 24 --qk-layernorm --kv-channels 12",
    "shared experts": f"{ROPE} --num-experts 4 --moe-router-topk 2 --moe-shared-expert-intermediate-size 16",
    "latent": f"{LATENT} --qk-layernorm --rope-type rope",
    "deepseek": f"{LATENT} --q-lora-rank 10 --qk-layernorm --num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1]",
}
NAMES = [pytest.param(name, marks=[SLOW] * (name in ("shared experts", "latent"))) for name in MODELS]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=True)
LENGTHS = (9, 1, 20, 4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", NAMES)
def test_cached_is_uncached_and_a_batch_is_each_alone(name, tmp_path):
    config = config_of(f"{MODELS[name]} --seq-length 40 --max-position-embeddings 40".strip())
    model = model_of(config)
    it = Generator(save(tmp_path, config, model), max_batch_size=3, max_length=40)
    rng = np.random.default_rng(3)
    prompts = [[int(t) for t in rng.integers(0, 90, n)] for n in LENGTHS]
    answers = it.generate(prompts, GREEDY)
    for prompt, answer in zip(prompts, answers):
        whole = [*prompt, *answer.tokens]
        expected = log_softmax(logits_of(model, np.array([whole])).reshape(len(whole), -1))
        found = [*answer.prompt_logprobs, *answer.logprobs]
        assert [one.token for one in found] == whole[1:] and len(answer.tokens) == 6
        want = [expected[place, token] for place, token in enumerate(whole[1:])]
        np.testing.assert_allclose([one.logprob for one in found], want, atol=1e-5)
        assert answer.tokens == [int(t) for t in expected[len(prompt) - 1 : -1].argmax(-1)]
        (alone,) = it.generate([prompt], GREEDY)
        assert alone.tokens == answer.tokens
        # experts of a batch are multiplied with more rows at a time, whose sums may round in another order
        np.testing.assert_allclose([x.logprob for x in alone.logprobs], [x.logprob for x in answer.logprobs], atol=1e-5)


def test_the_cache_keeps_latents_and_shared_channels_alone(tmp_path):
    config = config_of(f"{MODELS['latent']} --seq-length 40 --max-position-embeddings 40")
    it = Generator(save(tmp_path, config, model_of(config)), max_batch_size=2, max_length=40)
    it.generate([[1, 2, 3]], GREEDY)
    cache = it.engine._runner.cache
    shapes = {number: latents.shape for number, latents in cache._latents.items()}
    assert not cache._layers and shapes == dict.fromkeys((0, 1), (2, 1, 40, 12 + 4))
