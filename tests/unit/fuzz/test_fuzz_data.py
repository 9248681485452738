"""Damaged and hostile data files: every reader returns what is right, or names what is wrong."""

from __future__ import annotations

import functools
import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel_core.data import (
    Blend,
    IndexedDataset,
    blends_from_arguments,
    build_tokenizer,
    build_train_valid_test_datasets,
    bundled_tokenizer_model,
    merge_indexed_datasets,
)
from parallel_core.data import bundled as bundled_module
from parallel_core.data.gpt_dataset import SampleIndices
from parallel_core.data.tokenizer.huggingface import special_tokens_beside
from parallel_core.errors import DataError
from parallel_core.prepare.preprocess import Encoder, PreprocessOptions, TokenizerSpec
from parallel_core.prepare.text_input import INPUT_FORMATS, InputOptions, parse_document, read_raw_documents
from tests.helpers.fuzzing import Target, fuzz, mutate_bytes, mutate_value
from tests.unit.data.helpers import make_config, numbered_documents, write_pair

BPE = Path(__file__).parents[2] / "golden" / "data" / "bpe"
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")


@functools.cache
def valid_pair() -> dict[str, bytes]:
    """The two files of a pair of documents, some empty, in uint16."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder) / "x", numbered_documents([3, 0, 7, 20, 1]), np.uint16)
        return {name: (Path(folder) / name).read_bytes() for name in ("x.bin", "x.idx")}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def change_one(rng: random.Random, files: dict[str, bytes]) -> dict[str, bytes]:
    name = rng.choice(sorted(files))
    return files | {name: mutate_bytes(rng, files[name])}


def make_pair(rng: random.Random) -> dict[str, bytes]:
    return change_one(rng, valid_pair())


def read_pair(files: dict[str, bytes], folder: Path) -> None:
    """Read a pair; what is accepted holds the tokens of the file, each in one sequence."""
    write(folder, files)
    dataset = IndexedDataset(str(folder / "x"))
    tokens = [dataset.get(index) for index in range(len(dataset))]
    assert b"".join(part.tobytes() for part in tokens) == files["x.bin"]
    merge_indexed_datasets([str(folder / "x")], str(folder / "merged"))
    assert (folder / "merged.bin").read_bytes() == files["x.bin"]
    config = make_config(folder / "x", sequence_length=4, path_to_cache=str(folder / "cache"))
    train = build_train_valid_test_datasets(config, (20, 0, 0))[0]
    for index in range(len(train)):
        train[index]


@functools.cache
def valid_cache() -> tuple[dict[str, bytes], SampleIndices]:
    """The files of a pair's cache, and what they hold."""
    folder = SCRATCH / "parallel_core_fuzz_cache"  # a cache is found again under the path of its data only
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write(folder, valid_pair())
    train = train_with_cache(folder)
    assert train.built_anew_on_cache_miss
    indices = [np.array(getattr(train, name)) for name in SampleIndices._fields]
    files = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    return files, SampleIndices(*indices)


def train_with_cache(folder: Path) -> Any:
    config = make_config(folder / "x", sequence_length=4, path_to_cache=str(folder / "cache"))
    return build_train_valid_test_datasets(config, (20, 0, 0))[0]


def make_cache(rng: random.Random) -> dict[str, bytes]:
    files = change_one(rng, valid_cache()[0])
    if rng.random() < 0.2:  # one file of another cache, whole
        first, second = rng.sample(sorted(files), 2)
        files[first] = files[second]
    return files


def read_cache(files: dict[str, bytes], _: Path) -> None:
    """Load damaged indices: whatever was done to them, the samples are the right ones."""
    folder = SCRATCH / "parallel_core_fuzz_cache"
    write(folder / "cache", files)
    train = train_with_cache(folder)
    for name, right in valid_cache()[1]._asdict().items():
        assert np.array_equal(getattr(train, name), right), name


def dump(value: Any) -> bytes:
    """Return a value as JSON; what is too deep for Python's writer becomes something too deep for its reader."""
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 100_000


def make_bpe(rng: random.Random) -> dict[str, bytes]:
    files = {name: (BPE / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    if rng.random() < 0.5:
        changed = mutate_value(rng, json.loads(files["vocab.json"]))
        return files | {"vocab.json": dump(changed)}
    return change_one(rng, files)


TEXTS = ("It is 1.5 million, isn't it?\n\n  <EOD> \u4e2d\u00fc\U0001f600", "", "a" * 3000, " " * 3000)


def use_tokenizer(tokenizer: Any) -> None:
    """Encode texts; ids are in the vocabulary and can be decoded."""
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.tokenize(text)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.detokenize(ids)


def read_bpe(files: dict[str, bytes], folder: Path) -> None:
    write(folder, files)
    paths = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    use_tokenizer(build_tokenizer("GPT2BPETokenizer", **paths))


def make_sentencepiece(rng: random.Random) -> bytes:
    return mutate_bytes(rng, Path(bundled_tokenizer_model()).read_bytes())


def read_sentencepiece(content: bytes, folder: Path) -> None:
    (folder / "x.model").write_bytes(content)
    for legacy in (False, True):
        use_tokenizer(
            build_tokenizer(
                "SentencePieceTokenizer", tokenizer_model=str(folder / "x.model"), legacy_tokenizer=legacy
            )
        )


def make_huggingface(rng: random.Random) -> dict[str, bytes]:
    settings = {
        "tokenizer.json": json.loads((BPE / "tokenizer.json").read_text()),
        "tokenizer_config.json": {"eos_token": "<|endoftext|>", "pad_token": None, "added_tokens_decoder": {}},
        "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>", "lstrip": False}},
    }
    name = rng.choice(sorted(settings))
    settings[name] = mutate_value(rng, settings[name])
    return {key: dump(value) for key, value in settings.items()}


def read_huggingface(files: dict[str, bytes], folder: Path) -> None:
    write(folder, files)
    use_tokenizer(build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(folder)))


def read_special_tokens(files: dict[str, bytes], folder: Path) -> None:
    write(folder, files)
    names = special_tokens_beside(str(folder / "tokenizer.json"))
    assert all(type(token) is str for token in names.values())


def make_text(rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(INPUT_FORMATS)
    fields = {"text": rng.choice((*TEXTS, ["One.", "Two."])), "meta": {"id": 1}, "n": 1.5}
    lines = [dump(mutate_value(rng, fields) if rng.random() < 0.5 else fields) for _ in range(4)]
    plain = b"\n = Title = \n".join([*lines, b"( US ) , ' s \" he said . \" ! ? 1 @.@ 5 [ ( ] { "])
    marks = rng.choice((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff\xfe\0\0"))
    content = mutate_bytes(rng, marks + plain)
    packed = rng.random() < 0.3
    content = gzip.compress(content, mtime=0) if packed else content
    if packed and rng.random() < 0.5:
        content = mutate_bytes(rng, content)
    return f"{kind}.txt{'.gz' if packed else ''}", content


def read_text(made: tuple[str, bytes], folder: Path) -> None:
    name, content = made
    (folder / name).write_bytes(content)
    options = InputOptions(input_format=name.split(".")[0], max_document_bytes=2000)
    tokenizer = TokenizerSpec("SentencePieceTokenizer", bundled_tokenizer_model())
    encoder = Encoder(PreprocessOptions((name,), "o", tokenizer, options, split_sentences=True))
    for raw in read_raw_documents([str(folder / name)], options):
        assert len(raw.content) <= 2000
        try:
            for text in parse_document(raw, ("text",)).texts.values():
                encoder.encode(text)
        except DataError:  # a bad document is left out
            continue


def make_long_text(rng: random.Random) -> str:
    """A megabyte of a few characters that patterns start, continue and end with."""
    alphabet = "".join(rng.sample("(([[{{\"\"''..!?  \n=@,A1sx<>&\u00a0", rng.randrange(1, 5)))
    if rng.random() < 0.5:
        return (alphabet + rng.choice(("", "<EOD>", "Mr. ", "\n"))) * (1_000_000 // (len(alphabet) + 5))
    return "".join(rng.choice(alphabet) * rng.randrange(1, 300_000) for _ in range(6))


def read_long_text(text: str, _: Path) -> None:
    from parallel_core.data.sentences import split_sentences
    from parallel_core.prepare.wikitext import is_wikitext_heading, wikitext_clean

    wikitext_clean(text)
    is_wikitext_heading(text)
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    legacy = {"tokenizer_model": bundled_tokenizer_model(), "legacy_tokenizer": True}
    build_tokenizer("SentencePieceTokenizer", **legacy).tokenize(text)
    paths = {"vocab_file": str(BPE / "vocab.json"), "merge_file": str(BPE / "merges.txt")}
    build_tokenizer("GPT2BPETokenizer", **paths).tokenize(text)


def make_null_text(rng: random.Random) -> str:
    return mutate_bytes(rng, b"1 2 999 7 1000 0 12").decode("utf-8", "replace")


def read_null_text(text: str, _: Path) -> None:
    encoder = Encoder(PreprocessOptions(("x",), "o", TokenizerSpec("NullTokenizer", vocab_size=1000)))
    ids, _lengths = encoder.encode(text)
    assert all(0 <= int(token) <= 1000 for token in ids)


def make_data_lists(rng: random.Random) -> bytes:
    lists = {"train": ["0.5", "a", 2, "b"], "valid": ["a"], "test": None}
    return dump(mutate_value(rng, lists))


def read_data_lists(content: bytes, folder: Path) -> None:
    (folder / "x").write_bytes(content)
    _, per_split = blends_from_arguments(per_split_data_args_path=str(folder / "x"))
    assert per_split is None or all(blend is None or isinstance(blend, Blend) for blend in per_split)


def make_corpus(rng: random.Random) -> bytes:
    return mutate_bytes(rng, b'{"text": "One."}\n{"text": "Two."}\n')


def read_corpus(content: bytes, folder: Path) -> None:
    (folder / "corpus.jsonl").write_bytes(content)
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=bundled_tokenizer_model())
    bundled_module._tokenize(folder / "corpus.jsonl", tokenizer, str(folder / "out"), sentences=False)
    IndexedDataset(str(folder / "out"))


TARGETS = {
    "pair": Target(make_pair, read_pair),
    "cache": Target(make_cache, read_cache),
    "bpe": Target(make_bpe, read_bpe),
    "sentencepiece": Target(make_sentencepiece, read_sentencepiece),
    "huggingface": Target(make_huggingface, read_huggingface),
    "special_tokens": Target(make_huggingface, read_special_tokens),
    "text": Target(make_text, read_text),
    "long_text": Target(make_long_text, read_long_text),
    "null_text": Target(make_null_text, read_null_text),
    "data_lists": Target(make_data_lists, read_data_lists),
    "corpus": Target(make_corpus, read_corpus),
}
SLOW = {"long_text": 3, "bpe": 15}
"""Inputs of the short run where one takes long."""


def skip_without_library(name: str) -> None:
    if name == "huggingface":
        pytest.importorskip("tokenizers")


@pytest.mark.parametrize("name", TARGETS)
def test_readers_name_what_is_wrong(name):
    skip_without_library(name)
    fuzz(__file__, name, SLOW.get(name, 40))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_readers_name_what_is_wrong_long(name):
    skip_without_library(name)
    fuzz(__file__, name, SLOW.get(name, 40) * 50, first=1000)
