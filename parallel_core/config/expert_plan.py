"""What experts cost: parameters of a layer that has them, and what ranks exchange."""

from __future__ import annotations

from dataclasses import dataclass

from parallel_core.config.schema import AllConfig, TransformerConfig


@dataclass(frozen=True)
class ExpertParameters:
    """Parameters of one layer's feed-forward part that has experts.

    Attributes:
        shared: router and shared expert, on every rank of a stage.
        one: one expert's, undivided.
    """

    shared: int
    one: int


def expert_parameters(model: TransformerConfig, tp: int = 1) -> ExpertParameters:
    """Return the parameters of a layer with experts; the shared expert's are one tensor parallel rank's."""
    moe, h = model.moe, model.hidden_size
    gates = 2 if model.is_gated else 1
    router = moe.num_experts * (h + (1 if model.add_bias_linear and not moe.moe_router_rounds else 0))
    wide = moe.moe_shared_expert_intermediate_size
    shared = wide * h * (gates + 1) // tp + (h if moe.moe_shared_expert_gate else 0)
    width = moe.moe_ffn_hidden_size
    one = width * h * (gates + 1) + ((gates * width + h) if model.add_bias_linear else 0)
    return ExpertParameters(router + shared, one)


def kept_by_feed_forward(model: TransformerConfig, *, computed_again: bool = False) -> int:
    """Return the elements of a token that a layer's feed-forward part keeps for backward; with experts, for even loads.

    These are the first product and what the second one takes, and of each of a token's experts its row too.

    Args:
        model: the model.
        computed_again: count what is computed again in backward as if it were kept.
    """
    products, moe = 3 if model.is_gated else 2, model.moe

    def kept(module: str) -> bool:
        return computed_again or not model.recomputes(module)

    if not moe.num_experts:
        return model.ffn_hidden_size * products if kept("mlp") else 0
    if not kept("moe"):
        return 0
    rows = moe.moe_router_topk * (
        model.hidden_size + moe.moe_ffn_hidden_size * (products if kept("moe_act") else products - 1)
    )
    return rows + (moe.moe_shared_expert_intermediate_size * products if kept("shared_experts") else 0)


def experts_on_rank(config: AllConfig) -> int:
    """Return the parameters of experts that one rank holds of a layer that has them."""
    parallel = config.parallel_config
    one = expert_parameters(config.model_config).one
    own = config.model_config.moe.num_experts // parallel.expert_model_parallel_size
    return own * one // parallel.expert_tensor_size


def expert_layers(config: AllConfig, layers: object) -> int:
    """Return how many of some layers, by their numbers, have experts."""
    noop = set(config.parallel_config.noop_layers)
    moe = config.model_config.moe
    return sum(moe.has_experts(layer) for layer in layers if layer not in noop)  # type: ignore[attr-defined]


def exchanged_bytes(config: AllConfig, width: int) -> int:
    """Return the bytes that one rank sends in one layer's forward and backward pass of a microbatch, for even loads.

    With `alltoall` each of a token's rows that is for another rank goes there once for every rank of its expert, and
    its output comes back; with `allgather` every token goes to all ranks of the group, and outputs are summed and
    scattered.

    Args:
        config: the run.
        width: bytes of an element of activations.
    """
    model, parallel = config.model_config, config.parallel_config
    group = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    if group == 1:
        return 0
    tokens = model.seq_length * config.dataset_config.batch_size // parallel.context_parallel_size
    tokens //= parallel.tensor_model_parallel_size  # each routes its part of the sequence
    row = model.hidden_size * width
    if model.moe.moe_token_dispatcher_type == "alltoall":
        rows = tokens * model.moe.moe_router_topk * parallel.expert_tensor_size
        return 4 * rows * row * (group - 1) // group
    return 4 * tokens * (group - 1) * row
