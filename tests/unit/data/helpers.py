"""What several data tests build their input with."""

from __future__ import annotations

import numpy as np

from parallel_core.data import Blend, GPTDatasetConfig, IndexedDatasetBuilder
from parallel_core.data.tokenizer import NullTokenizer


def write_pair(prefix, documents, dtype=np.int32):
    """Write a pair with one sequence per document."""
    with IndexedDatasetBuilder(f"{prefix}.bin", dtype) as builder:
        for tokens in documents:
            builder.add_document(tokens, [len(tokens)])
        builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered_documents(lengths):
    """Documents in which every token is another number, so that samples can be traced back."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths)]


def make_config(prefix=None, **options):
    options.setdefault("random_seed", 7)
    options.setdefault("sequence_length", 8)
    options.setdefault("tokenizer", NullTokenizer(100_000))
    options.setdefault("split", "1,0,0")
    if prefix is not None:
        options.setdefault("blend", Blend((str(prefix),)))
    return GPTDatasetConfig(**options)
