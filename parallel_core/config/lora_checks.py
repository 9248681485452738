"""Rules of low-rank adapters."""

from __future__ import annotations

import re

from parallel_core.config import table
from parallel_core.config.lora import LORA_MODULES, TargetRank, is_target
from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.schema import DEFAULTS
from parallel_core.errors import ConfigError

LORA_CHECKS = Rules()
_OPTIONS = ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_ranks", "lora_base")
_OTHER_NAMES = {"query_key_value": "linear_qkv", "q_proj": "linear_qkv", "dense_h_to_4h": "linear_fc1",
                "dense_4h_to_h": "linear_fc2", "o_proj": "linear_proj", "dense": "linear_proj"}  # fmt: skip


@LORA_CHECKS
def adapters(r: Resolution) -> None:
    """Adapters have a rank and a base; their other settings say nothing without them."""
    rank = r["lora_rank"]
    if rank < 0:
        r.fail("lora_rank", "must be above zero; 0: the whole model is trained")
    if not rank:
        for name in _OPTIONS if r["use_lora"] or not r.is_given("use_lora") else ():
            if r.is_given(name) and r[name] != DEFAULTS[table.BY_NAME[name].fields[0]]:
                r.fail(name, "belongs to adapters, and there are none; give lora_rank")
        return
    if not r["load"]:
        r.fail("lora_rank load", "adapts a model: give load, the base model or an adapter to go on with")
    if r["lora_alpha"] <= 0:
        r.fail("lora_alpha", "must be above zero")
    if not 0 <= (r["lora_dropout"] or 0) < 1:
        r.fail("lora_dropout", "must be at least 0 and below 1")


@LORA_CHECKS
def adapter_targets(r: Resolution) -> None:
    """A target is the last part of a linear layer's name, or a regular expression."""
    targets = [("lora_target_modules", target) for target in r["lora_target_modules"] or ()]
    for entry in r["lora_target_ranks"] or ():
        try:
            targets.append(("lora_target_ranks", TargetRank.read(entry).target))
        except ConfigError as error:
            r.fail("lora_target_ranks", str(error))
    for argument, target in targets:
        if target in _OTHER_NAMES:
            r.fail(argument, f"{target} is called {_OTHER_NAMES[target]} here")
            continue
        try:
            re.compile(target)
        except re.error as error:
            known = ", ".join(LORA_MODULES)
            r.fail(argument, f"{target!r} is no regular expression ({error}); modules are {known}")
    if not r["lora_target_modules"]:
        r.fail("lora_target_modules", "names no module; leave it out for all of them")


@LORA_CHECKS
def expert_adapters(r: Resolution) -> None:
    """Adapters on experts drop nothing of their input, and take it from where `moe_act` would free it."""
    if not r["lora_rank"] or not r["num_experts"] or not r.positive("num_layers"):
        return
    names = [f"decoder.layers.{n}.mlp.experts.experts.linear_fc{i}" for n in range(r["num_layers"]) for i in (1, 2)]
    try:
        meant = any(is_target(name, target) for name in names for target in r["lora_target_modules"] or ())
    except re.error:
        return
    if meant and r["lora_dropout"]:
        r.fail("lora_dropout num_experts", "the rows of experts stand where the layout puts them, and so would what is "
               "dropped; leave it out, or the experts by targets such as linear_qkv linear_proj")  # fmt: skip
    if meant and r["recompute_granularity"] == "selective" and "moe_act" in (r["recompute_modules"] or ()):
        r.fail("recompute_modules num_experts", "moe_act frees what adapters of experts need; leave it out, or the "
               "experts by targets such as linear_qkv linear_proj")  # fmt: skip
