"""Data files that are damaged, endless, no files at all, or held and planted by others."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel_core.data import (
    IndexedDataset,
    IndexedDatasetBuilder,
    blends_from_arguments,
    build_tokenizer,
    build_train_valid_test_datasets,
    bundled_tokenizer_model,
    files,
    prepare_bundled_corpus,
    sentences,
)
from parallel_core.data.files import LockHeldError, exclusive_lock
from parallel_core.data.tokenizer import NullTokenizer, TokenizerSpec
from parallel_core.data.tokenizer.gpt2_bpe import merge_pairs
from parallel_core.data.tokenizer.huggingface import special_tokens_beside
from parallel_core.errors import ConfigError, DataError
from parallel_core.prepare import preprocess_data, wikitext
from parallel_core.prepare.preprocess import PreprocessOptions, preprocess
from parallel_core.prepare.text_input import InputOptions, find_input_files, read_documents
from tests.unit.data.helpers import make_config, write_pair

REPO = Path(__file__).parents[3]
BPE = REPO / "tests" / "golden" / "data" / "bpe"
NULL = TokenizerSpec("NullTokenizer", vocab_size=1000)


def train(config, num_samples=20):
    return build_train_valid_test_datasets(config, (num_samples, 0, 0))[0]


# --- what is no file -------------------------------------------------------------------------------------------------


class WaitsForEver(BaseException):
    """No OSError, which a reader could take for the file's own."""


@pytest.fixture
def no_waiting():
    """End the test if something waits for a pipe's writer or reads a device to its end."""

    def stop(*_):
        raise WaitsForEver

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("reader", ["pair", "bpe", "merges", "sentencepiece", "special tokens", "paths", "text"])
def test_pipes_devices_and_folders_are_no_files(tmp_path, no_waiting, kind, reader):
    path = tmp_path / "x.bin"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    read = {
        "pair": lambda: IndexedDataset(str(tmp_path / "x")),
        "bpe": lambda: build_tokenizer("GPT2BPETokenizer", vocab_file=str(path), merge_file=str(BPE / "merges.txt")),
        "merges": lambda: build_tokenizer("GPT2BPETokenizer", vocab_file=str(BPE / "vocab.json"), merge_file=str(path)),
        "sentencepiece": lambda: build_tokenizer("SentencePieceTokenizer", tokenizer_model=str(path)),
        "special tokens": lambda: special_tokens_beside(str(tmp_path / "tokenizer.json")),
        "paths": lambda: blends_from_arguments(data_args_path=str(path)),
        "text": lambda: find_input_files([str(path)]),
    }
    if reader == "pair":
        (tmp_path / "x.idx").write_bytes(b"")
    if reader == "special tokens":
        path.rename(tmp_path / "special_tokens_map.json")
    with pytest.raises(DataError, match=f"is a {kind}, not a file"):
        read[reader]()


def test_a_pipe_among_cached_indices_is_replaced(pair, tmp_path, no_waiting):
    config = make_config(pair, path_to_cache=str(tmp_path / "cache"))
    right = train(config).shuffle_index
    path = next((tmp_path / "cache").glob("*shuffle_index.npy"))
    path.unlink()
    os.mkfifo(path)
    assert np.array_equal(train(config).shuffle_index, right) and path.is_file()


def test_an_endless_text_is_named(tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_bytes(b" " * 2000)
    monkeypatch.setattr(files.read_file, "__defaults__", (1000,))
    with pytest.raises(DataError, match="is larger than"):
        files.read_file(str(tmp_path / "vocab.json"))


# --- locks and links of others ---------------------------------------------------------------------------------------


@pytest.fixture
def held_lock(tmp_path):
    """A lock file that another process holds, and that process."""
    path = tmp_path / "held.lock"
    script = f"import fcntl,time; f=open({str(path)!r},'w'); fcntl.flock(f,2); print(1,flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield path, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_that_is_held_is_waited_for_with_a_word_and_a_limit(held_lock, caplog, monkeypatch):
    path, process = held_lock
    monkeypatch.setattr(files, "_WORD_AFTER_S", 0.05)
    with pytest.raises(LockHeldError, match=f"held by process {process.pid} of user"), exclusive_lock(str(path), 0.3):
        raise AssertionError("two hold one lock")
    assert f"waiting for the lock {path}, held by process {process.pid}" in caplog.text
    process.kill()
    process.wait()
    with exclusive_lock(str(path), 0.3):  # a holder that is gone holds nothing
        pass


def test_another_users_lock_is_not_worth_the_long_wait(held_lock, monkeypatch):
    path, _ = held_lock
    monkeypatch.setattr(files.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(LockHeldError), exclusive_lock(str(path), 600, limit_for_others_s=0.1):
        raise AssertionError("two hold one lock")


def test_a_held_lock_leaves_the_indices_in_memory(pair, tmp_path, caplog, monkeypatch):
    config = make_config(pair, path_to_cache=str(tmp_path / "cache"))
    right = train(config).shuffle_index
    for path in (tmp_path / "cache").iterdir():
        path.unlink()

    def held(*_):
        raise LockHeldError(11, "its lock has been held by process 1")

    monkeypatch.setattr(files, "_wait_for_lock", held)
    assert np.array_equal(train(config).shuffle_index, right)
    assert "held by process 1" in caplog.text and not list((tmp_path / "cache").glob("*.npy"))


def test_nothing_is_written_through_a_planted_link(pair, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    base = f"{train(make_config(pair, path_to_cache=str(tmp_path / 'a'))).unique_description_hash}-GPTDataset-train"
    (tmp_path / "cache").mkdir()
    for suffix in ("-description.txt", "-source.txt", "-document_index.npy"):
        (tmp_path / "cache" / (base + suffix)).symlink_to(victim)
    assert len(train(make_config(pair, path_to_cache=str(tmp_path / "cache"))))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"{base}.lock").symlink_to(tmp_path / "made")
    assert len(train(make_config(pair, path_to_cache=str(tmp_path / "b")))) and not (tmp_path / "made").exists()
    for name in (f"out.bin.{os.getpid()}.tmp", f"out.idx.{os.getpid()}.tmp", "out.bin", "out.idx"):
        (tmp_path / name).symlink_to(victim)
    write_pair(tmp_path / "out", [[1, 2]])
    assert victim.read_text() == "mine" and IndexedDataset(str(tmp_path / "out")).num_tokens == 2


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
def test_a_bin_that_is_cut_while_it_is_open_is_named(tmp_path, mmap):
    dataset = IndexedDataset(write_pair(tmp_path / "x", [np.arange(20_000)]), mmap=mmap)
    assert dataset.get(0)[-1] == 19_999
    os.truncate(tmp_path / "x.bin", 10)
    with pytest.raises(DataError, match="is shorter now"):
        dataset.get(0)


def test_overlapping_sequences_and_bytes_that_belong_to_none_are_damage(tmp_path):
    prefix = write_pair(tmp_path / "x", [[1, 2, 3, 4], [5, 6]])
    index, tokens = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(tokens + b"\0")
    with pytest.raises(DataError, match="all sequences take 24 bytes, but .* has 25"):
        IndexedDataset(prefix)
    for length, pointer in ((4, 8), (3, 16), (5, 16)):  # each inside .bin, and not where the others end
        changed = bytearray(index)
        changed[34:38] = np.int32(length).tobytes()
        changed[50:58] = np.int64(pointer).tobytes()
        (tmp_path / "x.idx").write_bytes(changed)
        (tmp_path / "x.bin").write_bytes(tokens)
        with pytest.raises(DataError, match=r"x\.idx"):
            IndexedDataset(prefix)


def test_fractions_are_no_token_ids(tmp_path):
    prefix = write_pair(tmp_path / "x", [np.ones(50)], np.float32)
    with pytest.raises(DataError, match="stores float32, which are no token ids"):
        train(make_config(prefix))


def test_an_id_beyond_32_bits_is_not_wrapped_into_a_legal_one(tmp_path):
    prefix = write_pair(tmp_path / "x", [np.full(50, 2**32 + 5)], np.int64)
    with pytest.raises(DataError, match="token id 4294967301"):
        train(make_config(prefix))[0]


@pytest.mark.parametrize("size", [10**12, 10**15])
def test_an_order_that_does_not_fit_in_memory_is_named(pair, size):
    with pytest.raises(DataError, match=rf"the order of {size // 1000}\d+ samples takes"):
        train(make_config(pair, sequence_length=1), size)


@pytest.mark.parametrize("harm", ["no record", "empty record", "other order", "text", "description", "other type"])
def test_indices_that_are_not_what_was_built_are_built_again(pair, tmp_path, harm):
    config = make_config(pair, path_to_cache=str(tmp_path / "cache"))
    right = train(config).shuffle_index
    found = {path.name.rsplit("-", 1)[1]: path for path in (tmp_path / "cache").iterdir()}
    before = {name: path.read_bytes() for name, path in found.items()}
    harms = {
        "no record": lambda: found["source.txt"].unlink(),  # as Megatron leaves it
        "empty record": lambda: found["source.txt"].write_bytes(b"\xff\xfe"),
        "other order": lambda: np.save(found["shuffle_index.npy"], right[::-1]),
        "text": lambda: np.save(found["shuffle_index.npy"], right.astype(str)),
        "description": lambda: found["description.txt"].write_text("{}"),
        "other type": lambda: np.save(found["shuffle_index.npy"], right.astype(np.int64)),
    }
    harms[harm]()
    dataset = train(config)
    assert dataset.built_anew_on_cache_miss and np.array_equal(dataset.shuffle_index, right)
    assert {name: path.read_bytes() for name, path in found.items()} == before
    assert not train(config).built_anew_on_cache_miss


def test_a_damaged_bundled_corpus_is_made_again(tmp_path):
    prefix = prepare_bundled_corpus(str(tmp_path))
    tokens = Path(prefix + ".bin").read_bytes()
    Path(prefix + ".bin").write_bytes(tokens[:-10])
    assert Path(prepare_bundled_corpus(str(tmp_path)) + ".bin").read_bytes() == tokens
    other = [np.array([5, 6], np.uint16)]  # of another end of document
    write_pair(prefix, other, np.uint16)
    assert Path(prepare_bundled_corpus(str(tmp_path)) + ".bin").read_bytes() == tokens


# --- text ------------------------------------------------------------------------------------------------------------


def run(tmp_path, content, name="x.jsonl", tokenizer=NULL, options=None, **more):
    (tmp_path / name).write_bytes(content)
    report = preprocess(
        PreprocessOptions((str(tmp_path / name),), str(tmp_path / "out"), tokenizer, options or InputOptions(), **more)
    )
    dataset = IndexedDataset(report.output_prefixes[0])
    return report, [dataset.get(index).tolist() for index in range(len(dataset))], dataset.document_indices.tolist()


def test_a_list_of_sentences_is_read_as_megatron_reads_it(tmp_path):
    content = b'{"text": ["1 2", "", "3"]}\n{"text": []}\n{"text": "4"}\n'
    _, sequences, bounds = run(tmp_path, content, append_eod=True)
    assert sequences == [[1, 2], [3, 1000], [4, 1000]] and bounds == [0, 2, 2, 3]
    with pytest.raises(DataError, match=r"x.jsonl:1: field 'text' has a int instead of text"):
        run(tmp_path, b'{"text": ["1", 2]}\n')
    with pytest.raises(DataError, match="x.jsonl:1: the field is a list of sentences already"):
        run(tmp_path, content, split_sentences=True)


@pytest.mark.parametrize(("name", "text"), [("x.txt", b"1 2\n"), ("x.jsonl", b'{"text": "1 2"}\n')])
def test_a_byte_order_mark_is_no_text(tmp_path, name, text):
    assert run(tmp_path, b"\xef\xbb\xbf" + text, name)[1] == [[1, 2]]
    assert run(tmp_path, gzip.compress(b"\xef\xbb\xbf" + text), name + ".gz")[1] == [[1, 2]]
    with pytest.raises(DataError, match=f"{name}:1: not UTF-8 but UTF-16"):
        run(tmp_path, text.decode().encode("utf-16"), name)


@pytest.mark.parametrize("kind", ["lines", "jsonl", "text", "wikitext"])
def test_documents_without_end_are_named_and_left_out(tmp_path, kind):
    filler = b'{"text": "1"}' if kind == "jsonl" else b"1"
    long = (b"1 " * 50 + b"\n") * 50_000 if kind in ("text", "wikitext") else b"1 " * 2_500_000
    separator = {"text": b"\n\n", "wikitext": b"\n = A = \n"}.get(kind, b"\n")
    content = gzip.compress(separator.join([filler, long, filler]) + b"\n")
    options = InputOptions(input_format=kind, max_document_bytes=1000)
    with pytest.raises(DataError, match=r"x.gz:[23]: longer than .*1000 bytes.*--max-document-bytes"):
        run(tmp_path, content, "x.gz", options=options)
    report, sequences, _ = run(tmp_path, content, "x.gz", options=options, skip_bad_documents=True)
    assert sequences == [[1], [1]] and report.bad_documents == 1


def test_a_key_that_is_there_twice_is_named(tmp_path):
    with pytest.raises(DataError, match="x.jsonl:1: not JSON .the key 'text' appears twice"):
        run(tmp_path, b'{"text": "1", "text": "2"}\n')


def test_the_summary_counts_each_key_for_itself(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"a": "1 2", "b": ""}\n{"a": "3", "b": "4"}\n')
    words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--json-keys", "a", "b"]
    paths = ["--input", str(tmp_path / "x.jsonl"), "--output-prefix", str(tmp_path / "o")]
    assert preprocess_data.main([*words, *paths]) == 0
    out = capsys.readouterr().out
    assert "o_a_document.bin and .idx: 2 documents (0 empty), 3 tokens" in out
    assert "o_b_document.bin and .idx: 2 documents (1 empty), 1 tokens" in out


@pytest.mark.parametrize("partitions", ["1", "3"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, partitions):
    (tmp_path / "x.jsonl").write_text('{"text": "%s"}\n' % ("1 2 3 " * 2000) * 20)
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from parallel_core.prepare import preprocess_data; sys.exit(preprocess_data.main(sys.argv[1:]))"
    )
    words = ["--input", str(tmp_path / "x.jsonl"), "--output-prefix", str(tmp_path / "out"), "--partitions", partitions]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cannot be written: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_mindrecord_input_refuses_what_it_cannot_do(tmp_path, capsys):
    (tmp_path / "x").write_bytes(b"")
    words = ["--input", str(tmp_path / "x"), "--input-format", "mindrecord", "--output-prefix", str(tmp_path / "o")]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--append-eod", "--workers", "2"]
    assert preprocess_data.main(words) == 1
    assert "leave out --append-eod, --workers" in capsys.readouterr().err


def wikitext_by_patterns(text):
    """The definition, as patterns: quick to read, and cubic."""
    for old, new in wikitext._BEFORE_BRACKETS:
        text = text.replace(old, new)
    for pattern, new in (
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
    ):
        text = re.sub(pattern, new, text)
    for old, new in wikitext._AFTER_BRACKETS:
        text = text.replace(old, new)
    return text


@settings(max_examples=300, deadline=None)
@given(st.text("()[]{}\"' \n\u00a0\u2003ab.=@,", max_size=40))
def test_wikitext_is_cleaned_as_the_patterns_say(text):
    assert wikitext.wikitext_clean(text) == wikitext_by_patterns(text)


def sentences_by_patterns(text, keep_newlines):
    """The definition: the pattern from every place, the last word of all of the sentence."""
    found, start = [], 0
    pattern = sentences._ENDINGS.pattern.removeprefix("(?<![.!?])")
    for match in re.compile(pattern).finditer(text):
        words = text[start : match.start()].rsplit(None, 1)
        last_word = words[-1].strip("\"'([\u2018\u201c") if words else ""
        is_initial = len(last_word) == 1 and last_word.isupper() and last_word != "I"
        if text[match.start()] == "." and (is_initial or last_word.lower() in sentences._ABBREVIATIONS):
            continue
        keeps_gap = keep_newlines and "\n" in match.group(1)
        found.append(text[start : match.end() if keeps_gap else match.start(1)])
        start = match.end()
    return [sentence for sentence in [*found, text[start:]] if sentence.strip()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["Mr", "A", "b", *".!? \n\")(9\u201d"])), st.booleans())
def test_sentences_are_split_as_the_patterns_say(parts, keep_newlines):
    text = "".join(parts)
    assert sentences.split_sentences(text, keep_newlines) == sentences_by_patterns(text, keep_newlines)


def merge_by_rounds(parts, ranks):
    """The definition: find the pair of lowest rank, join it everywhere from the left, and begin again."""
    while len(parts) > 1:
        best = min(zip(parts[:-1], parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, position = [], 0
        while position < len(parts):
            if tuple(parts[position : position + 2]) == best:
                merged.append("".join(best))
                position += 2
            else:
                merged.append(parts[position])
                position += 1
        parts = merged
    return parts


symbols = st.sampled_from(["a", "b", "c", "ab", "aa", "bc", "aab", "abc"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.tuples(symbols, symbols), unique=True, max_size=12))
@example(list("abab"), [("ab", "a"), ("a", "b")])
def test_byte_pairs_are_joined_in_rounds(parts, pairs):
    ranks = {pair: rank for rank, pair in enumerate(pairs)}  # in any order, also one that no training would give
    assert merge_pairs(parts, ranks) == merge_by_rounds(parts, ranks)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ('{"<|endoftext|>": true}', "must map each token to its id"),
        ('{"<|endoftext|>": 0, "a": -1}', "gives a token the id -1"),
        ('{"<|endoftext|>": 0, "a": 1000000000000000000000000000000}', "gives a token the id 1000000000"),
        ('{"<|endoftext|>": 0, "a": 0}', "gives one id to several tokens"),
        ('{"<|endoftext|>": 0, "a": 2000000000}', "has 2 tokens and an id of 2000000000"),
        ('{"<|endoftext|>": 0, "<|endoftext|>": 1}', "appears twice"),
        ('{"<|endoftext|>": 0, "\\ud800": 1}', "lone surrogate"),
        ("[" * 100_000, "nested too deep"),
        ('{"<|endoftext|>": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_wrong_vocabularies_are_named(tmp_path, vocabulary, message):
    (tmp_path / "vocab.json").write_text(vocabulary)
    with pytest.raises(DataError, match=message):
        build_tokenizer(
            "GPT2BPETokenizer", vocab_file=str(tmp_path / "vocab.json"), merge_file=str(BPE / "merges.txt")
        )


def test_a_sentencepiece_model_with_names_that_are_no_text_is_named(tmp_path):
    content = Path(bundled_tokenizer_model()).read_bytes()
    (tmp_path / "x.model").write_bytes(content.replace(b"<MASK>", b"<M\xff\xfe\xff>", 1))
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", tokenizer_model=str(tmp_path / "x.model"))


@pytest.mark.parametrize("size", [-1, 2**31 - 1, 10**30])
def test_a_null_vocabulary_has_a_size_that_ids_can_have(size):
    with pytest.raises(ConfigError, match="vocab_size="):
        NullTokenizer(size)


class PanicException(BaseException):
    """What Rust's panics arrive as."""


class FakeTokenizer:
    """What is used of the tokenizers library, which is optional: `<s>` around a text, words by their first letter."""

    vocabulary = {"<s>": 0, "a": 1, "b": 2, "</s>": 3, "[SEP]": 5}

    @classmethod
    def from_file(cls, path):
        if "panic" in Path(path).read_text():
            raise PanicException("called `Option::unwrap()` on a `None` value\x1b[31m")
        return cls()

    def get_vocab(self, with_added_tokens):
        assert with_added_tokens
        return self.vocabulary

    def num_special_tokens_to_add(self, is_pair):
        assert not is_pair
        return 1

    def encode(self, text, add_special_tokens):
        if "?" in text:
            raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")
        return types.SimpleNamespace(ids=[0] * add_special_tokens + [self.vocabulary[word[0]] for word in text.split()])


@pytest.fixture
def fake_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=FakeTokenizer))
    (tmp_path / "tokenizer.json").write_text("{}")

    def build(config=None, special=None, **options):
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (tmp_path / name).unlink(missing_ok=True)
            if content is not None:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path), **options)

    return build


def test_special_tokens_around_texts_are_put_in_where_megatron_does(fake_library):
    # Megatron-core 0.16.1 needs the flag; its legacy class, and later versions without their flag, put them in
    assert fake_library().tokenize("a b") == [1, 2] and fake_library().leaves_out_special_tokens
    assert fake_library(tokenizer_hf_include_special_tokens=True).tokenize("a b") == [0, 1, 2]
    assert fake_library(legacy_tokenizer=True).tokenize("a b") == [0, 1, 2]
    identity = fake_library(tokenizer_hf_include_special_tokens=True).unique_identifiers
    assert list(identity)[1:] == [
        "tokenizer_path", "vocab_file", "merges_file", "additional_special_tokens", "use_fast", "trust_remote_code",
        "include_special_tokens",
    ] and identity["include_special_tokens"] == "True"  # fmt: skip


@pytest.mark.parametrize(
    ("config", "special", "eod"),
    [
        (None, None, 3),  # the usual name
        ({"eos_token": "a"}, None, 1),
        (None, {"eos_token": {"content": "b", "lstrip": False}}, 2),
        ({}, {"eos_token": "b"}, 2),
        ({"eos_token": "a"}, {"eos_token": "b"}, 2),
        ({"eos_token": "a", "added_tokens_decoder": {}}, {"eos_token": "b"}, 1),
        ({"eos_token": None, "added_tokens_decoder": {}}, {"eos_token": "b"}, 2),
        ({"sep_token": "[SEP]"}, None, 5),
        ({"sep_token": "[SEP]", "eos_token": "a"}, None, 1),
    ],
)
def test_the_end_of_a_document_is_the_token_that_the_files_name(fake_library, config, special, eod):
    assert fake_library(config, special).eod == eod


def test_what_a_hugging_face_folder_has_wrong_is_named(fake_library, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="has no token 'x', which the files beside it name"):
        fake_library({"eos_token": "x"})
    for wrong in ([], ["</s>"], 5, True, {"content": 5}):
        with pytest.raises(DataError, match="eos_token is"):
            fake_library({"eos_token": wrong})
    with pytest.raises(DataError, match="is a list instead of a JSON object"):
        fake_library("[]")
    with pytest.raises(DataError, match="nested too deep"):
        fake_library(None, "[" * 100_000)
    with pytest.raises(DataError, match="cannot read a text: 'WordLevel error"):
        fake_library().tokenize("?")
    monkeypatch.setattr(FakeTokenizer, "vocabulary", {})
    with pytest.raises(DataError, match="has no tokens"):
        fake_library()
    (tmp_path / "tokenizer.json").write_text("panic")
    with pytest.raises(DataError, match=r"the tokenizers library failed .*\\x1b\[31m"):
        fake_library()


def test_it_is_said_which_special_tokens_documents_get(fake_library, tmp_path, caplog):
    fake_library()
    for include, said in ((None, True), (False, False), (True, False)):
        caplog.clear()
        spec = TokenizerSpec(
            "HuggingFaceTokenizer", str(tmp_path), tokenizer_hf_include_special_tokens=include
        )
        run(tmp_path, b'{"text": "a b"}\n', tokenizer=spec)
        assert ("say which you want" in caplog.text) is said


def test_the_command_line_takes_megatrons_tokenizer_flags():
    parse = preprocess_data.build_parser().parse_args
    base = ["--input", "x", "--output-prefix", "y", "--tokenizer-type", "HuggingFaceTokenizer"]
    for words, include, legacy in (
        ([], None, False),
        (["--tokenizer-hf-include-special-tokens"], True, False),
        (["--tokenizer-hf-no-include-special-tokens"], False, False),
        (["--legacy-tokenizer"], None, True),
        (["--tokenizer-sentencepiece-legacy", "--tokenizer-hf-use-fast"], None, False),
    ):
        spec = TokenizerSpec.from_arguments(parse([*base, *words]))
        assert (spec.tokenizer_hf_include_special_tokens, spec.legacy_tokenizer) == (include, legacy)


# --- blends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[1]", '{"train": [{}]}', '{"train": "a"}', '{"train": [true]}', "[" * 10_000])
def test_lists_of_paths_are_read_by_type(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json"):
        blends_from_arguments(per_split_data_args_path=str(tmp_path / "x.json"))


def test_shares_beyond_numbers_are_named(pair):
    with pytest.raises(ConfigError, match="split="):
        make_config(pair, split="9" * 400 + ",1,0")
    with pytest.raises(ConfigError, match="has weights"):
        blends_from_arguments(data_path=["1e308", "a", "1e308", "b"])


def test_a_builder_left_by_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), IndexedDatasetBuilder(str(tmp_path / "x.bin")) as builder:
        builder.add_document([1], [1])
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_documents_for_a_tokenizer_may_be_lists(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ["a", "b"]}\n')
    from parallel_core.prepare.train_tokenizer import training_lines

    assert list(training_lines(read_documents([str(tmp_path / "x.jsonl")], InputOptions()))) == ["a", "b"]
