"""The rows of the argument table, as text beside this file; `config/argument.py` tells how they are written."""

from __future__ import annotations

from importlib.resources import files

from parallel_core.config.argument import Argument, parse_rows

_TABLES = (
    "model", "latent_attention", "experts", "multi_token", "bert", "parallel", "training", "lora", "watching",
    "diagnosis", "data", "other", "ignored", "refused_models", "refused_runs",
)  # fmt: skip


def read_tables() -> tuple[Argument, ...]:
    """Return all rows, in the order of the documentation."""
    folder = files(__name__)
    return tuple(
        row for name in _TABLES for row in parse_rows((folder / f"{name}.txt").read_text(encoding="utf-8"))
    )
