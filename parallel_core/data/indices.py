"""Which token goes into which sample: Megatron's document, sample and shuffle indices, in vectorised NumPy.

Pure functions; equal inputs give bitwise the arrays Megatron builds with its C++ helpers.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np

from parallel_core.errors import DataError

# Megatron keeps the last, partly used epoch apart when it would use less than this share of it
_SEPARATE_FINAL_EPOCH_BELOW = 0.80
_BLOCK = 1 << 21


class EpochPlan(NamedTuple):
    """How often a dataset is gone through to reach the requested number of samples."""

    num_epochs: int
    tokens_per_epoch: int
    separate_final_epoch: bool
    num_samples_sans_final_epoch: int
    """Samples that start before the final epoch's share; meaningful when it is kept separate."""


def plan_epochs(tokens_per_epoch: int, num_samples: int | None, sequence_length: int, extra: int = 1) -> EpochPlan:
    """Return the number of epochs for `num_samples` and whether the last one is shuffled on its own.

    Args:
        tokens_per_epoch: Tokens of all sequences of the split.
        num_samples: Samples asked for; None asks for one epoch.
        sequence_length: Tokens per sample.
        extra: 1 when a sample has one token more, for the labels; else 0.

    Raises:
        DataError: There are no tokens, or fewer than a sample needs in an arrangement Megatron cannot build either.
    """
    if tokens_per_epoch <= 0:
        raise DataError("there are no tokens to make samples of: every document of this split is empty.")
    if num_samples is None:
        num_epochs = 1
    else:
        num_epochs = max(1, -(-(num_samples * sequence_length + extra) // tokens_per_epoch))
    if num_epochs == 1 or num_samples is None:
        return EpochPlan(1, tokens_per_epoch, False, 0)
    sans_final = ((num_epochs - 1) * tokens_per_epoch - extra) // sequence_length
    from_final = num_samples - sans_final
    per_epoch = (tokens_per_epoch - extra) // sequence_length
    if not 0 <= from_final <= per_epoch + 1:
        raise DataError(
            f"{num_samples} samples of {sequence_length} tokens from {tokens_per_epoch} tokens per epoch leave "
            f"{from_final} samples to the last of {num_epochs} epochs, which has {per_epoch}. Use more data or a "
            "shorter sequence."
        )
    # int(0.80 * n) truncates a rounded product; both matter for equality with Megatron
    separate = from_final < int(_SEPARATE_FINAL_EPOCH_BELOW * per_epoch)
    return EpochPlan(num_epochs, tokens_per_epoch, separate, sans_final)


def check_index_memory(num_bytes: int, num_samples: int) -> None:
    """Refuse a number of samples whose order alone does not fit in this machine's memory.

    Args:
        num_bytes: Size of the indices.
        num_samples: What was asked for, for the message.

    Raises:
        DataError: It does not fit.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > memory:
        raise DataError(
            f"the order of {num_samples} samples takes {num_bytes / 2**30:.0f} GB, more than the {memory / 2**30:.0f} "
            "GB of memory there are. Ask for fewer samples (--train-iters, --train-samples, --eval-iters)."
        )


def build_document_index(
    documents: np.ndarray, num_epochs: int, random_state: np.random.RandomState, separate_final_epoch: bool
) -> np.ndarray:
    """Return the order of documents over all epochs.

    Args:
        documents: Indices of the split's documents, int32 [D].
        num_epochs: Number of repetitions.
        random_state: Advanced by one shuffle, or two when the final epoch is separate.
        separate_final_epoch: Shuffle the first `num_epochs - 1` epochs together and the last alone.

    Returns:
        int32 [num_epochs * D].
    """
    first = num_epochs - 1 if separate_final_epoch and num_epochs > 1 else num_epochs
    index = np.tile(np.asarray(documents, dtype=np.int32), first)
    random_state.shuffle(index)
    if first == num_epochs:
        return index
    last = np.array(documents, dtype=np.int32)
    random_state.shuffle(last)
    return np.concatenate((index, last))


def num_samples_in(num_tokens: int, sequence_length: int, drop_last_partial_sequence: bool, extra: int) -> int:
    """Return how many samples `num_tokens` tokens give."""
    if drop_last_partial_sequence:
        return (num_tokens - extra) // sequence_length
    # Megatron's C++ rounds to float32 before it divides; above 16 Mi tokens the last digit is not exact there either
    return math.ceil(np.float32(num_tokens - extra) / np.float32(sequence_length))


def build_sample_index(
    sequence_lengths: np.ndarray,
    document_index: np.ndarray,
    sequence_length: int,
    plan: EpochPlan,
    drop_last_partial_sequence: bool = True,
    extra: int = 1,
) -> np.ndarray:
    """Return where each sample starts, as (position in `document_index`, token offset in that document).

    A sample of `sequence_length + extra` tokens starts at token `k * sequence_length` of the concatenated documents.
    Row `k > 0` names the document that holds token `k * sequence_length - 1 + extra`: with the extra token a boundary
    that falls between two documents belongs to the later one, without it to the end of the earlier one. Memory beyond
    the result is bounded: documents are summed up in blocks.

    Args:
        sequence_lengths: Tokens of every sequence of the dataset, int32 [N].
        document_index: Order of sequences, int32 [M].
        sequence_length: Tokens per sample.
        plan: From `plan_epochs`.
        drop_last_partial_sequence: Leave out a last sample that is short.
        extra: 1 when samples have one token more than `sequence_length`, else 0.

    Returns:
        int32 [samples + 1, 2] (int64 when a value could exceed int32).
    """
    num_tokens = plan.num_epochs * plan.tokens_per_epoch
    num_samples = num_samples_in(num_tokens, sequence_length, drop_last_partial_sequence, extra)
    largest = max(len(document_index), int(sequence_lengths.max(initial=0)))
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    index = np.zeros((max(num_samples, 0) + 1, 2), dtype)
    row, tokens_before = 1, 0
    for start in range(0, len(document_index), _BLOCK):
        lengths = sequence_lengths[document_index[start : start + _BLOCK]]
        ends = np.cumsum(lengths, dtype=np.int64)
        ends += tokens_before
        # rows whose token k*L - 1 + extra lies in this block
        last_row = min(num_samples, (int(ends[-1]) - extra) // sequence_length)
        for first in range(row, last_row + 1, _BLOCK):
            boundaries = np.arange(first, min(first + _BLOCK, last_row + 1), dtype=np.int64) * sequence_length
            position = np.searchsorted(ends, boundaries - 1 + extra, side="right")
            rows = slice(first, first + len(boundaries))
            index[rows, 0] = position + start
            index[rows, 1] = boundaries - (ends[position] - lengths[position])
        row = max(row, last_row + 1)
        tokens_before = int(ends[-1])
    # boundaries beyond the last token: the walk stops at the last document's end
    index[row:, 0] = len(document_index) - 1
    index[row:, 1] = int(sequence_lengths[document_index[-1]]) - extra
    return index


def build_shuffle_index(num_samples: int, total_size: int, random_state: np.random.RandomState) -> np.ndarray:
    """Return the order in which samples are visited.

    Args:
        num_samples: The first range `[0, num_samples)`, shuffled on its own.
        total_size: The second range is `[num_samples, total_size)`; empty when equal.
        random_state: Advanced by one or two shuffles.

    Returns:
        uint32 [total_size], or int64 from 2^32 - 2 samples on.
    """
    dtype = np.uint32 if total_size < np.iinfo(np.uint32).max - 1 else np.int64
    index = np.arange(total_size, dtype=dtype)
    random_state.shuffle(index[:num_samples])
    if num_samples < total_size:
        random_state.shuffle(index[num_samples:])
    return index
