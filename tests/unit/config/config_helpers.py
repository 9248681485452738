"""A small legal configuration as arguments, and the shorthand to load variations of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel_core.config import LoadedConfig, load_config
from parallel_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "config"
BASE = {
    "num_layers": "4", "hidden_size": "64", "num_attention_heads": "4", "seq_length": "32",
    "padded_vocab_size": "256", "micro_batch_size": "2", "lr": "1e-3", "train_iters": "10",
}


def argv(*words: str, without: tuple[str, ...] = ()) -> list[str]:
    """BASE as flags, less `without`, and then `words`."""
    base = [part for name, value in BASE.items() if name not in without
            for part in ("--" + name.replace("_", "-"), value)]
    return [*base, *words]


def load(*words: str, without: tuple[str, ...] = (), world_size: int | None = None) -> LoadedConfig:
    return load_config(argv(*words, without=without), world_size=world_size)


def problems(*words: str, without: tuple[str, ...] = (), world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load(*words, without=without, world_size=world_size)
    return str(error.value)
