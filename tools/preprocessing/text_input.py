"""Documents from text, JSONL and gzip files, with every bad line named."""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from parallel_core.errors import ConfigError, DataError
from tools.preprocessing.wikitext import is_wikitext_heading, wikitext_clean

INPUT_FORMATS = ("auto", "jsonl", "text", "lines", "wikitext")
_TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass(frozen=True)
class InputOptions:
    """How files become documents."""

    json_keys: tuple[str, ...] = ("text",)
    """Fields of a JSONL line to read; for other formats the one name the text goes under."""
    input_format: str = "auto"
    """`jsonl`: a JSON object per line. `text`: documents separated by blank lines. `lines`: a document per line.
    `wikitext`: WikiText files, a document per section, cleaned.
    `auto`: `text` for .txt, .text and .md, else `jsonl`."""

    def __post_init__(self) -> None:
        if self.input_format not in INPUT_FORMATS:
            raise ConfigError(f"input_format={self.input_format!r}: use one of {', '.join(INPUT_FORMATS)}.")
        if not self.json_keys or len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(f"json_keys={list(self.json_keys)} must name each field once, and at least one.")

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


class Document(NamedTuple):
    """The decoded text of one document."""

    texts: dict[str, str]
    """Text by field name."""


def find_input_files(patterns: Sequence[str]) -> list[str]:
    """Return the files that `patterns` match, sorted within each pattern.

    Raises:
        DataError: A pattern matches no file.
    """
    files: list[str] = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
        if not found:
            raise DataError(f"input {pattern!r}: no such file.")
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
            with _open(path) as handle:
                if kind in ("jsonl", "lines"):
                    for number, line in enumerate(handle, 1):
                        if line.strip():
                            yield RawDocument(path, number, line.rstrip(b"\r\n"), kind)
                else:
                    yield from _blocks(path, kind, handle)
        except (OSError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error


def _open(path: str) -> BinaryIO:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _blocks(path: str, kind: str, handle: BinaryIO) -> Iterator[RawDocument]:
    """Yield runs of lines: between blank lines in `text`, between headings in `wikitext`."""
    block: list[bytes] = []
    start = 1
    for number, line in enumerate(handle, 1):
        ends = is_wikitext_heading(line.decode("utf-8", "replace")) if kind == "wikitext" else not line.strip()
        if ends:
            if block:
                yield RawDocument(path, start, b"".join(block).rstrip(b"\r\n"), kind)
            block = []
        elif line.strip():
            if not block:
                start = number
            block.append(line)
    if block:
        yield RawDocument(path, start, b"".join(block).rstrip(b"\r\n"), kind)


def parse_document(raw: RawDocument, json_keys: Sequence[str]) -> Document:
    """Return the text of `raw`.

    Raises:
        DataError: It is not UTF-8, not a JSON object, or a field is missing or not text. The message begins with
            `path:line`.
    """
    place = f"{raw.path}:{raw.line}"
    try:
        text = raw.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {raw.content[error.start]:#04x} at {error.start})") from error
    if raw.kind == "wikitext":
        text = " ".join(wikitext_clean(line.strip()) for line in text.splitlines()).strip()
    if raw.kind != "jsonl":
        return Document({json_keys[0]: text})
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a {type(fields).__name__} instead of a JSON object")
    texts = {}
    for key in json_keys:
        if key not in fields:
            present = ", ".join(map(repr, list(fields)[:8])) or "none"
            raise DataError(f"{place}: no field {key!r}; the line has {present}")
        if not isinstance(fields[key], str):
            raise DataError(f"{place}: field {key!r} is a {type(fields[key]).__name__} instead of text")
        try:
            fields[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{place}: field {key!r} has a lone surrogate (an escape \\ud800 to \\udfff)") from error
        texts[key] = fields[key]
    return Document(texts)


def read_documents(patterns: Sequence[str], options: InputOptions) -> Iterator[Document]:
    """Yield the decoded documents of the files that `patterns` match; stop at the first bad one.

    Raises:
        DataError: A file or document cannot be read.
    """
    for raw in read_raw_documents(find_input_files(patterns), options):
        yield parse_document(raw, options.json_keys)
