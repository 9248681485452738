"""Rules of low-rank adapters."""

from __future__ import annotations

import re
from collections.abc import Callable

from parallel_core.config import table
from parallel_core.config.lora import LORA_MODULES
from parallel_core.config.resolution import Resolution
from parallel_core.config.schema import DEFAULTS

LORA_CHECKS: dict[str, Callable[[Resolution], None]] = {}
_OPTIONS = ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_base")
_OTHER_NAMES = {"query_key_value": "linear_qkv", "q_proj": "linear_qkv", "dense_h_to_4h": "linear_fc1",
                "dense_4h_to_h": "linear_fc2", "o_proj": "linear_proj", "dense": "linear_proj"}  # fmt: skip


def _rule(function: Callable[[Resolution], None]) -> Callable[[Resolution], None]:
    LORA_CHECKS[function.__name__] = function
    return function


@_rule
def adapters(r: Resolution) -> None:
    """Adapters have a rank and a base; their other settings say nothing without them."""
    rank = r["lora_rank"]
    if rank < 0:
        r.fail("lora_rank", "must be above zero; 0: the whole model is trained")
    if not rank:
        for name in _OPTIONS:
            if r.is_given(name) and r[name] != DEFAULTS[table.BY_NAME[name].fields[0]]:
                r.fail(name, "belongs to adapters, and there are none; give lora_rank")
        return
    if not r["load"]:
        r.fail("lora_rank load", "adapts a model: give load, the base model or an adapter to go on with")
    if r["lora_alpha"] <= 0:
        r.fail("lora_alpha", "must be above zero")
    if not 0 <= (r["lora_dropout"] or 0) < 1:
        r.fail("lora_dropout", "must be at least 0 and below 1")
    if r["num_experts"]:
        r.fail("lora_rank num_experts", "experts have no adapters; leave one out")


@_rule
def adapter_targets(r: Resolution) -> None:
    """A target is the last part of a linear layer's name, or a regular expression."""
    for target in r["lora_target_modules"] or ():
        if target in _OTHER_NAMES:
            r.fail("lora_target_modules", f"{target} is called {_OTHER_NAMES[target]} here")
            continue
        try:
            re.compile(target)
        except re.error as error:
            known = ", ".join(LORA_MODULES)
            r.fail("lora_target_modules", f"{target!r} is no regular expression ({error}); modules are {known}")
    if not r["lora_target_modules"]:
        r.fail("lora_target_modules", "names no module; leave it out for all of them")
