"""The section of a mixture of experts: how many, how tokens are routed to them, and how they get there."""

from __future__ import annotations

from dataclasses import dataclass

BALANCES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")
"""Ways to keep experts evenly loaded; of the losses several can be named."""
LOSS_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""What the log calls each balancing loss, as Megatron-LM does."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts in place of the MLP; without `num_experts` nothing here says anything."""

    num_experts: int = 0
    """Experts of a layer; 0: dense layers only."""
    moe_layer_freq: tuple[int, ...] = ()
    """For every layer 1 where it has experts, 0 where it has an MLP; empty: in all."""
    moe_ffn_hidden_size: int = 0
    """Width of one expert; 0: ffn_hidden_size."""
    moe_router_topk: int = 2
    """Experts that each token goes to."""
    moe_router_score_function: str = "softmax"
    """softmax or sigmoid of the router's logits."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, before the best are chosen; off: over the chosen ones."""
    moe_router_rounds: bool = False
    """Experts are chosen in rounds, first come, first served (see `expert_parallel.rounds`); the router has no bias."""
    moe_router_topk_scaling_factor: float = 0.0
    """Factor of the routing weights; 0: none."""
    moe_router_num_groups: int = 0
    """Groups of experts that lie next to each other, of which moe_router_group_topk are chosen first; 0: none."""
    moe_router_group_topk: int = 0
    moe_router_enable_expert_bias: bool = False
    """Each expert has a bias, for the choice alone, that goes up when it gets fewer tokens than the mean, else down."""
    moe_router_bias_update_rate: float = 1e-3
    moe_router_dtype: str = ""
    """Type in which logits are computed: fp32; empty: the activations'."""
    moe_input_jitter_eps: float = 0.0
    """In training, what the router sees is multiplied by numbers from 1 - eps to 1 + eps."""
    moe_router_force_load_balancing: bool = False
    """To measure speed: logits are random numbers, drawn anew on every rank, so that loads are even."""
    moe_z_loss_coeff: float = 0.0
    moe_router_load_balancing_type: tuple[str, ...] = ("aux_loss",)
    """Words of `BALANCES`."""
    moe_aux_loss_coeff: tuple[float, ...] = (0.0,)
    """A coefficient of each balancing loss."""
    moe_global_aux_loss_form: str = "one_rank"
    """one_rank: every layout has the loss of one process; megatron: Megatron-LM's, whose strength falls with the data
    parallel size."""
    moe_expert_capacity_factor: float = 0.0
    """Tokens that an expert takes, in shares of an even load; 0: all that come."""
    moe_pad_expert_input_to_capacity: bool = False
    """Every expert computes as many rows as it may take, so that shapes never change."""
    moe_token_drop_policy: str = "probs"
    """Which tokens an expert keeps: those of the largest weight (probs) or the first (position)."""
    moe_apply_probs_on_input: bool = False
    """The routing weight multiplies what goes into the expert, not what its activation gives (one expert per token)."""
    moe_shared_expert_intermediate_size: int = 0
    """Width of an MLP that every token goes through beside its experts; 0: none."""
    moe_shared_expert_gate: bool = False
    """The shared expert's output is multiplied by the sigmoid of a linear function of its input."""
    moe_shared_expert_overlap: bool = False
    """The shared expert is computed while tokens are on their way to other ranks."""
    moe_token_dispatcher_type: str = "allgather"
    """How tokens reach experts on other ranks: alltoall or allgather."""
    moe_layer_recompute: bool = False
    """Experts and router are computed again in backward."""
    moe_per_layer_logging: bool = False
    """Losses of routers are told for each layer too, in the files of a run."""

    def __post_init__(self) -> None:
        if all(self.moe_layer_freq):
            object.__setattr__(self, "moe_layer_freq", ())

    def has_experts(self, layer_number: int) -> bool:
        """Tell whether a layer has experts; those behind the model's last are made as that one."""
        if not self.num_experts or not self.moe_layer_freq:
            return bool(self.num_experts)
        return bool(self.moe_layer_freq[min(layer_number, len(self.moe_layer_freq) - 1)])

    def layers_with_experts(self, num_layers: int) -> int:
        """Return how many of the model's layers have experts."""
        return sum(self.has_experts(layer) for layer in range(num_layers))

    @property
    def balancing_losses(self) -> tuple[tuple[str, float], ...]:
        """The balancing losses that act, each with its coefficient."""
        pairs = zip(self.moe_router_load_balancing_type, self.moe_aux_loss_coeff)
        return tuple((kind, coefficient) for kind, coefficient in pairs if kind in LOSS_NAMES and coefficient)

    def capacity(self, tokens: int) -> int | None:
        """Return how many of a rank's `tokens` an expert takes; None: all.

        The number is ceil(tokens * topk / experts * factor).
        """
        if not self.moe_expert_capacity_factor:
            return None
        share = tokens * self.moe_router_topk / self.num_experts * self.moe_expert_capacity_factor
        return -int(-share // 1)
