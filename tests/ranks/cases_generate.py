"""Generation on several ranks: every layout gives the tokens of one rank, and sampling never sees all logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from parallel_core.comm.interface import SoloGroup
from parallel_core.generate.generator import Generator
from parallel_core.generate.layout import Layout
from parallel_core.generate.requests import SamplingParams
from parallel_core.generate.sampling import Row, Sampler
from tests.helpers.cases import CaseContext, case
from tests.ranks.support import group_of, parallel_context, world_group

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "generate"))
from generate_models import computed, directory_of, prompts  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "checkpoint"))
from own_models import config_of, model_of, save  # noqa: E402

DEEPSEEK = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --multi-latent-attention "
    "--q-lora-rank 10 --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 --qk-layernorm "
    "--num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1] --seq-length 64"
)
LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2), (1, 1)], 4: [(2, 2), (2, 1), (1, 2)]}
"""(tensor, pipeline) parallel sizes; what is left is data parallel."""
SAMPLED = SamplingParams(
    max_new_tokens=14, temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.2, seed=3, logprobs=2, ignore_eos=True
)


def answers(ctx: CaseContext, name: str, tp: int, pp: int, params: SamplingParams, *lengths: int) -> list[dict]:
    """Return rank 0's answers, with their log-probabilities."""
    layout = Layout(tp, pp, ctx.world_size // tp // pp)
    context = parallel_context(ctx.rank, ctx.world_size, tp, pp)
    it = Generator(ctx.tmp_path / name, layout=layout, max_batch_size=3, context=context)
    if ctx.rank:
        it._loop.follow()
        return []
    got = it.generate(own_prompts(*lengths) if name == "deepseek" else prompts(name, *lengths), params)
    it._loop.close()
    return [
        {"tokens": c.tokens, "logprobs": [x.logprob for x in (*c.prompt_logprobs, *c.logprobs)],
         "top": [t for x in c.logprobs for t, _ in x.top], "reason": c.finish_reason}
        for c in got
    ]  # fmt: skip


def own_prompts(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, 90, n).tolist() for n in lengths]


@case(world_size=(2, 4), variants=[{"name": "gpt2"}, {"name": "llama"}, {"name": "deepseek"}])
def test_every_layout_gives_the_tokens_of_one_rank(ctx: CaseContext, name: str) -> None:
    alone = CaseContext(0, 1, ctx.tmp_path)
    if ctx.rank == 0:
        if name == "deepseek":
            save(ctx.tmp_path / name, config_of(DEEPSEEK), model_of(config_of(DEEPSEEK)))
        else:
            directory_of(name, ctx.tmp_path)
        params = SamplingParams(**{**vars(SAMPLED), "prompt_logprobs": True})
        (ctx.tmp_path / "want.json").write_text(json.dumps(answers(alone, name, 1, 1, params, 5, 30, 1, 18)))
    world_group(ctx).barrier()
    want = json.loads((ctx.tmp_path / "want.json").read_text())
    for tp, pp in LAYOUTS[ctx.world_size]:
        params = SamplingParams(**{**vars(SAMPLED), "prompt_logprobs": True})
        for one, other in zip(answers(ctx, name, tp, pp, params, 5, 30, 1, 18), want):
            assert (one["tokens"], one["top"], one["reason"]) == (other["tokens"], other["top"], other["reason"])
            np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-5)
        if name == "deepseek":
            continue
        greedy = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)
        for one, tokens in zip(answers(ctx, name, tp, pp, greedy, 12, 12), computed(name)["greedy"]):
            assert one["tokens"] == tokens.tolist()
        if name == "gpt2" and (tp, pp) == (1, 1):
            unseeded = SamplingParams(max_new_tokens=8, temperature=1.0, ignore_eos=True)
            drawn = [one["tokens"] for one in answers(ctx, name, tp, pp, unseeded, *[12] * 6)]
            assert ctx.rank or len({tuple(tokens) for tokens in drawn}) == 6, "models that share requests draw alike"


@case(world_size=(2, 4))
def test_parts_of_the_vocabulary_choose_as_the_whole(ctx: CaseContext) -> None:
    """Flat, peaked and tied logits, every rule at once, and a vocabulary whose last part is padding."""
    group, rng = group_of(ctx, list(range(ctx.world_size))), np.random.default_rng(0)
    for trial in range(40):
        size = int(rng.integers(10, 60)) * ctx.world_size
        real = size - int(rng.integers(0, size // ctx.world_size + 2))
        logits = (rng.normal(size=(5, size)) * rng.choice([0.1, 1, 6])).astype(np.float32)
        if trial % 3 == 0:
            logits = np.round(logits, 1)
        rows = [
            Row(
                SamplingParams(
                    temperature=float(rng.choice([0, 0.7, 1])),
                    top_k=int(rng.choice([0, 1, 7, 1000])),
                    top_p=float(rng.choice([0.2, 0.9, 1])),
                    min_p=float(rng.choice([0, 0.1])),
                    repetition_penalty=float(rng.choice([1, 1.3])),
                    frequency_penalty=float(rng.choice([0, 0.5])),
                    renormalize=bool(rng.integers(2)),
                    logprobs=3,
                ),
                seed=trial,
                sample=i,
                prompt=rng.integers(0, real, 4),
                chosen=[int(t) for t in rng.integers(0, real, 3)],
            )
            for i in range(5)
        ]
        part = size // ctx.world_size
        mine = logits[:, ctx.rank * part : (ctx.rank + 1) * part]
        got = Sampler(group, real, part).choose(mine, rows)
        want = Sampler(SoloGroup(), real, size).choose(logits, rows)
        assert [c.token for c in got] == [c.token for c in want]
        assert [[t for t, _ in c.top] for c in got] == [[t for t, _ in c.top] for c in want]
        np.testing.assert_allclose([c.logprob for c in got], [c.logprob for c in want], atol=1e-9)
