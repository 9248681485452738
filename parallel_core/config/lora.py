"""Low-rank adapters of a frozen model's linear layers, as a run is told of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from parallel_core.errors import ConfigError

LORA_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Linear layers of a GPT's layer, by Megatron's names: what has an adapter where nobody says otherwise."""

_OTHER_NAMES = (
    ("decoder.layers.", "transformer.layers."),
    ("self_attention.linear_qkv", "attention.qkv_proj"), ("self_attention.linear_proj", "attention.out_proj"),
    ("mlp.linear_fc1", "mlp.mapping"), ("mlp.linear_fc2", "mlp.projection"),
)  # fmt: skip
"""Parts of layers' names here and in MindSpeed-Core-MS, whose `target_cells` name layers too."""
_OWN_RANK = re.compile(r"(.+)=(\d{1,6})?(?::(\d+(?:\.\d+)?(?:e[+-]?\d+)?))?")


def is_target(name: str, target: str) -> bool:
    """Tell whether a layer is meant: by the last part of its name, or by a regular expression of all of it.

    Args:
        name: the layer's global name; MindSpeed-Core-MS's name for it counts as well.
        target: what is written.
    """
    other = name
    for ours, theirs in _OTHER_NAMES:
        other = other.replace(ours, theirs)
    return any(known.rpartition(".")[2] == target or re.fullmatch(target, known) for known in (name, other))


@dataclass(frozen=True)
class TargetRank:
    """What one entry of `target_ranks` says."""

    target: str
    rank: int | None
    alpha: float | None

    @classmethod
    def read(cls, text: str) -> TargetRank:
        """Return what `TARGET=RANK`, `TARGET=RANK:ALPHA` or `TARGET=:ALPHA` says.

        Raises:
            ConfigError: it says something else.
        """
        found = _OWN_RANK.fullmatch(text)
        if found is None or not (found[2] or found[3]):
            raise ConfigError(f"{text!r} is no TARGET=RANK, TARGET=RANK:ALPHA or TARGET=:ALPHA")
        rank, alpha = int(found[2]) if found[2] else None, float(found[3]) if found[3] else None
        if rank == 0 or (alpha is not None and not 0 < alpha < math.inf):
            raise ConfigError(f"{text!r}: rank and alpha must be above zero")
        return cls(found[1], rank, alpha)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (LoRA): W stays, and alpha / rank x B A is learned beside it."""

    rank: int = 0
    """Rows of A; 0: no adapters, and the whole model is trained."""
    alpha: float = 32.0
    dropout: float = 0.0
    """Share of A's input that is dropped in training."""
    target_modules: tuple[str, ...] = LORA_MODULES
    """Which linear layers have one: last parts of their names, or regular expressions of whole names."""
    target_ranks: tuple[str, ...] = ()
    """Those of them with another rank or alpha, as `TargetRank.read` says; the first that means a layer counts."""
    base: str = ""
    """Directory of the base model of an adapter that is loaded; empty: where the adapter says it is."""

    def means(self, name: str) -> bool:
        """Tell whether a layer has an adapter, by its global name."""
        return any(is_target(name, target) for target in self.target_modules)

    def of(self, name: str) -> tuple[int, float]:
        """Return rank and alpha of the adapter on a layer.

        Args:
            name: the layer's global name.

        Raises:
            ConfigError: an entry of `target_ranks` cannot be read.
        """
        for own in map(TargetRank.read, self.target_ranks):
            if is_target(name, own.target):
                return own.rank or self.rank, own.alpha or self.alpha
        return self.rank, self.alpha
