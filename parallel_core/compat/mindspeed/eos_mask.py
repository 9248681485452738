"""Positions and attention bounds from the end-of-document tokens in a batch, in exact integers."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core.compat import parallel_state
from parallel_core.data.masks import attention_mask_from_document_starts, document_starts
from parallel_core.errors import ConfigError, DataError


class EosMask(nn.Cell):
    """Keeps the documents of a sample apart. An end-of-document token belongs to the document it ends.

    Args:
        batch_size: rows of the batches; checked.
        seq_len: columns of the batches; checked.
        eod_token_id: the end-of-document token; 0 is as good as any.
        reset_position_ids: count positions from 0 again in every document.
        dense: return the mask as [B, S, S] instead of each position's bound.
    """

    def __init__(
        self,
        batch_size: int,
        seq_len: int,
        eod_token_id: int,
        reset_position_ids: bool = False,
        *,
        dense: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(eod_token_id, bool) or not isinstance(eod_token_id, int) or eod_token_id < 0:
            raise ConfigError(f"EosMask: eod_token_id={eod_token_id!r}: give a token id of 0 or more")
        self.shape_BS = (batch_size, seq_len)
        self.eod_token_id, self.reset_position_ids, self.dense = eod_token_id, reset_position_ids, dense

    def construct(self, input_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (position_ids, attention_mask).

        Args:
            input_ids: int [B, S].

        Returns:
            position_ids int32 [B, S], and attention_mask int32 [B, S], the first position that each position may see,
            or with `dense` int32 [B, S, S], 1 where attention is forbidden.

        Raises:
            DataError: if there are no ids, they have another shape, or sequences are cut over ranks.
        """
        if input_ids is None:
            raise DataError(
                "EosMask: this pipeline stage is given no tokens; set --reset-attention-mask and --reset-position-ids, "
                "with which every stage gets masks from the dataset"
            )
        if parallel_state.is_initialized() and parallel_state.get_context_parallel_world_size() > 1:
            raise DataError(
                "EosMask: with context parallelism a rank has a part of every sequence and cannot tell where its "
                "documents begin; set --reset-attention-mask and --reset-position-ids, and take masks from the batch"
            )
        if tuple(input_ids.shape) != self.shape_BS:
            raise DataError(f"EosMask was made for ids of shape {list(self.shape_BS)}, got {list(input_ids.shape)}")
        ids = input_ids.asnumpy()
        starts = np.stack([document_starts(row, self.eod_token_id) for row in ids])
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        if self.reset_position_ids:
            positions = positions - starts
        mask = attention_mask_from_document_starts(starts)[:, 0] if self.dense else starts
        return Tensor(np.ascontiguousarray(positions, np.int32)), Tensor(mask.astype(np.int32), ms.int32)


def document_starts_of_mask(mask: np.ndarray) -> np.ndarray:
    """Return the first position that each position may see, int64 [B, S], from a mask that is causal in documents.

    Args:
        mask: [B, S, S] or [B, 1, S, S]; true or 1 where attention is forbidden.

    Raises:
        ConfigError: if the mask is not causal within documents, which is all that attention here can do.
    """
    forbidden = mask.reshape(mask.shape[0], *mask.shape[-2:]).astype(bool)
    starts = np.argmin(forbidden, -1)
    if not np.array_equal(attention_mask_from_document_starts(starts)[:, 0], forbidden):
        raise ConfigError(
            f"attention_mask of shape {list(mask.shape)} is not causal within documents (1 forbids, row sees column); "
            f"leave it None for plain causal attention"
        )
    return starts
