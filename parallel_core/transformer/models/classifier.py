"""A GPT with a head for whole texts: scores of classes at a text's last token, in place of the output layer.

Source: `transformers`' GPT2ForSequenceClassification, whose head is a linear layer without a bias.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.comm.interface import SoloGroup
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import mark
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from parallel_core.transformer.gpt_model import GPTModel
from parallel_core.transformer.stage import ModelStage


class TextClassifier(GPTModel):
    """A GPT that classifies texts, or the part of one that a pipeline stage holds; see `GPTModel`."""

    def __init__(self, stage: ModelStage, *, parallel_output: bool = True) -> None:
        if not stage.config.num_labels:
            raise ConfigError("num_labels=0: a head for texts has classes; write --num-labels 2 or more")
        super().__init__(stage, parallel_output=parallel_output)
        self.num_parts = stage.tp_group.size if stage.sequence_parallel else 1
        self.score: ColumnParallelLinear | None = None
        if stage.post_process:
            self.score = ColumnParallelLinear(
                stage.config.hidden_size,
                stage.config.num_labels,
                tp_group=SoloGroup(),
                init_method=stage.init("score.weight"),
                bias=False,
                params_dtype=stage.config.params_dtype,
                name="score",
            )
            mark(self.score.weight, is_embedding_or_output=True)

    def construct(  # type: ignore[override]
        self, tokens: Tensor, lengths: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: int32 [B, S], texts with padding on their right; used on the first stage.
            lengths: int32 [B], tokens of each text, used on the last stage; None: S.
            position_ids: int32 [B, S]; None: 0..S-1.

        Returns:
            Hidden states [S, B, H] ([S / tp, B, H] with sequence parallelism) before the last stage, on it scores of
            classes, float32 [B, num_labels].
        """
        hidden = self.hidden_states(tokens, position_ids)
        if self.score is None:
            return hidden
        if self.num_parts > 1:
            hidden = gather_from_sequence_parallel_region(hidden, self.tp_group, tensor_parallel_output_grad=False)
        S, B, H = hidden.shape
        number = Tensor(np.arange(B, dtype=np.int32))
        last = Tensor(np.full(B, S - 1, np.int32)) if lengths is None else lengths - 1
        rows = ms.ops.gather(ops.cast(hidden, self.compute_dtype).reshape(S * B, H), last * B + number, 0)
        return ops.cast(self.score(rows)[0], ms.float32)
