"""One reader per tensor parallel group: rank 0 reads, the others receive, and most middle pipeline stages get nothing.

The transfer itself is the caller's: it broadcasts one flat int32 array per micro-batch, whatever the batch holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from parallel_core.data.loader import Batch
from parallel_core.errors import DataError

Broadcast = Callable[[np.ndarray], np.ndarray]
_END, _FAILED = 1, 2
_FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "document_start")
ENCODER_FIELDS = ("tokens", "attention_mask", "tokentype_ids", "labels", "loss_mask", "is_random")
"""What samples of masked words have; the last is one number for each sample."""
SPAN_FIELDS = ("tokens", "attention_mask", "tokentype_ids", "start_positions", "end_positions")
"""What samples of question answering have; the last two are one number for each sample."""
CLASS_FIELDS = ("tokens", "lengths", "label")
"""What samples of texts with classes have; the last two are one number for each sample."""
_OF_A_SAMPLE = ("is_random", "start_positions", "end_positions", "lengths", "label")


def fields_of(bert_head: str, num_labels: int = 0) -> tuple[str, ...] | None:
    """Return the arrays of an encoder's batch, or of a batch of texts with classes; None for a GPT's."""
    if num_labels:
        return CLASS_FIELDS
    if bert_head == "none":
        return None
    return SPAN_FIELDS if bert_head == "question_answering" else ENCODER_FIELDS


def stage_needs_data(is_first_stage: bool, is_last_stage: bool, reset_attention_mask: bool = False) -> bool:
    """Return whether a pipeline stage reads micro-batches: the first needs tokens, the last labels.

    With `reset_attention_mask`, and in an encoder, every stage does, because its attention needs to know where
    documents start or where there is padding.
    """
    return is_first_stage or is_last_stage or reset_attention_mask


def pack_batch(batch: Batch, fields: Sequence[str] = _FIELDS) -> np.ndarray:
    """Return the arrays of a micro-batch as one int32 array; floats go by their bits.

    Args:
        batch: `tokens`, `labels`, `loss_mask`, `position_ids` and perhaps `document_start`, each [B, S]; or others.
        fields: Which arrays it may have, in their order; those of one number for each sample are [B].
    """
    shape = batch["tokens"].shape
    parts = [
        np.repeat(batch[name][:, None], shape[1], 1) if name in _OF_A_SAMPLE else batch[name]
        for name in fields
        if name in batch
    ]
    packed = [part.view(np.int32) if part.dtype == np.float32 else part.astype(np.int32, copy=False) for part in parts]
    return np.stack(packed).reshape(-1)


def unpack_batch(
    packed: np.ndarray,
    micro_batch_size: int,
    sequence_length: int,
    has_document_start: bool,
    fields: Sequence[str] | None = None,
) -> Batch:
    """Return the micro-batch that `pack_batch` packed.

    Args:
        packed: int32 [fields * B * S].
        micro_batch_size: B.
        sequence_length: S.
        has_document_start: Whether the batch has `document_start` (`reset_attention_mask`).
        fields: Which arrays it has, where they are others than a GPT's.

    Raises:
        DataError: The size does not fit: the ranks of the group disagree about the batch.
    """
    names = fields or (_FIELDS if has_document_start else _FIELDS[:-1])
    if packed.size != len(names) * micro_batch_size * sequence_length:
        raise DataError(
            f"a packed micro-batch of {packed.size} numbers is not {len(names)} arrays of {micro_batch_size} x "
            f"{sequence_length}: the tensor parallel ranks have different micro_batch_size, sequence_length or "
            "reset_attention_mask."
        )
    arrays = packed.astype(np.int32, copy=False).reshape(len(names), micro_batch_size, sequence_length)
    found = {name: array.view(np.float32) if name == "loss_mask" else array for name, array in zip(names, arrays)}
    return {name: array[:, 0].copy() if name in _OF_A_SAMPLE else array for name, array in found.items()}


class TensorParallelBatches:
    """The micro-batches of one rank, read by the first rank of its tensor parallel group only.

    The end of the data, and a failure to read, reach every rank of the group: none waits for a broadcast in vain.

    Args:
        source: Micro-batches on the group's first rank, None on the others.
        broadcast: Sends an int32 array from the group's first rank and returns it on every rank. On receiving ranks it
            is called with an array of the right size whose content does not matter.
        micro_batch_size: B.
        sequence_length: S.
        has_document_start: Whether batches have `document_start`.
        fields: Which arrays batches have, where they are others than a GPT's.
    """

    def __init__(
        self,
        source: Iterator[Batch] | None,
        broadcast: Broadcast,
        *,
        micro_batch_size: int,
        sequence_length: int,
        has_document_start: bool = False,
        fields: Sequence[str] | None = None,
    ) -> None:
        self._fields = fields
        self._source = source
        self._broadcast = broadcast
        self._shape = (micro_batch_size, sequence_length)
        self._has_document_start = has_document_start

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch, the same on every rank of the group.

        Communication: one broadcast of 4 (5 with document_start) * B * S + 1 int32.

        Raises:
            StopIteration: The first rank has no more micro-batches.
            DataError: The first rank could not read; there the original error is raised.
        """
        num_fields = len(self._fields or _FIELDS[: 5 if self._has_document_start else 4])
        message = np.zeros(num_fields * self._shape[0] * self._shape[1] + 1, np.int32)
        failure: Exception | None = None
        if self._source is not None:
            try:
                message[1:] = pack_batch(next(self._source), self._fields or _FIELDS)
            except StopIteration:
                message[0] = _END
            except Exception as error:
                message[0], failure = _FAILED, error
        received = self._broadcast(message)
        if failure is not None:
            raise failure
        if received[0] == _END:
            raise StopIteration
        if received[0] == _FAILED:
            raise DataError("the first rank of this tensor parallel group could not read its next micro-batch.")
        return unpack_batch(received[1:], *self._shape, self._has_document_start, self._fields)
