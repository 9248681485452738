"""Loss mask, positions and attention bounds of one sample."""

from __future__ import annotations

import numpy as np


def document_starts(tokens: np.ndarray, eod: int) -> np.ndarray:
    """Return, for every position, the first position of its document within the sample.

    An end-of-document token belongs to the document it ends.

    Args:
        tokens: Token ids [S].
        eod: The end-of-document id (0 is legal).

    Returns:
        int32 [S]; position s may attend to `[starts[s], s]` when the attention mask is reset.
    """
    starts = np.zeros(len(tokens), np.int32)
    ends = np.flatnonzero(tokens[:-1] == eod)
    starts[ends + 1] = ends + 1
    return np.maximum.accumulate(starts)


def attention_mask_from_document_starts(starts: np.ndarray) -> np.ndarray:
    """Return the mask Megatron's dataset gives: True where attention is forbidden.

    Args:
        starts: First attendable position of every position, int [..., S].

    Returns:
        bool [..., 1, S, S]; row is the query, column the key.
    """
    positions = np.arange(starts.shape[-1])
    masked = (positions[None, :] > positions[:, None]) | (positions < starts[..., :, None])
    return masked[..., None, :, :]


def loss_mask_and_positions(
    tokens: np.ndarray, eod: int, *, reset_position_ids: bool, eod_mask_loss: bool, starts: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss mask and position ids of a sample.

    Args:
        tokens: Token ids [S].
        eod: The end-of-document id.
        reset_position_ids: Count from 0 again after every end of document.
        eod_mask_loss: No loss at positions whose *input* token is the end of document.
        starts: `document_starts(tokens, eod)`; needed when positions are reset.

    Returns:
        float32 [S] of 0 and 1, and int32 [S] (exact integers).
    """
    loss_mask = np.ones(len(tokens), np.float32)
    if eod_mask_loss:
        loss_mask[tokens == eod] = 0.0
    position_ids = np.arange(len(tokens), dtype=np.int32)
    if reset_position_ids:
        position_ids -= document_starts(tokens, eod) if starts is None else starts
    return loss_mask, position_ids
