"""How sequences enter and leave, end and are refused."""

from __future__ import annotations

import pytest
from generate_models import computed, generator, prompts

from parallel_core.errors import ConfigError
from parallel_core.generate.requests import SamplingParams


class Letters:
    """A tokenizer of a letter a token."""

    eod = 2

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) - 60 for c in text]

    def detokenize(self, tokens) -> str:
        return "".join(chr(60 + t) for t in tokens)


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    made = generator("gpt2", tmp_path_factory.mktemp("models"), max_batch_size=3, max_length=64)
    made.tokenizer = Letters()
    made.engine._detokenize, made.engine._eod = made.tokenizer.detokenize, made.tokenizer.eod
    return made


GREEDY = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)


def test_what_ends_an_answer(it) -> None:
    prompt, greedy = prompts("gpt2", 12)[0], [int(t) for t in computed("gpt2")["greedy"][0]]
    text = it.tokenizer.detokenize(greedy)
    (whole,) = it.generate([prompt], GREEDY)
    assert (whole.text, whole.finish_reason, whole.prompt_tokens) == (text, "length", 12)
    word = text[5:7]
    first = text.find(word)
    (cut,) = it.generate([prompt], {**vars(GREEDY), "stop": ["never" * 9, word]})
    assert (cut.text, cut.finish_reason) == (text[:first], "stop") and cut.tokens == greedy[: first + 2]
    (ended,) = it.generate([prompt], {**vars(GREEDY), "stop_token_ids": [greedy[4]]})
    place = greedy.index(greedy[4])
    assert (ended.text, ended.finish_reason, ended.tokens) == (text[:place], "stop", greedy[: place + 1])
    it.engine._eod = greedy[3]
    place = greedy.index(greedy[3])
    (eod,) = it.generate([prompt], {**vars(GREEDY), "ignore_eos": False})
    it.engine._eod = 2
    assert (eod.finish_reason, eod.tokens) == ("stop", greedy[: place + 1])


def test_answers_come_as_they_grow(it) -> None:
    seen: list[str] = []
    (answer,) = it.generate("HELLO", GREEDY, on_change=lambda c: seen.append(c.text))
    assert len(seen) == 24 and seen[-1] == answer.text
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:]))


def test_n_answers_differ_and_are_the_same_again(it) -> None:
    params = SamplingParams(max_new_tokens=12, n=4, seed=9, ignore_eos=True)
    answers = it.generate("HELLO", params)
    assert [a.sample for a in answers] == [0, 1, 2, 3] and len({tuple(a.tokens) for a in answers}) == 4
    assert [a.tokens for a in it.generate("HELLO", params)] == [a.tokens for a in answers]
    other = it.generate("HELLO", SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert other[0].tokens != it.generate("HELLO", SamplingParams(max_new_tokens=12, ignore_eos=True))[0].tokens


def test_cancelled_answers_free_their_rows(it) -> None:
    requests = [it.requests("HELLO" * (1 + i % 2), GREEDY, f"r{i}")[0] for i in range(7)]
    it.submit(requests)
    for _ in range(4):
        it.step()
    it.cancel("r0")
    it.cancel("r6")
    it.cancel("nobody")
    done = {}
    while not it.is_idle:
        done.update({c.key: c for c in it.step() if c.finish_reason})
    assert set(done) == {"r1", "r2", "r3", "r4", "r5"}
    assert it.engine.counts == {"waiting": 0, "reading": 0, "answering": 0, "free": 3} and it.engine.is_idle
    assert len({tuple(done[f"r{i}"].tokens) for i in (2, 4)}) == 1 and done["r1"].tokens == done["r5"].tokens


def test_what_is_given_up_before_it_begins_frees_its_row(it) -> None:
    it.submit(it.requests("HELLO", GREEDY, "r"))
    it.cancel("r")
    it.step()
    assert it.is_idle and it.engine.is_idle and it.engine.counts["free"] == 3


@pytest.mark.parametrize(
    ("prompt", "values", "told"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 60, {"max_new_tokens": 5}, "has 60 tokens, and max_new_tokens=5 makes 65; there is room for 64"),
        ([320], {}, "token 320 does not exist; ids are 0 to 319"),
        ([1], {"stop_token_ids": [400]}, "token 400 does not exist"),
        ([1.5], {}, "whole numbers"),
    ],
)
def test_prompts_that_cannot_be_are_refused(it, prompt, values, told) -> None:
    with pytest.raises(ConfigError, match=told):
        it.generate([prompt], {"max_new_tokens": 4, **values})
    assert it.is_idle


def test_text_without_a_tokenizer_is_refused(tmp_path) -> None:
    bare = generator("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="a text needs a tokenizer .* knows of no tokenizer"):
        bare.generate("hello")
    with pytest.raises(ConfigError, match="stop texts need a tokenizer"):
        bare.generate([[1]], {"stop": "x", "max_new_tokens": 2})
    assert bare.generate([[1]], GREEDY)[0].text == ""


def test_lengths_beyond_the_models_positions_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="max_length=257: give 1 to 256"):
        generator("gpt2", tmp_path, max_length=257)
    with pytest.raises(ConfigError, match="max_batch_size=0"):
        generator("gpt2", tmp_path, max_batch_size=0)
