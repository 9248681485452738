"""Models of Hugging Face's goldens as directories, and generators of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from parallel_core.generate.generator import Generator

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "hf"


def directory_of(name: str, folder: Path) -> Path:
    """Write a golden model as `transformers` would."""
    own = GOLDEN / "weights" / f"{name}.safetensors"
    tensors = load_file(own if own.exists() else GOLDEN / "weights" / "llama.safetensors")
    if name == "qwen3":
        tensors.update(load_file(GOLDEN / "weights" / "qwen3_norms.safetensors"))
    config = json.loads((GOLDEN / "configs" / f"{name}.json").read_text())
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def computed(name: str) -> Any:
    """Return what `transformers` computed."""
    return np.load(GOLDEN / "computed" / f"{name}.npz")


def prompts(name: str, *lengths: int) -> list[list[int]]:
    """Return prompts of these lengths."""
    tokens = computed(name)["tokens"]
    return [[int(t) for t in tokens[i % 2][:n]] for i, n in enumerate(lengths)]


def generator(name: str, folder: Path, **options: Any) -> Generator:
    """Return a generator on this process."""
    return Generator(directory_of(name, folder), **options)
