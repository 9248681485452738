from __future__ import annotations

import builtins
import json
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.data import build_tokenizer, bundled_tokenizer_model, vocab_size_with_padding
from parallel_core.data.tokenizer import TOKENIZER_TYPES
from parallel_core.data.tokenizer.gpt2_bpe import _word_pattern
from parallel_core.errors import ConfigError, DataError

BPE = pathlib.Path(__file__).parents[2] / "golden" / "data" / "bpe"
ENCODED = json.loads((BPE / "encoded.json").read_text())
# surrogates cannot be written in UTF-8
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def gpt2():
    return build_tokenizer("GPT2BPETokenizer", vocab_file=str(BPE / "vocab.json"), merge_file=str(BPE / "merges.txt"))


def bundled(kind="SentencePieceTokenizer", **options):
    return build_tokenizer(kind, tokenizer_model=bundled_tokenizer_model(), **options)


@pytest.mark.parametrize(("text", "ids"), list(zip(ENCODED["texts"], ENCODED["ids"])))
def test_gpt2_bpe_equals_the_tokenizers_library(text, ids):
    # encoded.json: tokenizers 0.23.3, ByteLevel BPE of the same vocab.json and merges.txt
    tokenizer = gpt2()
    assert tokenizer.tokenize(text) == ids
    assert tokenizer.detokenize(ids) == text


def test_gpt2_words_follow_unicodes_white_space_not_pythons():
    words = _word_pattern().findall("a\x1c\x1d b\u3000\u3000c ½٣x_")
    assert words == ["a", "\x1c\x1d", " b", "\u3000", "\u3000", "c", " ½٣", "x", "_"]


@settings(max_examples=100, deadline=None)
@given(any_text)
def test_texts_survive_a_round_trip(text):
    for tokenizer in (gpt2(), bundled("GPTSentencePieceTokenizer")):
        ids = tokenizer.tokenize(text)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        # SentencePiece drops U+0000 and reads its own space symbol as a space
        if tokenizer.unique_identifiers["class"] == "_GPT2BPETokenizer" or not set(text) & {"\0", "\u2581"}:
            assert tokenizer.detokenize(ids) == text


def test_bundled_model():
    tokenizer = bundled()
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (2048, 6, 3)
    assert tokenizer.tokenize("one<EOD>two") == [*tokenizer.tokenize("one"), 6, *tokenizer.tokenize("two")]
    assert tokenizer.detokenize(tokenizer.tokenize("one<EOD>two <CLS>")) == "one<EOD>two <CLS>"
    assert (bundled("GPTSentencePieceTokenizer").eod, bundled("GPTSentencePieceTokenizer").pad) == (2, 3)
    assert bundled("Llama2Tokenizer").tokenize("one") == [1, *tokenizer.tokenize("one")]


def test_missing_special_tokens_are_appended_as_megatron_does():
    tokenizer = bundled(vocab_extra_ids=3)
    assert tokenizer.vocab_size == 2051
    assert tokenizer.tokenize("<extra_id_2>") == [2050]
    assert tokenizer.detokenize([2048]) == "<extra_id_0>"


def test_null_tokenizer():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=255)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (256, 255, None)
    assert tokenizer.tokenize("3 14 15") == [3, 14, 15] and tokenizer.detokenize([9, 2]) == "9 2"
    with pytest.raises(DataError, match="separated by spaces"):
        tokenizer.tokenize("It is")


def test_huggingface_tokenizer_json():
    pytest.importorskip("tokenizers")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(BPE))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (600, 0, None)
    for text, ids in zip(ENCODED["texts"], ENCODED["ids"]):
        assert tokenizer.tokenize(text) == ids and tokenizer.detokenize(ids) == text
    with pytest.raises(DataError, match="does not exist"):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(BPE / "missing.json"))
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(BPE / "merges.txt"))


def test_a_missing_tokenizers_library_is_said_with_its_remedy(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'parallel_core\[tokenizers\]'"):
        build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(BPE))


@pytest.mark.parametrize("kind", sorted(TOKENIZER_TYPES))
def test_missing_arguments_are_named(kind):
    flag = "--" + TOKENIZER_TYPES[kind][0].replace("_", "-")
    with pytest.raises(ConfigError, match=f"'{kind}' needs {flag}"):
        build_tokenizer(kind)


def test_wrong_tokenizers_are_named(tmp_path):
    with pytest.raises(ConfigError, match="'TikTokenizer' is not supported"):
        build_tokenizer("TikTokenizer")
    with pytest.raises(DataError, match="no such file"):
        build_tokenizer("SentencePieceTokenizer", tokenizer_model=str(tmp_path / "missing"))
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", tokenizer_model=str(BPE / "vocab.json"))
    with pytest.raises(ConfigError, match="vocab_extra_ids=2 is for SentencePieceTokenizer"):
        build_tokenizer("NullTokenizer", vocab_size=3, vocab_extra_ids=2)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("{", "a b", "vocab_file"),
        ("[1]", "a b", "must map each token to its id"),
        ('{"a": 0}', "a b", r"has no <\|endoftext\|>"),
        ('{"<|endoftext|>": 0}', "#version: 0.2\na b c", "line 2: expected two words, found 3"),
    ],
)
def test_wrong_bpe_files_are_named(tmp_path, vocabulary, merges, message):
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(DataError, match=message):
        build_tokenizer(
            "GPT2BPETokenizer", vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt")
        )


@pytest.mark.parametrize(
    ("size", "multiple", "tp", "padded"),
    [(50257, 128, 1, 50304), (50257, 128, 4, 50688), (256, 128, 1, 256), (257, 128, 1, 384), (2048, 128, 16, 2048)],
)
def test_vocabulary_padding(size, multiple, tp, padded):
    assert vocab_size_with_padding(size, multiple, tp) == padded
