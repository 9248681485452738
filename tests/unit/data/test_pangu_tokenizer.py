"""PanGu-alpha's tokenizer: the published model's ids where that file is, and the rules on a small model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import sentencepiece

from parallel_core.data.tokenizer import GPTSentencePieceTokenizer, PanguTokenizer, build_tokenizer
from parallel_core.errors import ConfigError, DataError

PUBLISHED = os.environ.get("PARALLEL_CORE_PANGU_VOCAB", "")
"""Path of the published vocab.model, which is not part of the repository."""
GOLDEN = {
    "今天是一个好天气": [465, 16, 46, 70, 2786],
    "你好，今天天气不错。": [5772, 10, 465, 235, 464, 1123, 12],
    "I love you\nhello  world": [
        2787, 13, 4, 13, 28420, 13, 4, 18847, 13, 3, 13, 32714, 11291, 13, 4, 13, 4, 13, 36475,
    ],
    "中国的首都是北京\n日本的首都是东京": [96, 11, 6539, 16, 263, 13, 3, 691, 11, 6539, 16, 6921],
    "a\n\nb": [1853, 13, 3, 13, 3, 1498],
    "\t": [],
}  # fmt: skip


@pytest.mark.skipif(not PUBLISHED, reason="PARALLEL_CORE_PANGU_VOCAB names no published vocab.model")
@pytest.mark.parametrize("text", GOLDEN)
def test_ids_are_those_of_the_published_model(text):
    pytest.importorskip("jieba")
    tokenizer = build_tokenizer("PanguTokenizer", tokenizer_model=PUBLISHED)
    assert tokenizer.tokenize(text) == GOLDEN[text]
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (40000, 6, 6)
    if text.isascii() and text.strip() and "，" not in text:
        assert tokenizer.detokenize(GOLDEN[text]) == text


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A model with the published one's special pieces in their places."""
    folder = tmp_path_factory.mktemp("pangu")
    (folder / "text").write_text("one two three four two one\nthree two one go\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=48, hard_vocab_limit=False,
        minloglevel=2, user_defined_symbols=["\u2583", "\u2582", "<sep>", "<pad>", "<mask>", "<eod>", "<eot>"],
    )  # fmt: skip
    return str(folder / "m.model")


def words(text: str) -> list[str]:
    """Cut before every space and newline, which jieba also parts."""
    return [part for part in text.replace(" ", "\0 \0").replace("\n", "\0\n\0").split("\0") if part]


def test_spaces_and_newlines_come_back_and_the_words_are_the_segmenters(small):
    tokenizer = PanguTokenizer(small, words)
    for text in ("one two\n\nthree  four", " one", "two\n", ""):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    plain = GPTSentencePieceTokenizer(small)
    assert tokenizer.tokenize("onetwo three") == plain.tokenize("onetwo \u2582 three")
    assert PanguTokenizer(small, lambda text: ["one", "two"]).tokenize("onetwo") == plain.tokenize("one two")


def test_documents_end_with_pad_and_answers_with_eot(small):
    tokenizer = PanguTokenizer(small, words)
    assert (tokenizer.eod, tokenizer.pad, tokenizer.end_of_text) == (6, 6, 9)


def test_a_model_without_the_special_pieces_is_refused():
    other = str(Path(__file__).resolve().parents[3] / "data/tokenizer.model")
    with pytest.raises(DataError, match="has no piece <eot>"):
        PanguTokenizer(other, words)


def test_without_jieba_the_extra_is_named(small, monkeypatch):
    from parallel_core.data.tokenizer import pangu

    monkeypatch.setitem(sys.modules, "jieba", None)
    pangu._jieba.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'parallel_core\[pangu\]'"):
        build_tokenizer("PanguTokenizer", tokenizer_model=small)
    with pytest.raises(ConfigError, match="which has no PanguTokenizer"):
        build_tokenizer("PanguTokenizer", tokenizer_model=small, legacy_tokenizer=True)
