"""The state that rules read and write: Megatron-named values, who gave them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from parallel_core.config.table import TABLE
from parallel_core.config.values import Given, shortened

_WHEN_ABSENT: dict[str, Any] = {argument.name: argument.value_when_absent for argument in TABLE}


LARGEST: dict[str, int] = {
    "num_layers": 100_000,
    "tensor_model_parallel_size": 65_536,
    "pipeline_model_parallel_size": 65_536,
    "context_parallel_size": 65_536,
    "virtual_pipeline_model_parallel_size": 65_536,
    "expert_model_parallel_size": 65_536,
    "expert_tensor_parallel_size": 65_536,
    "num_experts": 65_536,
    "micro_batch_num": 1_000_000,
    "vocab_extra_ids": 1_000_000,
    "num_workers": 1024,
    "keep_checkpoint_max": 1_000_000,
    "seed": 2**32 - 1,
}
"""The largest value that can be meant, of numbers that something counts up to or that a library bounds."""


@dataclass
class Resolution:
    """Values of every argument, from the user, from Megatron's defaults, and derived by rules."""

    given: dict[str, Given]
    world_size: int | None = None
    unreadable: frozenset[str] = frozenset()
    """Arguments whose value the user gave in a form that cannot be read."""
    values: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = dict(_WHEN_ABSENT)
        self.values.update({name: entry.value for name, entry in self.given.items()})

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def is_given(self, name: str) -> bool:
        """Whether the user gave a value (None, "not given", does not count)."""
        return name in self.given and self.given[name].value is not None

    def derive(self, name: str, value: object, rule: str) -> None:
        """Set `name` to what `rule` makes of other values."""
        self.values[name] = value
        self.derived[name] = rule

    def fill(self, name: str, value: object, rule: str) -> None:
        """Set `name` as `rule` says unless it has a value already."""
        if self.values.get(name) is None:
            self.derive(name, value, rule)

    def term(self, name: str) -> str:
        """Return a value in the user's terms: the flag, file and line, or why it has the value it has."""
        value = self.values.get(name)
        if name in self.derived:
            return f"{name}={_plain(value)} ({self.derived[name]})"
        if self.is_given(name):
            return self.given[name].terms
        return f"{name}={_plain(value)} (default)" if value is not None else f"{name} (not given)"

    def fail(self, names: str, text: str) -> None:
        """Record a violation about the arguments `names` (space-separated), in the user's terms."""
        self.problems.append(f"{', '.join(self.term(name) for name in names.split())}: {text}")

    def note(self, text: str) -> None:
        """Record something worth telling the user."""
        self.notes.append(text)

    def source(self, name: str) -> str:
        """Return where the value of `name` came from, for the provenance listing."""
        if name in self.derived:
            return f"derived: {self.derived[name]}"
        if self.is_given(name):
            return self.given[name].source
        return "default"

    def positive(self, name: str) -> bool:
        """Whether `name` is a number above zero that can be meant: rules may divide by it and count up to it."""
        value = self.values.get(name)
        return isinstance(value, (int, float)) and 0 < value <= LARGEST.get(name, value)


def _plain(value: object) -> str:
    nested = isinstance(value, tuple) and value and isinstance(value[0], tuple)
    return shortened(str([list(row) for row in value]) if nested else str(value))  # type: ignore[attr-defined]


Rule = Callable[[Resolution], None]


class Rules(dict[str, Rule]):
    """Rules by name, in the order in which they run; called as the decorator of a rule, it takes that one in."""

    def __call__(self, function: Rule) -> Rule:
        """Take a rule in under its own name."""
        self[function.__name__] = function
        return function
