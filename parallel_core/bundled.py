"""The files that come with the package: training programs, configurations, a text and its tokenizer."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

PROGRAMS = {
    "pretrain_gpt.py": "configs/gpt_tiny.yaml",
    "pretrain_pangu.py": "configs/pangu_tiny.yaml",
    "pretrain_bert.py": "configs/bert_tiny.yaml",
}
"""The training programs, each with what it trains when no argument says anything."""


def shared_folder() -> Path:
    """Return the folder that holds `pretrain_gpt.py`, `configs` and `data`: the package's own, or the checkout."""
    installed = _PACKAGE / "share"
    return installed if installed.is_dir() else _PACKAGE.parent


def is_checkout() -> bool:
    """Whether the package runs from its repository, where it may write beside its sources."""
    return shared_folder() == _PACKAGE.parent


def bundled_program(name: str = "pretrain_gpt.py") -> Path:
    """Return a training program that comes with the package; it may be missing."""
    return shared_folder() / name


def bundled_config(name: str) -> Path | None:
    """Return the configuration that `configs/NAME.yaml` means where no such file is, or None."""
    if not re.fullmatch(r"configs/[\w.-]+\.ya?ml", name):
        return None
    found = shared_folder() / name
    return found if found.is_file() else None


def cache_folder() -> Path:
    """Return where this user's compiled kernels and prepared texts are kept: $PARALLEL_CORE_CACHE, or the usual place.

    That is parallel_core in $XDG_CACHE_HOME, or in ~/.cache.
    """
    chosen = os.environ.get("PARALLEL_CORE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parallel_core"
