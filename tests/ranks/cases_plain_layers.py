"""Layers of one function on several ranks, against their modules: the same exchanges, the same numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.context_parallel.attention import ContextGroups
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.layout.recompute import RecomputePlan
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.transformer import GPTModel, ModelStage
from tests.helpers.cases import CaseContext, case
from tests.ranks.support import kernels, world_group
from tests.unit.pipeline.test_tape import (
    LENGTH,
    MODELS,
    PLAIN_PARTS,
    SMALL,
    Run,
    plain_parts,
    recorded_by_mindspore,
    same,
)

CASES: list[dict[str, Any]] = [
    {"name": "plain"},
    {"name": "llama"},
    {"name": "dropout"},
    {"name": "dropout", "split": True},
    {"name": "llama", "split": True},
    {"name": "dropout", "cut": False},
    {"name": "dropout", "cut": False, "split": True},
    {"name": "llama", "regathers": False},
    {"name": "dropout", "regathers": False, "split": True},
    {"name": "dropout and MLPs again"},
    {"name": "dropout and MLPs again", "split": True},
    {"name": "dropout and MLPs again", "regathers": False, "bf16": True},
    {"name": "norms of queries and keys"},
    {"name": "norms of queries and keys that turn"},
    {"name": "latent attention"},
    {"name": "latent attention", "split": True},
    {"name": "experts"},
    {"name": "experts", "split": True},
    {"name": "plain", "frozen": "linear_fc1.weight"},
    {"name": "plain", "bf16": True},
    {"name": "llama", "bf16": True, "regathers": False},
    {"name": "dropout", "bf16": True, "split": True},
]
OF_CONTEXT: list[dict[str, Any]] = [
    *({"name": name, "exchange": exchange} for name in ("llama", "dropout") for exchange in ("p2p", "a2a")),
    {"name": "window", "exchange": "all_gather"},
    {"name": "experts", "exchange": "all_gather", "split": True},
    {"name": "dropout", "exchange": "p2p", "split": True},
    {"name": "dropout and MLPs again", "exchange": "p2p"},
    {"name": "norms of queries and keys", "exchange": "p2p", "split": True},
    {"name": "norms of queries and keys that turn", "exchange": "p2p"},
    {"name": "llama", "exchange": "p2p", "bf16": True},
    {"name": "plain", "exchange": "p2p", "bf16": True, "split": True},
]


@case(world_size=2, variants=CASES)
def test_layers_of_one_function_are_their_modules(
    ctx: CaseContext, name: str, cut: bool = True, split: bool = False, regathers: bool = True, frozen: str = "",
    bf16: bool = False,
) -> None:  # fmt: skip
    if bf16 and not rounds_products():
        pytest.skip("this CPU multiplies no bfloat16 numbers")
    with kernels("auto"), pytest.MonkeyPatch.context() as patch:
        ops.use_kernels("auto", 1, bf16_products=bf16)
        plan = RecomputePlan(core_attention=2 if "again" in name else 0, regather=2 if regathers else 0)
        runs = []
        for run in (Run, partial(recorded_by_mindspore, patch)):
            model = make_model(ctx, MODELS[name], plan, cut)
            for parameter in model.get_parameters():
                parameter.requires_grad = not (frozen and parameter.name.endswith(frozen))
            runs.append(run(model, split=split, streams=model.decoder.streams))
            assert plain_parts(model) == {PLAIN_PARTS.get(name, (True, True)) if run is Run else (False, False)}
    same(*runs)


@case(world_size=2, variants=OF_CONTEXT)
def test_layers_of_one_function_are_their_modules_where_ranks_exchange_keys(
    ctx: CaseContext, name: str, exchange: str, split: bool = False, bf16: bool = False
) -> None:
    """Attention is called between two of their steps."""
    if bf16 and not rounds_products():
        pytest.skip("this CPU multiplies no bfloat16 numbers")
    with kernels("auto"), pytest.MonkeyPatch.context() as patch:
        ops.use_kernels("auto", 1, bf16_products=bf16)
        runs = []
        for run in (Run, partial(recorded_by_mindspore, patch)):
            plan = RecomputePlan(core_attention=2 if "again" in name else 0)
            model = make_model_of_context(ctx, MODELS[name], exchange, plan)
            runs.append(run(model, split=split, streams=model.decoder.streams))
            assert plain_parts(model) == {PLAIN_PARTS.get(name, (True, True)) if run is Run else (False, False)}
    same(*runs)


def rounds_products() -> bool:
    return "bfloat16 operands" in ops.use_kernels("auto", 1, bf16_products=True)


def make_model(ctx: CaseContext, options: dict[str, Any], plan: RecomputePlan, cut: bool) -> GPTModel:
    config, streams = TransformerConfig(**{**SMALL, **options}), RandomStreams(7, ctx.rank)
    shared = {"streams": streams, "plan": plan, "ledger": RoutingLedger(config.moe)}
    return GPTModel(ModelStage(config, tp_group=world_group(ctx), sequence_parallel=cut, **shared))


def make_model_of_context(ctx: CaseContext, options: dict[str, Any], exchange: str, plan: RecomputePlan) -> GPTModel:
    config = TransformerConfig(**{**SMALL, "seq_length": ctx.world_size * LENGTH, **options})
    shared = {"streams": RandomStreams(7, 0, ctx.rank), "plan": plan, "ledger": RoutingLedger(config.moe)}
    groups = ContextGroups(world_group(ctx))
    return GPTModel(ModelStage(config, context_groups=groups, exchanges=(exchange,), **shared))
