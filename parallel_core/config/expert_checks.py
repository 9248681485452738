"""Derivations and rules of a mixture of experts."""

from __future__ import annotations

from parallel_core.config import table
from parallel_core.config.experts import BALANCES
from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.schema import DEFAULTS
from parallel_core.layout import derived

EXPERT_DERIVATIONS = Rules()
EXPERT_CHECKS = Rules()

_OWN = tuple(argument.name for path, argument in table.DIRECT.items() if path.startswith("model_config.moe."))


@EXPERT_DERIVATIONS
def experts(r: Resolution) -> None:
    """No experts are none at all; a pattern has an entry for every layer; a capacity below zero is none."""
    if not r["num_experts"]:
        r.values["num_experts"] = None
        for name in _OWN:
            if r.is_given(name) and r[name] not in (None, DEFAULTS[table.BY_NAME[name].fields[0]]):
                r.note(f"{r.term(name)}: not used without num_experts, as in Megatron")
            if table.BY_NAME[name].direct:
                r.values[name] = None
        return
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        if not isinstance(r[name], tuple):
            r.values[name] = (r[name],)
    pattern, layers = r["moe_layer_freq"], r["num_layers"]
    has_query_layer = r["top_query_layer"] not in (None, "none")
    if isinstance(pattern, int) and r.positive("num_layers") and r.positive("moe_layer_freq"):
        pattern = tuple(int(number % pattern == 0) for number in range(layers))
        if has_query_layer:
            pattern = tuple(a * b for a, b in zip(pattern, derived.layers_below_query(layers)))
        r.derive("moe_layer_freq", pattern, "experts")
    if isinstance(pattern, tuple) and pattern and all(pattern) and len(pattern) == layers and not has_query_layer:
        r.values["moe_layer_freq"] = None
    r.fill("moe_ffn_hidden_size", r["ffn_hidden_size"], "experts")
    if (r["moe_expert_capacity_factor"] or 0) < 0:
        r.derive("moe_expert_capacity_factor", None, "experts")


@EXPERT_CHECKS
def expert_sizes(r: Resolution) -> None:
    """Experts, their widths and choices are numbers that can be meant."""
    if r["num_experts"] is None:
        return
    names = ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk",
             "moe_shared_expert_intermediate_size")
    for name in names:
        if r[name] is not None and r[name] <= 0 and name not in r.derived:
            r.fail(name, "must be above zero")
    for name in ("moe_router_topk_scaling_factor", "moe_router_bias_update_rate", "moe_z_loss_coeff"):
        if r[name] is not None and r[name] < 0:
            r.fail(name, "must not be negative")
    if not 0 <= (r["moe_input_jitter_eps"] or 0) < 1:
        r.fail("moe_input_jitter_eps", "must be at least 0 and below 1")
    if r.positive("num_experts") and (r["moe_router_topk"] or 0) > r["num_experts"]:
        r.fail("moe_router_topk num_experts", "a token cannot go to more experts than there are")
    pattern = r["moe_layer_freq"]
    if isinstance(pattern, tuple) and r.positive("num_layers") and len(pattern) != r["num_layers"]:
        r.fail("moe_layer_freq num_layers", f"has {len(pattern)} entries, one for every layer is needed")
    elif isinstance(pattern, tuple) and pattern[-1:] == (1,) and r["top_query_layer"] != "none":
        r.fail("moe_layer_freq top_query_layer", "the query layer, the last one, has an MLP; write 0 for it")
    elif isinstance(pattern, tuple) and not any(pattern):
        r.fail("moe_layer_freq num_experts", "no layer has experts; leave num_experts out")


@EXPERT_CHECKS
def expert_choice(r: Resolution) -> None:
    """How experts are chosen: one of softmax's is weighted before the choice, a bias needs sigmoid, groups divide."""
    if r["num_experts"] is None:
        return
    sigmoid, sinkhorn = r["moe_router_score_function"] == "sigmoid", "sinkhorn" in r["moe_router_load_balancing_type"]
    if r["moe_router_rounds"]:
        return
    if r["moe_router_topk"] == 1 and not sigmoid and not r["moe_router_pre_softmax"] and not sinkhorn:
        r.fail("moe_router_topk moe_router_pre_softmax",
               "a softmax over one expert is 1 whatever the router says; add --moe-router-pre-softmax")
    if sigmoid and r["moe_router_pre_softmax"]:
        r.fail("moe_router_score_function moe_router_pre_softmax", "there is no softmax; leave it out")
    if r["moe_router_enable_expert_bias"] and not sigmoid:
        r.fail("moe_router_enable_expert_bias moe_router_score_function",
               "a bias is added to sigmoid scores; add --moe-router-score-function sigmoid")
    if r["moe_apply_probs_on_input"] and r["moe_router_topk"] != 1:
        r.fail("moe_apply_probs_on_input moe_router_topk", "needs one expert per token")
    groups, kept = r["moe_router_num_groups"], r["moe_router_group_topk"]
    if (groups is None) != (kept is None):
        r.fail("moe_router_num_groups moe_router_group_topk", "belong together; give both")
    elif groups is not None and groups > 0 and kept > 0 and r.positive("num_experts"):
        _check_groups(r, groups, kept)


@EXPERT_CHECKS
def expert_rounds(r: Resolution) -> None:
    """Rounds have scores, weights, a balancing loss and an order of their own."""
    if r["num_experts"] is None or not r["moe_router_rounds"]:
        return
    for name, own in (
        ("moe_router_score_function", ("softmax",)), ("moe_router_load_balancing_type", (("aux_loss",), ("none",))),
        ("moe_router_pre_softmax", (False,)), ("moe_router_topk_scaling_factor", (None, 0)),
        ("moe_router_num_groups", (None, 0)), ("moe_router_enable_expert_bias", (False,)),
    ):  # fmt: skip
        if r[name] not in own:
            r.fail(f"moe_router_rounds {name}", "rounds choose and weigh in a way of their own; leave one out")
    if r["moe_apply_probs_on_input"] and r["moe_router_topk"] != 1:
        r.fail("moe_apply_probs_on_input moe_router_topk", "needs one expert per token")
    if r.is_given("moe_token_drop_policy") and r["moe_token_drop_policy"] != "position":
        r.fail("moe_router_rounds moe_token_drop_policy", "rounds keep the first tokens; leave it out")


def _check_groups(r: Resolution, groups: int, kept: int) -> None:
    size, chosen = r["num_experts"] // groups, r["moe_router_topk"]
    if r["num_experts"] % groups:
        r.fail("num_experts moe_router_num_groups", f"{r['num_experts']} experts are not {groups} equal groups")
    elif kept > groups:
        r.fail("moe_router_group_topk moe_router_num_groups", "there are not so many groups")
    elif chosen < kept:
        r.fail("moe_router_topk moe_router_group_topk",
               "a group is judged by its best topk // group_topk experts, which would be none")
    elif chosen > kept * size or chosen // kept > size:
        r.fail("moe_router_topk moe_router_group_topk", f"{kept} groups of {size} experts have not so many")


@EXPERT_CHECKS
def expert_balance(r: Resolution) -> None:
    """Balancing losses have a coefficient each; Sinkhorn's assignment stands alone."""
    if r["num_experts"] is None:
        return
    kinds, coefficients = r["moe_router_load_balancing_type"], r["moe_aux_loss_coeff"]
    wrong = [kind for kind in kinds if kind not in BALANCES]
    if wrong or len(set(kinds)) != len(kinds) or not kinds:
        r.fail("moe_router_load_balancing_type", f"takes different words of {', '.join(BALANCES)}")
        return
    if len(kinds) > 1 and {"sinkhorn", "none"} & set(kinds):
        r.fail("moe_router_load_balancing_type", "sinkhorn and none stand alone")
    if len(kinds) != len(coefficients):
        r.fail("moe_router_load_balancing_type moe_aux_loss_coeff",
               f"{len(kinds)} kinds and {len(coefficients)} coefficients; give one for each")
    if min(coefficients, default=0) < 0:
        r.fail("moe_aux_loss_coeff", "must not be negative")
    if kinds[0] in ("sinkhorn", "none") and any(coefficients):
        r.fail("moe_aux_loss_coeff moe_router_load_balancing_type", f"{kinds[0]} has no loss; leave it out")
    if kinds[0] != "sinkhorn":
        return
    for name in ("moe_expert_capacity_factor", "moe_router_num_groups", "moe_router_enable_expert_bias",
                 "moe_router_topk_scaling_factor"):
        if r[name]:
            r.fail(f"{name} moe_router_load_balancing_type", "does not go with sinkhorn; leave it out")
    if r["moe_router_score_function"] != "softmax" or r["moe_router_pre_softmax"]:
        r.fail("moe_router_load_balancing_type", "sinkhorn has scores of its own; leave moe_router_score_function and "
               "moe_router_pre_softmax out")


@EXPERT_CHECKS
def expert_capacity(r: Resolution) -> None:
    """Padding needs a capacity; what says nothing without one is not given."""
    if r["num_experts"] is None:
        return
    factor = r["moe_expert_capacity_factor"]
    if r["moe_pad_expert_input_to_capacity"] and not factor:
        r.fail("moe_pad_expert_input_to_capacity moe_expert_capacity_factor", "give the capacity to pad to")
    if r["moe_token_drop_policy"] == "position" and not factor:
        r.fail("moe_token_drop_policy moe_expert_capacity_factor", "nothing is dropped without a capacity; give one")


@EXPERT_CHECKS
def shared_expert(r: Resolution) -> None:
    """A shared expert has no biases; its gate and its overlap with the exchange of rows need one."""
    if r["num_experts"] is None:
        return
    if r["moe_shared_expert_gate"] and r["moe_shared_expert_intermediate_size"] is None:
        r.fail("moe_shared_expert_gate moe_shared_expert_intermediate_size", "gates an expert that is not there")
    if r["moe_shared_expert_overlap"] and r["moe_shared_expert_intermediate_size"] is None:
        r.fail("moe_shared_expert_overlap moe_shared_expert_intermediate_size", "there is no shared expert to compute")
    if r["moe_shared_expert_overlap"] and r["moe_token_dispatcher_type"] != "alltoall":
        r.fail("moe_shared_expert_overlap moe_token_dispatcher_type",
               "only rows that go to the ranks of their experts go ahead; add --moe-token-dispatcher-type alltoall")
    if r["moe_shared_expert_intermediate_size"] is not None and r["add_bias_linear"]:
        r.fail("moe_shared_expert_intermediate_size add_bias_linear",
               "a shared expert has no biases; add --disable-bias-linear")


@EXPERT_CHECKS
def expert_layout(r: Resolution) -> None:
    """Experts divide over ranks, their ranks over all; tensor parallel ranks each route their part of a sequence."""
    ep, tp, pp = r["expert_model_parallel_size"], r["tensor_model_parallel_size"], r["pipeline_model_parallel_size"]
    etp = r["expert_tensor_parallel_size"] or tp
    if r["num_experts"] is None:
        if ep != 1:
            r.fail("expert_model_parallel_size num_experts", "there are no experts to share out; give num_experts")
        return
    if min(ep, tp, pp, etp) < 1:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if r[name] is not None and r[name] < 1:
                r.fail(name, "must be above zero")
        return
    if r.positive("num_experts") and r["num_experts"] % ep:
        r.fail("num_experts expert_model_parallel_size", _not_a_multiple(r["num_experts"], ep))
    if tp > 1 and not r["sequence_parallel"]:
        r.fail("num_experts sequence_parallel", "tensor parallel ranks would route the same tokens; add "
               "--sequence-parallel")
    if etp > 1 and r["add_bias_linear"]:
        r.fail("expert_tensor_parallel_size add_bias_linear",
               "a bias would be added by each rank of an expert; add --disable-bias-linear, or write "
               "expert_tensor_parallel_size 1")
    for width, ranks, size in (
        ("moe_ffn_hidden_size", "expert_tensor_parallel_size", etp),
        ("moe_shared_expert_intermediate_size", "tensor_model_parallel_size", tp),
    ):
        if r.positive(width) and r[width] % size:
            r.fail(f"{width} {ranks}", _not_a_multiple(r[width], size))
    if r.world_size and r.world_size % (etp * ep * pp):
        r.fail("expert_model_parallel_size expert_tensor_parallel_size pipeline_model_parallel_size",
               f"{r.world_size} processes are not a multiple of {ep} x {etp} x {pp} = {ep * etp * pp}; "
               f"start {max(1, round(r.world_size / (etp * ep * pp))) * etp * ep * pp}, or change the sizes")
    if r["moe_pad_expert_input_to_capacity"] and ep * etp > 1 and r["moe_token_dispatcher_type"] != "alltoall":
        r.fail("moe_pad_expert_input_to_capacity moe_token_dispatcher_type",
               "rows are padded for the exchange between ranks; write moe_token_dispatcher_type alltoall")
    if r["moe_layer_recompute"] and r["recompute_granularity"] == "full":
        r.fail("moe_layer_recompute recompute_granularity", "full recomputes them already; give one")


def _not_a_multiple(value: int, of: int) -> str:
    below, above = value // of * of, (value // of + 1) * of
    return f"{value} is not a multiple of {of}; write {f'{below} or {above}' if below else above}"
