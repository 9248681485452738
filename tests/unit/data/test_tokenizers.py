from __future__ import annotations

import builtins
import json
import pathlib
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.data import build_tokenizer, bundled_tokenizer_model
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


SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_sentencepiece_type_is_the_model_as_it_is(kind):
    # Megatron-core 0.16.1 and later: one reader for the three types, no added tokens, no begin-of-sentence
    tokenizer = bundled(kind)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (2048, 2, 3)
    assert 6 not in tokenizer.tokenize("one<EOD>two")
    assert 1 not in tokenizer.tokenize("one")


def test_legacy_classes():
    tokenizer = bundled(legacy_tokenizer=True)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (2048, 6, 3)
    assert tokenizer.tokenize("one<EOD>two") == [*tokenizer.tokenize("one"), 6, *tokenizer.tokenize("two")]
    assert tokenizer.detokenize(tokenizer.tokenize("one<EOD>two <CLS>")) == "one<EOD>two <CLS>"
    gpt = bundled("GPTSentencePieceTokenizer", legacy_tokenizer=True)
    assert (gpt.eod, gpt.pad) == (2, 3)
    llama = bundled("Llama2Tokenizer", legacy_tokenizer=True)
    assert llama.tokenize("one") == [1, *tokenizer.tokenize("one")] and llama.eod == 2


def test_a_model_without_megatrons_names_has_512_ids_or_517(tmp_path):
    # of Megatron-core 0.16.1 with such a model: vocabulary 512, end of document 2; with --legacy-tokenizer 517 and 514
    path = tmp_path / "plain.model"
    text = (pathlib.Path(bundled_tokenizer_model()).parent / "corpus.jsonl").read_text()[:200_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split()), model_prefix=str(path)[:-6], vocab_size=512, model_type="bpe",
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    plain = build_tokenizer("SentencePieceTokenizer", tokenizer_model=str(path))
    legacy = build_tokenizer("SentencePieceTokenizer", tokenizer_model=str(path), legacy_tokenizer=True)
    assert (plain.vocab_size, plain.eod, plain.pad) == (512, 2, None)
    assert (legacy.vocab_size, legacy.eod, legacy.pad) == (517, 514, 516)
    assert legacy.tokenize("the<MASK>") == [*plain.tokenize("the"), 515]


def test_identities_are_what_megatron_hashes():
    """The names of cached indices depend on these: Megatron-core 0.16.1's library, and its legacy classes."""
    model, library = bundled_tokenizer_model(), "megatron.core.tokenizers.text.models.default_tokenizer"
    assert bundled().unique_description == json.dumps(
        {
            "class": f"{library}.DefaultTokenizerText",
            "tokenizer_path": model,
            "legacy": "False",
            "special_tokens": "None",
        },
        indent=4,
    )
    assert bundled("Llama2Tokenizer").unique_identifiers == bundled().unique_identifiers
    assert bundled(legacy_tokenizer=True).unique_identifiers == {
        "class": "_SentencePieceTokenizer", "tokenizer_path": [model], "vocab_extra_ids": "0",
    }  # fmt: skip
    assert bundled("Llama2Tokenizer", legacy_tokenizer=True).unique_identifiers["class"] == "_Llama2Tokenizer"
    null = build_tokenizer("NullTokenizer", vocab_size=255)
    assert null.unique_identifiers == {
        "class": f"{library}.DefaultTokenizerText", "tokenizer_path": None, "vocab_size": "255",
    }  # fmt: skip
    assert list(gpt2().unique_identifiers) == [
        "class", "tokenizer_path", "additional_special_tokens", "vocab_file", "merges_file", "use_fast",
        "trust_remote_code", "include_special_tokens",
    ]  # fmt: skip


def test_special_tokens_are_found_as_megatrons_loop_finds_them():
    tokenizer = bundled(legacy_tokenizer=True, vocab_extra_ids=2)

    def megatrons_loop(text):
        ids, position = [], 0
        while True:
            found = {name: text.find(name, position) for name in tokenizer._special if name in text[position:]}
            if not found:
                return ids + tokenizer._model.encode_as_ids(text[position:])
            name = min(found, key=found.get)
            ids += [*tokenizer._model.encode_as_ids(text[position : found[name]]), tokenizer._special[name]]
            position = found[name] + len(name)

    parts = ["<EOD>", "<CLS>", "</s>", "<s>", "<extra_id_1>", "<extra", "<", ">", "a b", " ", "\n"]
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
        assert tokenizer.tokenize(text) == megatrons_loop(text)


def test_missing_special_tokens_are_appended_as_megatron_does():
    tokenizer = bundled(vocab_extra_ids=3, legacy_tokenizer=True)
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
    for kind in ("NullTokenizer", "SentencePieceTokenizer"):
        with pytest.raises(ConfigError, match="vocab_extra_ids=2 is for SentencePieceTokenizer with --legacy"):
            build_tokenizer(kind, tokenizer_model=bundled_tokenizer_model(), vocab_size=3, vocab_extra_ids=2)
    with pytest.raises(ConfigError, match="is for HuggingFaceTokenizer, not for Llama2Tokenizer"):
        bundled("Llama2Tokenizer", tokenizer_hf_include_special_tokens=True)
    with pytest.raises(ConfigError, match="give one of them"):
        bundled("HuggingFaceTokenizer", legacy_tokenizer=True, tokenizer_hf_include_special_tokens=False)


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
