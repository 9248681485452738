"""The feed-forward block with experts: route, dispatch, compute, combine, and add the shared expert."""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.comm.interface import SoloGroup
from parallel_core.expert_parallel.dispatch import make_dispatcher
from parallel_core.layout.shard import TensorShard
from parallel_core.tape import reshaped
from parallel_core.tensor_parallel.linear import linear
from parallel_core.tensor_parallel.parameter import make_parameter
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.mlp import MLP
from parallel_core.transformer.moe.experts import GroupedMLP
from parallel_core.transformer.moe.router import TopKRouter
from parallel_core.transformer.recomputed import make_mlp
from parallel_core.transformer.stage import ModelStage


class MoELayer(nn.Cell):
    """Every token goes through its experts, each output weighted, and through the shared expert if there is one.

    A token that no expert had room for gets the shared expert's output alone, or zeros.

    Args:
        stage: configuration, groups, streams, ledger.
        name: global name of this module.
        regather_input: see `ColumnParallelLinear`; for the shared expert.
    """

    def __init__(self, stage: ModelStage, name: str, *, regather_input: bool = True) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        moe = config.moe
        self.router = TopKRouter(stage, f"{name}.router")
        self.experts = GroupedMLP(stage, f"{name}.experts.experts")
        self.dispatcher = make_dispatcher(moe, stage.expert_groups)
        self.recomputed, self.streams = config.recomputes("moe"), stage.streams
        self.overlaps = moe.moe_shared_expert_overlap
        self.shared_experts: MLP | None = None
        self.shared_gate: Parameter | None = None
        if moe.moe_shared_expert_intermediate_size:
            shared = f"{name}.shared_experts"
            width = moe.moe_shared_expert_intermediate_size
            self.shared_experts = make_mlp(
                stage, shared, "shared_experts", regather_input=regather_input, ffn_hidden_size=width
            )
            if moe.moe_shared_expert_gate:
                partial = stage.sequence_parallel and stage.tp_group.size > 1
                gate = TensorShard.full(f"{shared}.gate_weight", (1, config.hidden_size), "float32")
                self.shared_gate = make_parameter(gate, stage.init(gate.name), config.params_dtype)
                self.shared_gate.shard = TensorShard.cut(
                    gate.name, gate.global_shape, dtype=self.shared_gate.shard.dtype, partial_gradient=partial
                )

    def construct(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return (output, None): the output in the shape of `hidden`, [S, B, H] ([S / tp, B, H] when cut)."""
        if self.recomputed:
            return recompute(self._run, (hidden,), list(self.trainable_params()), self.streams), None
        return self._run(hidden), None

    def _run(self, hidden: Tensor) -> Tensor:
        S, B, H = hidden.shape
        x_TH = reshaped(hidden, S * B, H)
        shared = None if self.overlaps else self._shared(hidden)
        weights, routing = self.router(x_TH, B)
        rows, scale, counts, state = self.dispatcher.dispatch(x_TH, weights, routing)
        if self.overlaps:
            shared = self._shared(hidden)
        output = reshaped(self.dispatcher.combine(self.experts(rows(), scale, counts), state), S, B, H)
        return output if shared is None else ops.bias_dropout_add(output, None, shared, 0.0, (0, 0))

    def _shared(self, hidden: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        output, _ = self.shared_experts(hidden)
        if self.shared_gate is not None:
            output = ops.gated(output, linear(hidden, self.shared_gate, None, SoloGroup()))
        return output
