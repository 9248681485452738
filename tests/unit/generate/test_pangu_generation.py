"""PanGu-alpha continues texts: with a cache as without one, the last token of a prompt and every place included."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import sentencepiece
from mindspore import Tensor

from parallel_core.checkpoint import TensorShard, load_shards, open_checkpoint
from parallel_core.config.model_keys import model_of_settings
from parallel_core.generate import engine
from parallel_core.generate.generator import Generator
from parallel_core.generate.requests import SamplingParams
from parallel_core.layout.shard import shard_of
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import PanguAlphaModel
from tests.unit.checkpoint.test_pangu_checkpoints import settings, write

H, LAYERS, S, V, F, E = 16, 3, 48, 97, 40, 4


def directory(folder: Path, norm: str, positions: int = S, chosen: int = 0) -> Path:
    """Write a random model as a merged file; with experts of which so many are `chosen`."""
    draws = np.random.default_rng(7)
    sizes = {"embedding.word_embedding.embedding_table": (V, H), "top_query_embedding.embedding_table": (positions, H),
             "embedding.position_embedding.embedding_table": (positions, H)}  # fmt: skip
    norms = ["layernorm"]
    for layer in (*(f"blocks.{i}" for i in range(LAYERS - 1)), "top_query_layer"):
        norms += [f"{layer}.layernorm1", f"{layer}.layernorm2"]
        for name in ("dense1", "dense2", "dense3", "projection"):
            sizes |= {f"{layer}.attention.{name}.weight": (H, H), f"{layer}.attention.{name}.bias": (H,)}
        inner, many, one = f"{layer}.output", (), ()
        if chosen and layer != "top_query_layer":
            sizes[f"{inner}.router.dense.weight"] = (E, H)
            inner, many, one = f"{inner}.ffn", (E,), (1, E, 1)
        sizes |= {f"{inner}.mapping.weight": (*many, H, F), f"{inner}.mapping.bias": (*one, F),
                  f"{inner}.projection.weight": (*many, F, H), f"{inner}.projection.bias": (*one, H)}  # fmt: skip
    tensors = {name: 0.4 * draws.standard_normal(shape) for name, shape in sizes.items()}
    for name in norms:
        tensors |= {f"{name}.gamma": 1 + 0.2 * draws.standard_normal(H), f"{name}.beta": 0.2 * draws.standard_normal(H)}
    write(folder / "pangu.ckpt", {f"backbone.{name}": value.astype(np.float32) for name, value in tensors.items()})
    settings(folder, top_query_layer=norm, **({"num_experts_chosen": chosen} if chosen else {}))
    return folder


def vocabulary(folder: Path, text: str, size: int) -> None:
    """Train a small `vocab.model` with the published one's special pieces in their places."""
    (folder / "text").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "vocab"), vocab_size=size, hard_vocab_limit=False,
        minloglevel=2, user_defined_symbols=["\u2583", "\u2582", "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"],
    )  # fmt: skip


@pytest.fixture(scope="module", params=[("norm_before", 0), ("norm_after", 0), ("norm_before", 1), ("norm_before", 2)],
                ids=lambda param: f"{param[0]}, {param[1]} experts" if param[1] else param[0])  # fmt: skip
def generator(request, tmp_path_factory) -> Generator:
    norm, chosen = request.param
    return Generator(directory(tmp_path_factory.mktemp(norm), norm, chosen=chosen), max_batch_size=2)


def uncached(path: Path, row: list[int]) -> np.ndarray:
    """Return the training model's log-probabilities at every position, in one pass over the whole row."""
    source = open_checkpoint(path)
    config = model_of_settings(source.common["model_config"])
    config = dataclasses.replace(config, attention_dropout_rate=0.0, hidden_dropout_rate=0.0)
    model = PanguAlphaModel(ModelStage(config))
    names = {shard_of(p).name: p.shape for p in model.trainable_params()}
    shards = {name: TensorShard.full(name, shape, "float32") for name, shape in names.items()}
    arrays, _ = load_shards(source, shards, all_keys=list(shards))
    for parameter in model.trainable_params():
        parameter.set_data(Tensor(arrays[shard_of(parameter).name]))
    logits = model(Tensor(np.array([row], np.int32))).asnumpy()[0].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


PROMPTS = [[5, 9, 33, 2, 70, 11, 8], [1], [4, 4, 60, 21, 96, 3, 17, 50, 2, 2, 41]]
SAMPLED = SamplingParams(max_new_tokens=20, temperature=0.8, top_k=30, seed=3, logprobs=0, ignore_eos=True)


def test_the_last_token_of_a_prompt_is_in_the_cache_and_a_step_asks_by_its_own_position(generator):
    """Step by step is the whole pass, for prompt and answer; a step's query is not row 0 of the table."""
    params = dataclasses.replace(SAMPLED, prompt_logprobs=True)
    whole = generator.generate(PROMPTS, params)
    with mock.patch.object(engine, "PREFILL_CHUNK", 3):
        chunked = generator.generate(PROMPTS, params)
    for prompt, one, other in zip(PROMPTS, whole, chunked):
        row = [*prompt, *one.tokens]
        want = uncached(generator.described.path, row)[np.arange(len(row) - 1), row[1:]]
        for answer in (one, other):
            got = [x.logprob for x in (*answer.prompt_logprobs, *answer.logprobs)]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_batch_is_each_alone(generator):
    together = generator.generate(PROMPTS, SAMPLED)
    for prompt, answer in zip(PROMPTS, together):
        (alone,) = generator.generate([prompt], SAMPLED)
        assert alone.tokens == answer.tokens


def test_an_answer_ends_with_eot_and_not_with_the_end_of_a_document(tmp_path):
    """One setting for both is how generation came never to stop."""
    folder = directory(tmp_path, "norm_before")
    vocabulary(folder, "one two three four two one\nthree two one go\n" * 20, 48)
    with mock.patch("parallel_core.data.tokenizer.pangu._jieba", lambda: str.split):
        model = Generator(folder)
    assert (model.tokenizer.eod, model.tokenizer.end_of_text) == (6, 9)
    params = SamplingParams(max_new_tokens=40, temperature=3.0, seed=1)
    answers = model.generate([[n] for n in range(20)], params)
    ended = [a for a in answers if a.finish_reason == "stop"]
    assert ended and all(9 not in a.tokens[:-1] for a in answers)
    assert any(6 in a.tokens[:-1] for a in answers), "the end of a document is a token like others in an answer"
