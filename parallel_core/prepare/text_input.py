"""Documents from text, JSONL and gzip files, with every bad line named."""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from parallel_core.data.files import open_file, parse_json, why_not_a_file
from parallel_core.errors import ConfigError, DataError
from parallel_core.prepare.wikitext import is_wikitext_heading, wikitext_clean

INPUT_FORMATS = ("auto", "jsonl", "text", "lines", "wikitext")
_TEXT_SUFFIXES = (".txt", ".text", ".md")
_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "",
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True)
class InputOptions:
    """How files become documents."""

    json_keys: tuple[str, ...] = ("text",)
    """Fields of a JSONL line to read; for other formats the one name the text goes under."""
    input_format: str = "auto"
    """`jsonl`: a JSON object per line. `text`: documents separated by blank lines. `lines`: a document per line.
    `wikitext`: WikiText files, a document per section, cleaned.
    `auto`: `text` for .txt, .text and .md, else `jsonl`."""
    max_document_bytes: int = 64 << 20
    """Longer documents are malformed: memory is bounded, whatever a small .gz grows to."""

    def __post_init__(self) -> None:
        if self.input_format not in INPUT_FORMATS:
            raise ConfigError(f"input_format={self.input_format!r}: use one of {', '.join(INPUT_FORMATS)}.")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(f"json_keys={list(self.json_keys)} must name each field once, and at least one.")
        for key in self.json_keys:
            if not key or "\0" in key:
                raise ConfigError(f"json_keys has {key!r}, which cannot be part of the output's name.")
        if self.max_document_bytes < 1:
            raise ConfigError(f"max_document_bytes={self.max_document_bytes} must be 1 or more.")

    def format_of(self, path: str) -> str:
        """Return the format of the file `path`."""
        if self.input_format != "auto":
            return self.input_format
        name = path[:-3] if path.endswith(".gz") else path
        return "text" if name.endswith(_TEXT_SUFFIXES) else "jsonl"


class RawDocument(NamedTuple):
    """The bytes of one document, not yet decoded."""

    path: str
    line: int
    """Line number (from 1) where it starts."""
    content: bytes
    kind: str
    """One of `INPUT_FORMATS` except `auto`."""
    problem: str = ""
    """Why its bytes were not read, if they were not."""


class Document(NamedTuple):
    """The decoded text of one document."""

    texts: dict[str, str | list[str]]
    """Text by field name; a list where the field has its sentences one by one."""


def find_input_files(patterns: Sequence[str]) -> list[str]:
    """Return the files that `patterns` match, sorted within each pattern.

    Raises:
        DataError: A pattern matches no file.
    """
    files: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not found:
            problem = why_not_a_file(pattern) if os.path.lexists(pattern) else None
            raise DataError(f"input {pattern!r}: {problem or 'no such file'}.")
        files += found
    return files


def read_raw_documents(files: Sequence[str], options: InputOptions) -> Iterator[RawDocument]:
    """Yield the documents of `files` in order, undecoded; blank lines are not documents.

    Raises:
        DataError: A file cannot be read, or a .gz file is damaged.
    """
    for path in files:
        kind = options.format_of(path)
        try:
            with os.fdopen(open_file(path), "rb") as file, _unpacked(path, file) as handle:
                lines = _lines(handle, options.max_document_bytes)
                if kind in ("jsonl", "lines"):
                    for number, line, problem in lines:
                        if problem or line.strip():
                            yield RawDocument(path, number, line.rstrip(b"\r\n"), kind, problem)
                else:
                    yield from _blocks(path, kind, lines, options.max_document_bytes)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}") from error


def _unpacked(path: str, file: BinaryIO) -> AbstractContextManager[BinaryIO]:
    return gzip.GzipFile(fileobj=file, mode="rb") if path.endswith(".gz") else nullcontext(file)  # type: ignore[return-value]


def _lines(handle: BinaryIO, limit: int) -> Iterator[tuple[int, bytes, str]]:
    """Yield (number, line, problem) without a byte order mark; of a line over `limit` bytes there is only a problem."""
    number = 0
    while line := handle.readline(limit + 1):
        number += 1
        mark = next((mark for mark in _BYTE_ORDER_MARKS if number == 1 and line.startswith(mark)), b"")
        if mark and _BYTE_ORDER_MARKS[mark]:
            yield number, b"", f"not UTF-8 but {_BYTE_ORDER_MARKS[mark]}, by its first bytes; convert it (iconv)"
        elif len(line) > limit:
            yield number, b"", _too_long(limit)
        else:
            yield number, line[len(mark) :], ""
        rest = line if len(line) > limit else b""
        while rest and not rest.endswith(b"\n"):
            rest = handle.readline(1 << 20)


def _too_long(limit: int) -> str:
    return f"longer than {limit >> 20} MB ({limit} bytes); cut it, or raise --max-document-bytes"


def _blocks(path: str, kind: str, lines: Iterator[tuple[int, bytes, str]], limit: int) -> Iterator[RawDocument]:
    """Yield runs of lines: between blank lines in `text`, between headings in `wikitext`."""
    block: list[bytes] = []
    start, size, problem = 1, 0, ""
    for number, line, line_problem in lines:
        ends = is_wikitext_heading(line.decode("utf-8", "replace")) if kind == "wikitext" else not line.strip()
        if ends and not line_problem:
            if block or problem:
                yield RawDocument(path, start, b"".join(block).rstrip(b"\r\n"), kind, problem)
            block, size, problem = [], 0, ""
        elif line.strip() or line_problem:
            if not block and not problem:
                start = number
            size += len(line)
            problem = problem or line_problem or (_too_long(limit) if size > limit else "")
            if problem:
                block.clear()
            else:
                block.append(line)
    if block or problem:
        yield RawDocument(path, start, b"".join(block).rstrip(b"\r\n"), kind, problem)


def parse_document(raw: RawDocument, json_keys: Sequence[str]) -> Document:
    """Return the text of `raw`.

    Raises:
        DataError: It is too long, not UTF-8, not a JSON object, or a field is missing or neither text nor a list of
            sentences. The message begins with `path:line`.
    """
    place = f"{raw.path}:{raw.line}"
    if raw.problem:
        raise DataError(f"{place}: {raw.problem}")
    try:
        text = raw.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {raw.content[error.start]:#04x} at {error.start})") from error
    if raw.kind == "wikitext":
        text = " ".join(wikitext_clean(line.strip()) for line in text.splitlines()).strip()
    if raw.kind != "jsonl":
        return Document({json_keys[0]: text})
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{place}: a {type(content).__name__} instead of a JSON object")
    texts: dict[str, str | list[str]] = {}
    for key in json_keys:
        if key not in content:
            present = ", ".join(repr(name)[:40] for name in list(content)[:8]) or "none"
            raise DataError(f"{place}: no field {key!r}; the line has {present}")
        texts[key] = _checked_text(content[key], f"{place}: field {key!r}")
    return Document(texts)


def _checked_text(value: object, place: str) -> str | list[str]:
    """Return `value` if it is text, or a list of the sentences of a text."""
    sentences = value if isinstance(value, list) else [value]
    for sentence in sentences:
        if not isinstance(sentence, str):
            where = " has" if isinstance(value, list) else " is"
            raise DataError(f"{place}{where} a {type(sentence).__name__} instead of text")
        try:
            sentence.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{place} has a lone surrogate (an escape \\ud800 to \\udfff)") from error
    return value  # type: ignore[return-value]


def read_documents(patterns: Sequence[str], options: InputOptions) -> Iterator[Document]:
    """Yield the decoded documents of the files that `patterns` match; stop at the first bad one.

    Raises:
        DataError: A file or document cannot be read.
    """
    for raw in read_raw_documents(find_input_files(patterns), options):
        yield parse_document(raw, options.json_keys)
