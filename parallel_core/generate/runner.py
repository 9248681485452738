"""Running tokens through a model whose stages may be on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor

from parallel_core.autograd import forward_only
from parallel_core.context import ParallelContext
from parallel_core.generate.cache import KeyValueCache
from parallel_core.generate.stage import position_ids
from parallel_core.transformer import GPTModel


class StageRunner:
    """This rank's part of every step; all ranks of the model call it alike.

    Args:
        model: this rank's stage (see `build_cached_model`).
        context: its groups.
        cache: what the model was built over.
    """

    def __init__(self, model: GPTModel, context: ParallelContext, cache: KeyValueCache) -> None:
        self._model, self._pp, self.cache = model, context.pp, cache
        self._learned = model.config.position_embedding_type == "learned_absolute"

    def run(self, tokens_BS: np.ndarray, rows: Sequence[int], firsts: Sequence[int], last_only: bool) -> Tensor | None:
        """Run new tokens of some sequences, and keep their keys and values.

        Args:
            tokens_BS: int32 ids, S new ones of each of B sequences.
            rows: the rows of the cache that the sequences are kept in.
            firsts: how many tokens of each are kept already.
            last_only: compute logits of the last position alone.

        Returns:
            On ranks of the last stage the logits, [S, B, V / tp] (S = 1 with `last_only`); elsewhere None.
        """
        model, pp, (B, S) = self._model, self._pp, tokens_BS.shape
        step = self.cache.begin(rows, firsts, S)
        with forward_only():
            if pp.rank > 0:
                shape = (S, B, model.config.hidden_size)
                model.set_input_tensor(pp.receive(shape, model.residual_dtype, pp.rank - 1).wait())
            positions = position_ids(step) if self._learned else None
            hidden = model.hidden_states(Tensor.from_numpy(np.ascontiguousarray(tokens_BS, np.int32)), positions)
            if pp.rank < pp.size - 1:
                pp.send(hidden.contiguous(), pp.rank + 1).wait()
                return None
            return model.logits_of(hidden[S - 1 :] if last_only and S > 1 else hidden)
