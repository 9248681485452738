"""The feed-forward block: widen, activate, narrow; the width is cut over the tensor parallel group."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.ops import reference
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel_core.transformer.stage import ModelStage


class MLP(nn.Cell):
    """fc2(activation(fc1(x))). A gated activation's fc1 holds [gate; up], each cut over the group.

    Args:
        stage: configuration, group, streams.
        name: global name of this module.
        regather_input: see `ColumnParallelLinear`.
        ffn_hidden_size: the width; 0: the model's.
    """

    def __init__(
        self, stage: ModelStage, name: str, *, regather_input: bool = True, ffn_hidden_size: int = 0
    ) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        width = ffn_hidden_size or config.ffn_hidden_size
        self.hidden_act = config.hidden_act
        fused = config.apply_swiglu_fusion or not config.is_gated
        self._activate = ops.activation if fused else reference.activation
        parts = 2 if config.is_gated else 1
        common: dict[str, Any] = {
            "tp_group": stage.tp_group,
            "sequence_parallel": stage.sequence_parallel,
            "params_dtype": config.params_dtype,
            "bias": config.add_bias_linear,
            "skip_bias_add": True,
        }
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            parts * width,
            init_method=stage.init(f"{name}.linear_fc1.weight"),
            stride=parts,
            regather_input=regather_input,
            name=f"{name}.linear_fc1",
            **common,
        )
        self.linear_fc2 = RowParallelLinear(
            width,
            config.hidden_size,
            init_method=stage.output_init(f"{name}.linear_fc2.weight"),
            name=f"{name}.linear_fc2",
            **common,
        )

    def construct(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias or None): the output in hidden's shape before fc2's bias [H], and that bias."""
        wide, bias = self.linear_fc1(hidden)
        return self.linear_fc2(self._activate(wide, bias, self.hidden_act))
