"""The corpus and tokenizer that come with the package, ready for a first run without any preparation."""

from __future__ import annotations

import os
from pathlib import Path

from parallel_core.bundled import cache_folder, is_checkout, shared_folder
from parallel_core.data.files import exclusive_lock, parse_json, read_text
from parallel_core.data.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    bin_path,
    idx_path,
    optimal_dtype,
)
from parallel_core.data.sentences import split_sentences
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.data.tokenizer.factory import build_tokenizer
from parallel_core.errors import DataError

_NAME = "corpus_text_document"
_NAME_OF_SENTENCES = "corpus_text_sentence"


def bundled_data_folder() -> Path:
    """Return the folder of the bundled text: `data/` of the checkout, or the installed package's copy.

    Raises:
        DataError: It is not there.
    """
    folder = shared_folder() / "data"
    if not (folder / "corpus.jsonl").is_file() or not (folder / "tokenizer.model").is_file():
        raise DataError(
            f"the bundled corpus is not in {folder}, where the repository and the installed package have it. Restore "
            "it, or give --data-path, --tokenizer-type and --tokenizer-model."
        )
    return folder


def bundled_tokenizer_model() -> str:
    """Return the path of the bundled SentencePiece model (2048 ids; use it as SentencePieceTokenizer)."""
    return str(bundled_data_folder() / "tokenizer.model")


def bundled_tokenizer(wordpiece: bool = False) -> tuple[str, dict[str, str]]:
    """Return the type of the bundled tokenizer and the argument that names its file.

    Args:
        wordpiece: an encoder's, of 2048 pieces without case.
    """
    if wordpiece:
        return "BertWordPieceLowerCase", {"vocab_file": str(bundled_data_folder() / "vocab.txt")}
    return "SentencePieceTokenizer", {"tokenizer_model": bundled_tokenizer_model()}


def prepare_bundled_corpus(cache_dir: str | None = None, sentences: bool = False) -> str:
    """Return the path prefix of the bundled corpus as `.bin/.idx`, tokenising it on first use.

    Any number of processes may call this at once: one builds, the others wait and read its files.

    Args:
        cache_dir: Folder for the files; by default `data/prepared` of the checkout, or of the user's cache folder when
            the package is installed.
        sentences: Make of each sentence a sequence, of WordPiece (an encoder's data).

    Raises:
        DataError: The corpus is not there, or the folder cannot be written.
    """
    source = bundled_data_folder() / "corpus.jsonl"
    kind, files = bundled_tokenizer(sentences)
    tokenizer = build_tokenizer(kind, **files)  # type: ignore[arg-type]
    folder = Path(cache_dir) if cache_dir is not None else _prepared_folder()
    prefix = str(folder / (_NAME_OF_SENTENCES if sentences else _NAME))
    newest_input = max(os.path.getmtime(file) for file in (str(source), *files.values()))
    if _is_ready(prefix, newest_input, tokenizer):
        return prefix
    try:
        with exclusive_lock(prefix + ".lock"):
            if not _is_ready(prefix, newest_input, tokenizer):
                _tokenize(source, tokenizer, prefix, sentences)
    except OSError as error:
        raise DataError(
            f"the bundled corpus cannot be prepared in {folder}: {error}. Name a folder that can be written "
            "(cache_dir, or --data-cache-path)."
        ) from error
    return prefix


def _prepared_folder() -> Path:
    # an installed package's folder may be read-only, or shared by users who cannot write it
    return bundled_data_folder() / "prepared" if is_checkout() else cache_folder() / "data" / "prepared"


def _is_ready(prefix: str, newest_input: float, tokenizer: MegatronTokenizer) -> bool:
    # the index is put in place last, so a new enough one means that both files were whole
    if not IndexedDataset.exists(prefix) or os.path.getmtime(idx_path(prefix)) < newest_input:
        return False
    try:
        made = IndexedDataset(prefix)
        first = made.get(0)
        if prefix.endswith(_NAME_OF_SENTENCES):
            return bool(len(made) and first.max() < tokenizer.vocab_size)
    except (DataError, IndexError):
        return False  # damaged since
    return bool(first[-1:] == tokenizer.eod)


def _tokenize(source: Path, tokenizer: MegatronTokenizer, prefix: str, sentences: bool) -> None:
    with IndexedDatasetBuilder(bin_path(prefix), optimal_dtype(tokenizer.vocab_size)) as builder:
        for number, line in enumerate(read_text(str(source)).rstrip("\n").split("\n"), 1):
            try:
                text = parse_json(line)["text"]
                parts = split_sentences(text) if sentences else [text]
                end = [] if sentences else [tokenizer.eod]
                found = [[*tokenizer.tokenize(part), *end] for part in parts]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{source}:{number} is no JSON object with a text ({error}). Restore it.") from error
            found = [tokens for tokens in found if tokens]
            builder.add_document([token for tokens in found for token in tokens], list(map(len, found)))
        builder.finalize(idx_path(prefix))
