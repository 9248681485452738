"""What is kept and how it is drawn, against a plain reference: transformers' order of penalties, temperature, top-k,
top-p and min-p."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.comm.interface import SoloGroup
from parallel_core.config.mindformers.sampling import mindformers_before_0_8
from parallel_core.errors import ConfigError
from parallel_core.generate.requests import Request, SamplingParams
from parallel_core.generate.sampling import Row, Sampler, order_keys, uniform, values_of

PEER = os.environ.get("PARALLEL_CORE_PEER_PYTHON", "")


def probabilities(logits: np.ndarray, params: SamplingParams, prompt=(), chosen=()) -> np.ndarray:
    """Return the distribution that a token is drawn from, by sorting."""
    z = logits.astype(np.float64)
    for token in {*prompt, *chosen}:
        z[token] = z[token] * params.repetition_penalty if z[token] < 0 else z[token] / params.repetition_penalty
    for token in set(chosen):
        z[token] -= params.frequency_penalty * list(chosen).count(token) + params.presence_penalty
    z /= params.temperature
    if params.top_k:
        z[z < np.sort(z)[-min(params.top_k, len(z))]] = -np.inf
    p = np.exp(z - z.max())
    plain = logits.astype(np.float64) / params.temperature
    mass = p / p.sum() if params.renormalize else p * np.exp(z.max()) / np.exp(plain).sum()
    order = np.argsort(-z, kind="stable")
    needed = int((np.cumsum(mass[order]) < params.top_p * (1 - 1e-9)).sum()) + 1
    if params.top_p < 1:
        p[z < z[order[min(needed, len(z)) - 1]]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def drawn(logits: np.ndarray, params: SamplingParams, us: int, prompt=(), chosen=()) -> np.ndarray:
    """Return tokens drawn with seeds 0, 1, ..."""
    sampler = Sampler(SoloGroup(), len(logits), len(logits))
    rows = [Row(params, seed, 0, np.array(prompt, np.int64), list(chosen)) for seed in range(us)]
    return np.array([c.token for c in sampler.choose(np.tile(logits.astype(np.float32), (us, 1)), rows)])


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 10, 500]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(params=SETTINGS, seed=st.integers(0, 2**20), tied=st.booleans())
def test_a_draw_is_where_the_running_sum_passes_its_number(params: SamplingParams, seed: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=61) * 3).astype(np.float32)
    if tied:
        logits = np.round(logits)
    prompt, chosen = rng.integers(0, 61, 7), [int(t) for t in rng.integers(0, 61, 5)]
    want = probabilities(logits, params, prompt.tolist(), chosen)
    edges = np.concatenate(([0], np.cumsum(want)))
    for number, token in enumerate(drawn(logits, params, 12, prompt, chosen)):
        u = uniform(number, 0, len(chosen))
        assert want[token] > 0 and edges[token] - 1e-5 <= u <= edges[token + 1] + 1e-5


PLAIN, MIXED = SamplingParams(), SamplingParams(temperature=0.7, top_k=12, top_p=0.9)
BY_SHARE = SamplingParams(temperature=1.5, min_p=0.1, repetition_penalty=1.4)
BY_COUNT = SamplingParams(frequency_penalty=0.9, presence_penalty=0.4, top_p=0.8)
LOGITS = np.random.default_rng(7).normal(size=40).astype(np.float32) * 1.5
BEFORE, CHOSEN = [3, 4, 5], [6, 6, 7]


def assert_drawn_from(want: np.ndarray, params: SamplingParams) -> None:
    """Chi-square over 20,000 draws; its quantile of 0.999 is near d + 3.1 sqrt(2 d) + 4."""
    count = 20_000
    got = np.bincount(drawn(LOGITS, params, count, BEFORE, CHOSEN), minlength=40)
    assert got[want == 0].sum() == 0
    common = want * count >= 5
    expected = np.append(want[common], want[~common].sum()) * count
    observed = np.append(got[common], got[~common].sum())
    chi = ((observed - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    freedom = int((expected > 0).sum()) - 1
    assert chi < freedom + 3.1 * (2 * freedom) ** 0.5 + 4


@pytest.mark.parametrize(
    "params", [PLAIN, MIXED, BY_SHARE, BY_COUNT],
    ids=["plain", "top-k and top-p", "min-p and repetition", "frequency and presence"],
)  # fmt: skip
def test_frequencies_are_probabilities(params: SamplingParams) -> None:
    assert_drawn_from(probabilities(LOGITS, params, BEFORE, CHOSEN), params)


_TRANSFORMERS = """
import json, sys, torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper
from transformers import TopPLogitsWarper, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor
logits, ids, rows = json.load(sys.stdin)
out = []
for p in rows:
    steps = LogitsProcessorList()
    if p["repetition_penalty"] != 1: steps.append(RepetitionPenaltyLogitsProcessor(p["repetition_penalty"]))
    if p["temperature"] != 1: steps.append(TemperatureLogitsWarper(p["temperature"]))
    if p["top_k"]: steps.append(TopKLogitsWarper(p["top_k"]))
    if p["top_p"] < 1: steps.append(TopPLogitsWarper(p["top_p"]))
    if p["min_p"]: steps.append(MinPLogitsWarper(p["min_p"]))
    out.append(steps(torch.tensor([ids]), torch.tensor([logits])).softmax(-1)[0].tolist())
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason="PARALLEL_CORE_PEER_PYTHON names no python with torch and transformers")
def test_draws_are_from_transformers_distributions() -> None:
    """Its order of penalty, temperature, top-k, top-p and min-p; counted penalties are OpenAI's, which it has not."""
    every = [PLAIN, MIXED, BY_SHARE, dataclasses.replace(MIXED, min_p=0.2, repetition_penalty=0.8)]
    asked = json.dumps([LOGITS.tolist(), [*BEFORE, *CHOSEN], [vars(p) for p in every]])
    done = subprocess.run([PEER, "-c", _TRANSFORMERS], input=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for params, want in zip(every, json.loads(done.stdout.splitlines()[-1])):
        np.testing.assert_allclose(probabilities(LOGITS, params, BEFORE, CHOSEN), want, atol=1e-6)
        assert_drawn_from(np.array(want), params)


def test_pangus_penalties_keep_their_mass() -> None:
    """With p = .4 .3 .15 .1 .05, the likeliest chosen once: what it lost counts for none, and top-p .65 keeps all."""
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05])).astype(np.float32)
    rule = {"frequency_penalty": 1.5, "presence_penalty": 0.3, "top_p": 0.65}
    kept = {
        mode: set(drawn(logits, SamplingParams(**rule, renormalize=mode), 400, chosen=[0]).tolist())
        for mode in (False, True)
    }
    assert kept == {False: {0, 1, 2, 3, 4}, True: {1, 2}}
    without = drawn(logits, SamplingParams(top_p=0.65, renormalize=False), 4000)
    assert set(without.tolist()) == {0, 1} and abs((without == 0).mean() - 0.571) < 0.03
    three = drawn(logits, SamplingParams(top_k=3), 4000)
    np.testing.assert_allclose(np.bincount(three, minlength=3) / 4000, [0.4706, 0.3529, 0.1765], atol=0.03)


def test_greedy_takes_the_lowest_of_equal_ids_and_never_padding() -> None:
    sampler = Sampler(SoloGroup(), 4, 6)
    logits = np.array([[1, 3, 3, 0, 9, 9]], np.float32)
    row = Row(SamplingParams(temperature=0, logprobs=3), 0, 0, np.array([0]))
    (choice,) = sampler.choose(logits, [row])
    want = logits[0, :4] - np.log(np.exp(logits[0, :4]).sum())
    assert choice.token == 1 and [t for t, _ in choice.top] == [1, 2, 0]
    np.testing.assert_allclose([choice.logprob, *(v for _, v in choice.top)], want[[1, 1, 2, 0]], atol=1e-6)


def test_logprobs_are_of_the_model_not_of_what_is_drawn_from() -> None:
    logits = np.array([2.0, 1.0, 0.0], np.float32)
    params = SamplingParams(temperature=5.0, top_k=1, repetition_penalty=3.0, logprobs=0)
    (choice,) = Sampler(SoloGroup(), 3, 3).choose(logits[None], [Row(params, 0, 0, np.array([0]))])
    assert choice.logprob == pytest.approx(float(logits[choice.token] - np.log(np.exp(logits).sum())), abs=1e-6)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_keys_are_ordered_as_their_floats(values: list[float]) -> None:
    z = np.array(values, np.float32)
    keys = order_keys(z)
    assert ((z[:, None] < z[None]) == (keys[:, None] < keys[None])).all()
    np.testing.assert_array_equal(values_of(keys), z)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 2.5}, "top_k=2.5: give a whole number"),
        ({"top_p": 0}, "top_p=0"),
        ({"n": True}, "n=True"),
        ({"stop": [""]}, "stop="),
        ({"stop_token_ids": ["a"]}, "stop_token_ids="),
        ({"logprobs": 21}, "logprobs=21: give a whole number, 0 to 20"),
        ({"ignore_eos": 1}, "ignore_eos=1: give true or false"),
        ({"top_q": 1}, "top_q: no such parameter"),
    ],
)
def test_wrong_parameters_are_refused(values: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SamplingParams.of(values)


def test_requests_travel_as_json() -> None:
    request = Request("a", (1, 2), SamplingParams(stop="x", stop_token_ids=[3], logprobs=1, seed=4), 4, 1)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


# ---- MindFormers before 0.8 -----------------------------------------------------------------------------------------
def counted(logits, us, chosen, *, do_sample=True, top_k=5, top_p=1.0, repetition_penalty=1.0):
    """MindFormers' rule of releases 0.3 to 0.7, written down as it stands there; the token at each number."""
    logp = logits - logits.max()
    logp = logp - np.log(np.exp(logp).sum())
    times = np.bincount(np.array(chosen, np.int64), minlength=len(logits))
    if repetition_penalty != 1:
        logp = logp - times * repetition_penalty - (times > 0) * repetition_penalty
    q = np.exp(logp)
    order = np.argsort(-q, kind="stable")
    kept = 1 if not do_sample else int((np.cumsum(q[order][:5000]) < top_p).sum()) + 1 if top_p < 1 else top_k
    share = np.zeros(len(q))
    share[order[:kept]] = q[order[:kept]]
    running = np.cumsum(share / share.sum())
    return [int(np.searchsorted(running, u * running[-1], "right")) for u in us]


@pytest.mark.parametrize(
    "how",
    [{}, {"top_k": 3, "repetition_penalty": 1.5}, {"top_p": 0.8}, {"top_p": 0.65, "repetition_penalty": 1.2},
     {"do_sample": False, "repetition_penalty": 1.1}, {"do_sample": False}],
)  # fmt: skip
def test_mindformers_older_rule_counts_what_was_generated_and_gives_it_to_nobody(how):
    logits = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)
    chosen = [int(np.argmax(logits)), 3, 3, 7]
    params = SamplingParams(**mindformers_before_0_8(**how))
    us = [uniform(seed, 0, len(chosen)) for seed in range(300)]
    assert drawn(logits, params, 300, chosen=chosen).tolist() == counted(logits.astype(np.float64), us, chosen, **how)


def test_mindformers_older_rule_keeps_more_where_a_penalty_took_mass():
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
    half = SamplingParams(**{**mindformers_before_0_8(top_p=0.65), "frequency_penalty": 1.5, "presence_penalty": 0.3})
    assert set(drawn(logits, half, 600, chosen=[0])) == {0, 1, 2, 3, 4}
    assert set(drawn(logits, SamplingParams(**mindformers_before_0_8(top_p=0.65)), 600)) == {0, 1}


def test_each_sequence_of_a_batch_has_its_own_counts():
    logits = np.log(np.array([[0.5, 0.45, 0.05]] * 2, np.float32))
    params = SamplingParams(**mindformers_before_0_8(do_sample=False, repetition_penalty=1.5))
    rows = [Row(params, 0, 0, np.array([], np.int64), chosen) for chosen in ([0], [])]
    assert [one.token for one in Sampler(SoloGroup(), 3, 3).choose(logits, rows)] == [1, 0]
