"""The experts of a rank: MLPs of one shape, computed together by grouped products."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, mint, nn

from parallel_core import ops
from parallel_core.expert_parallel.functions import activated_grouped_linear, add_expert_bias, grouped_linear
from parallel_core.layout.shard import Cut, TensorShard
from parallel_core.tape import constant as tape_constant
from parallel_core.tensor_parallel.parameter import constant, make_parameter
from parallel_core.transformer.stage import ModelStage


class GroupedMLP(nn.Cell):
    """fc2(activation(fc1(x)) * weight) of every row with its expert's matrices.

    Parameters: `linear_fc1.weight` [E, gates * F, H] and `linear_fc2.weight` [E, H, F], each cut over the experts'
    ranks along E and over the ranks that share an expert along F, and biases [E, ..] where linears have them.

    Args:
        stage: configuration and groups.
        name: global name of this module.
    """

    def __init__(self, stage: ModelStage, name: str) -> None:
        super().__init__(auto_prefix=True)
        config, groups = stage.config, stage.expert_groups
        E, H, F = config.moe.num_experts, config.hidden_size, config.moe.moe_ffn_hidden_size
        parts = 2 if config.is_gated else 1
        self.hidden_act, self.probs_on_input = config.hidden_act, config.moe.moe_apply_probs_on_input
        self.recomputed_act = config.recomputes("moe_act")
        experts = Cut("ep", 0, groups.ep.rank, groups.ep.size)
        etp_axis, etp = groups.etp_axis, groups.etp
        traits = {"replicas": groups.replicas}

        def weight(which: str, shape: tuple[int, int, int], cut: Cut, *, is_output: bool) -> Parameter:
            init = (stage.output_init if is_output else stage.init)(f"{name}.{which}.weight")
            return make_parameter(
                TensorShard.cut(f"{name}.{which}.weight", shape, experts, cut, **traits), init, config.params_dtype
            )

        self.fc1_weight = weight(
            "linear_fc1", (E, parts * F, H), Cut(etp_axis, 1, etp.rank, etp.size, parts), is_output=False
        )
        self.fc2_weight = weight("linear_fc2", (E, H, F), Cut(etp_axis, 2, etp.rank, etp.size), is_output=True)
        self.groups = groups
        self.fc1_adapter: nn.Cell | None = None
        self.fc2_adapter: nn.Cell | None = None
        self.fc1_bias: Parameter | None = None
        self.fc2_bias: Parameter | None = None
        if config.add_bias_linear:
            wide = TensorShard.cut(f"{name}.linear_fc1.bias", (E, parts * F), experts, **traits)
            self.fc1_bias = make_parameter(wide, constant(0.0), config.params_dtype)
            narrow = TensorShard.cut(f"{name}.linear_fc2.bias", (E, H), experts, **traits)
            self.fc2_bias = make_parameter(narrow, constant(0.0), config.params_dtype)

    def construct(self, rows_NH: Tensor, weights_N: Tensor, counts: np.ndarray) -> Tensor:
        """Return each row's output, [N, H]; with a cut expert this rank's part of the sum.

        Args:
            rows_NH: tokens, those of one expert together.
            weights_N: float32, their routing weights.
            counts: int64 [E / ep], rows of each of this rank's experts.
        """
        scale: Tensor | None = weights_N
        if self.probs_on_input:
            rows_NH, scale = rows_NH * ops.cast(weights_N, rows_NH.dtype).reshape(-1, 1), None
        wide = grouped_linear(rows_NH, self.fc1_weight, counts)
        if self.fc1_adapter is not None:
            wide = wide + self.fc1_adapter(rows_NH, counts)
        if self.fc1_bias is not None:
            wide = add_expert_bias(wide, self.fc1_bias, None, counts)
        factor = tape_constant(mint.ones((wide.shape[0],))) if scale is None else scale
        if self.recomputed_act:
            narrow = activated_grouped_linear(wide, factor, self.fc2_weight, counts, self.hidden_act)
        else:
            activated = ops.scaled_activation(wide, factor, self.hidden_act)
            narrow = grouped_linear(activated, self.fc2_weight, counts)
            if self.fc2_adapter is not None:
                narrow = narrow + self.fc2_adapter(activated, counts)
        if self.fc2_bias is not None:
            narrow = add_expert_bias(narrow, self.fc2_bias, scale, counts)
        return narrow
