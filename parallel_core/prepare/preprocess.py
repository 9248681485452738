"""Text to `.bin/.idx`: several processes tokenise, one writes; the output depends on neither their number nor speed."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from parallel_core.data.indexed_dataset import (
    IndexedDatasetBuilder,
    bin_path,
    idx_path,
    merge_indexed_datasets,
    optimal_dtype,
)
from parallel_core.data.sentences import split_sentences
from parallel_core.data.tokenizer import HuggingFaceTokenizer, MegatronTokenizer, TokenizerSpec
from parallel_core.errors import ConfigError, DataError, bullet_list
from parallel_core.prepare.text_input import (
    InputOptions,
    RawDocument,
    find_input_files,
    parse_document,
    read_raw_documents,
)

logger = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 18
_MAX_NAMED = 10


@dataclass(frozen=True)
class PreprocessOptions:
    """What `preprocess` does; the names are those of Megatron's tool."""

    input: tuple[str, ...]
    """Files or patterns."""
    output_prefix: str
    """Output is `{output_prefix}_{key}_{document|sentence}.bin` and `.idx`."""
    tokenizer: TokenizerSpec
    """How text becomes ids."""
    input_options: InputOptions = field(default_factory=InputOptions)
    """Fields and format of the input."""
    append_eod: bool = False
    """End every document with the end-of-document id."""
    split_sentences: bool = False
    """Store each sentence as a sequence of its own."""
    keep_newlines: bool = False
    """With `split_sentences`: line ends between sentences are kept."""
    workers: int = 1
    """Tokenising processes; 1 tokenises in this process."""
    partitions: int = 1
    """Round-robin shares the documents are dealt into and merged from (this sets their order)."""
    keep_sequential_samples: bool = False
    """Partitions are runs of documents instead, which leaves the order of the input."""
    skip_bad_documents: bool = False
    """Count and name malformed documents and go on; otherwise the first one stops the run."""

    def __post_init__(self) -> None:
        for name in ("workers", "partitions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.keep_newlines and not self.split_sentences:
            raise ConfigError("keep_newlines needs split_sentences; without it line ends are kept anyway.")


@dataclass
class FieldReport:
    """What a run wrote of one field."""

    output_prefix: str
    """Path prefix written."""
    documents: int = 0
    """Documents written."""
    empty_documents: int = 0
    """Of these, without any token."""
    tokens: int = 0
    """Tokens written."""


@dataclass
class PreprocessReport:
    """What a run did."""

    fields: dict[str, FieldReport] = field(default_factory=dict)
    """What was written, by field."""
    bytes_read: int = 0
    """Bytes of (uncompressed) input in documents."""
    seconds: float = 0.0
    """Time it took."""
    bad_documents: int = 0
    """Malformed documents left out."""
    bad_examples: list[str] = field(default_factory=list)
    """The first ten of them, each with file and line."""

    @property
    def output_prefixes(self) -> list[str]:
        """Path prefixes written, one per field."""
        return [field.output_prefix for field in self.fields.values()]

    @property
    def documents(self) -> int:
        """Documents written, the same number of every field."""
        return next((field.documents for field in self.fields.values()), 0)

    @property
    def empty_documents(self) -> int:
        """(Document, field) pairs without any token."""
        return sum(field.empty_documents for field in self.fields.values())

    @property
    def tokens(self) -> int:
        """Tokens written, all fields."""
        return sum(field.tokens for field in self.fields.values())


Progress = Callable[[PreprocessReport], None]


@dataclass
class _Chunk:
    """What a worker makes of a run of documents."""

    num_bytes: int
    fields: dict[str, list[tuple[np.ndarray, list[int]]]]
    """By field: (ids, sequence lengths) of every good document."""
    bad: list[str]


class Encoder:
    """Turns raw documents into ids, one field at a time.

    Args:
        options: The run's options.
    """

    def __init__(self, options: PreprocessOptions) -> None:
        self._options = options
        self._tokenizer = options.tokenizer.build()
        self._dtype = optimal_dtype(self._tokenizer.vocab_size)

    def encode(self, text: str | list[str]) -> tuple[np.ndarray, list[int]]:
        """Return the ids of `text` and the lengths of its sequences; both are empty for a text without tokens.

        Args:
            text: A text, or the sentences of one, each of which becomes a sequence.

        Raises:
            DataError: The tokenizer gave an id outside its own vocabulary, or sentences are to be split again.
        """
        options = self._options
        if isinstance(text, list):
            if options.split_sentences:
                raise DataError("the field is a list of sentences already; leave out --split-sentences")
            sentences = text
        else:
            sentences = split_sentences(text, options.keep_newlines) if options.split_sentences else [text]
        ids: list[int] = []
        lengths: list[int] = []
        for sentence in sentences:
            sentence_ids = self._tokenizer.tokenize(sentence)
            if sentence_ids:
                ids += sentence_ids
                lengths.append(len(sentence_ids))
        if ids and options.append_eod:
            ids.append(self._tokenizer.eod)
            lengths[-1] += 1
        array = np.array(ids, np.int64)
        vocab_size = self._tokenizer.vocab_size
        if ids and (int(array.min()) < 0 or int(array.max()) >= vocab_size):
            wrong = int(array[(array < 0) | (array >= vocab_size)][0])
            raise DataError(f"token id {wrong} is outside the vocabulary of {vocab_size} ids")
        return array.astype(self._dtype), lengths

    def encode_chunk(self, raws: Sequence[RawDocument]) -> _Chunk:
        """Return the ids of `raws` by field, and the messages of those that are malformed."""
        keys = self._options.input_options.json_keys
        chunk = _Chunk(sum(len(raw.content) for raw in raws), {key: [] for key in keys}, [])
        for raw in raws:
            try:
                texts = parse_document(raw, keys).texts
                encoded = [self._encode_named(raw, text) for text in texts.values()]
            except DataError as error:
                chunk.bad.append(str(error))
                if not self._options.skip_bad_documents:
                    break
                continue
            for key, item in zip(texts, encoded):
                chunk.fields[key].append(item)
        return chunk

    def _encode_named(self, raw: RawDocument, text: str | list[str]) -> tuple[np.ndarray, list[int]]:
        try:
            return self.encode(text)
        except DataError as error:
            raise DataError(f"{raw.path}:{raw.line}: {error}") from error


_worker_encoder: Encoder | None = None


def _start_worker(options: PreprocessOptions) -> None:
    global _worker_encoder
    _worker_encoder = Encoder(options)


def _encode_in_worker(raws: Sequence[RawDocument]) -> _Chunk:
    if _worker_encoder is None:
        raise DataError("the worker process was not initialised")
    return _worker_encoder.encode_chunk(raws)


def _chunks(raws: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    chunk: list[RawDocument] = []
    size = 0
    for raw in raws:
        chunk.append(raw)
        size += len(raw.content)
        if size >= _CHUNK_BYTES or raw.problem:  # a problem may be the last word: before reading on, it is said
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(chunks: Iterator[list[RawDocument]], options: PreprocessOptions) -> Iterator[_Chunk]:
    """Yield the encoded chunks in input order; a few per worker are in flight, so memory is bounded."""
    if options.workers == 1:
        encoder = Encoder(options)
        yield from map(encoder.encode_chunk, chunks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, _start_worker, (options,)) as pool:
        pending: deque[Future[_Chunk]] = deque()
        try:
            for chunk in itertools.islice(chunks, 3 * options.workers):
                pending.append(pool.submit(_encode_in_worker, chunk))
            while pending:
                result = pending.popleft().result()
                for chunk in itertools.islice(chunks, 1):
                    pending.append(pool.submit(_encode_in_worker, chunk))
                yield result
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process died (killed, or out of memory); no output was written. Use fewer --workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class _Outputs:
    """The builders of one run: per field, one per partition. Leaving it without `finalize` leaves nothing behind."""

    def __init__(self, options: PreprocessOptions, dtype: np.dtype) -> None:
        level = "sentence" if options.split_sentences else "document"
        self.prefixes = {
            key: f"{options.output_prefix}_{key}_{level}" for key in options.input_options.json_keys
        }
        # runs of documents, merged in order, give the input's order: one part does the same
        self.num_parts = 1 if options.keep_sequential_samples else options.partitions
        self._stack = ExitStack()
        try:
            self._parts = {key: self._part_prefixes(prefix) for key, prefix in self.prefixes.items()}
            self._builders = {
                key: [self._stack.enter_context(IndexedDatasetBuilder(bin_path(part), dtype)) for part in parts]
                for key, parts in self._parts.items()
            }
        except BaseException:
            self._stack.close()
            raise

    def _part_prefixes(self, prefix: str) -> list[str]:
        if self.num_parts == 1:
            return [prefix]
        try:
            os.makedirs(os.path.dirname(prefix) or ".", exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=".parts.", dir=os.path.dirname(prefix) or ".")
        except OSError as error:
            raise DataError(f"{prefix} cannot be written: {error}.") from error
        return [os.path.join(self._stack.enter_context(folder), str(part)) for part in range(self.num_parts)]

    def add(self, key: str, number: int, ids: np.ndarray, lengths: list[int]) -> None:
        self._builders[key][number % self.num_parts].add_document(ids, lengths)

    def finalize(self) -> None:
        for key, prefix in self.prefixes.items():
            for part, builder in zip(self._parts[key], self._builders[key]):
                builder.finalize(idx_path(part))
            if self.num_parts > 1:
                merge_indexed_datasets(self._parts[key], prefix)

    def __enter__(self) -> _Outputs:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def preprocess(options: PreprocessOptions, progress: Progress | None = None) -> PreprocessReport:
    """Write the tokens of the input files and return what was done; nothing appears before all is written.

    Args:
        options: What to read, how to tokenise and where to write.
        progress: Called after every chunk with the report so far.

    Raises:
        ConfigError: An option is wrong.
        DataError: An input cannot be read, holds no documents, or has a malformed one (unless these are skipped).
    """
    started = time.perf_counter()
    files = find_input_files(options.input)
    tokenizer = options.tokenizer.build()
    _say_which_special_tokens(options.tokenizer, tokenizer)
    report = PreprocessReport()
    with _Outputs(options, optimal_dtype(tokenizer.vocab_size)) as outputs:
        report.fields = {key: FieldReport(prefix) for key, prefix in outputs.prefixes.items()}
        raws = read_raw_documents(files, options.input_options)
        for chunk in _encoded(_chunks(raws), options):
            _note_bad(chunk, options, report)
            _write_chunk(chunk, outputs, report)
            report.seconds = time.perf_counter() - started
            if progress is not None:
                progress(report)
        if report.documents == 0:
            raise DataError(
                f"no documents in {', '.join(files[:5])}"
                + (f" and {len(files) - 5} more files" if len(files) > 5 else "")
                + (f"; all {report.bad_documents} were malformed:\n" + bullet_list(report.bad_examples)
                   if report.bad_documents else ": every file is empty. Check --input.")
            )
        outputs.finalize()
    report.seconds = time.perf_counter() - started
    return report


def _say_which_special_tokens(spec: TokenizerSpec, tokenizer: MegatronTokenizer) -> None:
    # Megatron-core 0.16 leaves them out unless asked; its legacy class and later versions put them in
    if (
        spec.tokenizer_hf_include_special_tokens is None
        and isinstance(tokenizer, HuggingFaceTokenizer)
        and tokenizer.leaves_out_special_tokens
    ):
        logger.warning(
            "the tokenizer's own special tokens are not put around documents; say which you want: "
            "--tokenizer-hf-include-special-tokens or --tokenizer-hf-no-include-special-tokens"
        )


def _note_bad(chunk: _Chunk, options: PreprocessOptions, report: PreprocessReport) -> None:
    if chunk.bad and not options.skip_bad_documents:
        raise DataError(f"{chunk.bad[0]}. Correct the line, or go on without such lines with --skip-bad-documents.")
    report.bad_documents += len(chunk.bad)
    report.bad_examples += chunk.bad[: max(0, _MAX_NAMED - len(report.bad_examples))]


def _write_chunk(chunk: _Chunk, outputs: _Outputs, report: PreprocessReport) -> None:
    for key, documents in chunk.fields.items():
        written = report.fields[key]
        for ids, lengths in documents:
            outputs.add(key, written.documents, ids, lengths)
            written.documents += 1
            written.tokens += len(ids)
            written.empty_documents += not len(ids)
    report.bytes_read += chunk.num_bytes
