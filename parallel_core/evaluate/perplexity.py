"""Perplexity of a file of texts: of each document, and of all of it as one text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from parallel_core.errors import ConfigError
from parallel_core.evaluate.score import Likelihood, likelihoods
from parallel_core.files import read_regular
from parallel_core.generate.generator import Generator
from parallel_core.records import parse_json

_LARGEST_FILE = 1 << 30


def read_documents(path: Path, key: str = "text") -> list[str]:
    """Return the documents of a file: one a line of JSON (`.jsonl`, `.json`), else the file is one.

    Raises:
        ConfigError: it cannot be read, or a line of JSON has no such text.
    """
    try:
        data = read_regular(path, _LARGEST_FILE)
        if path.suffix not in (".jsonl", ".json"):
            return [data.decode("utf-8")]
    except OSError as error:
        raise ConfigError(f"--data {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data {path}: is no UTF-8 ({error.reason} at byte {error.start})") from None
    documents = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            values = parse_json(line, f"{path}:{number}", ConfigError)
            text = values.get(key) if isinstance(values, dict) else None
            if not isinstance(text, str):
                raise ConfigError(f"{path}:{number}: has no text {key!r}; name it with --json-key")
            documents.append(text)
    if not documents:
        raise ConfigError(f"--data {path}: has no documents")
    return documents


def perplexity(
    it: Generator, documents: list[str], *, rolling: bool = False, stride: int | None = None
) -> dict[str, Any]:
    """Return the perplexity of documents.

    Args:
        it: the model, with a tokenizer.
        documents: the texts.
        rolling: as one text, an end of document between two; else each one knows nothing of the others.
        stride: see `score.windows_of`.

    Returns:
        `perplexity` (token-weighted: of the mean over all tokens), `mean_document_perplexity` (of documents, each
        counting alike; None when rolling), `logprob`, `tokens`, `bits_per_byte`, `documents`.

    Raises:
        ConfigError: the model has no tokenizer, or the stride cannot be.
    """
    if it.tokenizer is None:
        raise ConfigError(f"a text needs a tokenizer ({it.described.why_no_tokenizer})")
    eod, sizes = it.tokenizer.eod, [len(text.encode()) for text in documents]
    rows = [[eod, *it.tokens_of(text)] for text in documents]
    if rolling:
        rows, sizes = [[token for row in rows for token in row]], [sum(sizes)]
    each = likelihoods(it, rows, stride, sizes)
    total = sum(each, Likelihood(0.0, 0))
    counted = [one.perplexity for one in each if one.tokens]
    if not counted:
        raise ConfigError("the documents have no tokens")
    return {
        "perplexity": total.perplexity,
        "mean_document_perplexity": None if rolling else math.fsum(counted) / len(counted),
        "logprob": total.logprob,
        "tokens": total.tokens,
        "bits_per_byte": total.bits_per_byte,
        "documents": len(documents),
    }
