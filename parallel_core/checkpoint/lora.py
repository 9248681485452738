"""Adapters in checkpoints: a small directory that names its base model, read as the two merged into one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.dtypes import convert, storage_dtype
from parallel_core.checkpoint.source import TensorInfo, TensorSource, read_tensor
from parallel_core.errors import CheckpointError, bullet_list
from parallel_core.layout.shard import Range
from parallel_core.records import Record

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""What a layer's name is followed by in its adapter's: A [rank, in], B [out, rank]."""
KEY = "lora"
"""Under this `common` says that a checkpoint is an adapter: rank, alpha, target_modules, target_ranks, alphas of
layers with their own, base, fingerprint."""
_SAMPLED = 64


def is_adapter(common: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint holds adapters alone."""
    return common.get(KEY) is not None


def fingerprint(source: TensorSource) -> str:
    """Return what tells one model's weights from another's, in any format and layout: shapes, and some of each tensor.

    The padded vocabulary belongs to the layout, so tables count by their width.
    """
    digest = hashlib.sha256()
    for name in sorted(key for key in source.keys() if "@" not in key):  # noqa: SIM118 - a method of TensorSource
        info = source.info(name)
        ends = [min(n, _SAMPLED if dim == len(info.shape) - 1 else 1) for dim, n in enumerate(info.shape)]
        sample = np.empty(ends, storage_dtype(info.dtype))
        source.read_into(name, [(0, n) for n in ends], sample)
        values = convert(sample, info.dtype, "float32")
        shape = info.shape[1:] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else info.shape
        digest.update(f"{name} {shape} ".encode() + np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()[:32]


def base_directory(adapter: TensorSource, chosen: str = "") -> Path:
    """Return where an adapter's base model is said to be.

    Args:
        adapter: the adapter's checkpoint.
        chosen: the user's word (`--lora-base`), which stands over the adapter's.

    Raises:
        CheckpointError: it is not there.
    """
    told = Record(adapter.common[KEY], f"{adapter.path}: {KEY}", CheckpointError)
    path = Path(chosen or told.text("base"))
    if not path.exists():
        raise CheckpointError(
            f"{adapter.path} is an adapter of {path}, which is not there; name the base model's directory with "
            "--lora-base (of a run) or --base (of other commands)"
        )
    return path


def check_base(adapter: TensorSource, base: TensorSource) -> None:
    """Compare a base model with the one an adapter was trained beside.

    Raises:
        CheckpointError: it is another.
    """
    if adapter.common[KEY].get("fingerprint") != fingerprint(base):
        raise CheckpointError(
            f"{base.path} is not the base model of the adapter {adapter.path}: its weights are others; name the right "
            "one with --lora-base (of a run) or --base (of other commands)"
        )


def check_same_adapter(adapter: TensorSource, asked: Mapping[str, Any]) -> None:
    """Compare a run's adapters with those it is to go on with.

    Raises:
        CheckpointError: they have another rank, scale or other targets.
    """
    told = adapter.common[KEY]
    names = "rank", "alpha", "target_modules", "target_ranks"
    wrong = [name for name in names if told.get(name, asked[name]) != asked[name]]
    if wrong:
        lines = "; ".join(f"lora_{name}: saved {told.get(name)}, asked {asked[name]}" for name in wrong)
        raise CheckpointError(f"{adapter.path} holds another adapter: {lines}")


def layer_settings(adapter: TensorSource) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each layer that an adapter is on, by the layer's global name.

    Raises:
        CheckpointError: it does not say them.
    """
    told = Record(adapter.common[KEY], f"{adapter.path}: {KEY}", CheckpointError)
    alpha, alphas = told.number("alpha", minimum=0.0), told.record("alphas", {})
    found = {}
    for key in adapter.keys():  # noqa: SIM118 - a method of TensorSource
        if key.endswith(LORA_A):
            name, shape = key.removesuffix(LORA_A), adapter.info(key).shape
            if len(shape) not in (2, 3) or not shape[-2]:
                raise CheckpointError(f"{adapter.path}: {key} of shape {list(shape)} is no adapter's factor")
            found[name] = int(shape[-2]), float(alphas.number(name, alpha, minimum=0.0))
    return found


def check_same_layers(adapter: TensorSource, asked: Mapping[str, tuple[int, float]]) -> None:
    """Compare the layers that an adapter has with those of a run, which need not be told by the same words.

    Args:
        adapter: the adapter's checkpoint.
        asked: rank and alpha of the run's adapters by layer, of all ranks.

    Raises:
        CheckpointError: one has layers that the other has not, or of another rank or alpha.
    """
    held = layer_settings(adapter)
    if held.keys() != asked.keys():
        more, fewer = (
            ", ".join(sorted(names)[:4]) or "none" for names in (held.keys() - asked.keys(), asked.keys() - held.keys())
        )
        raise CheckpointError(
            f"{adapter.path} holds adapters on other layers than lora_target_modules names: there alone {more}; here "
            f"alone {fewer}"
        )
    other = [name for name in sorted(held) if held[name] != asked[name]]
    if other:
        lines = (f"{name}: saved {held[name][0]}:{held[name][1]:g}, asked {asked[name][0]}:{asked[name][1]:g}"
                 for name in other)  # fmt: skip
        raise CheckpointError(
            f"{adapter.path} holds adapters of other RANK:ALPHA (lora_target_ranks):\n{bullet_list(lines)}"
        )


class MergedAdapter:
    """A `TensorSource` of a base model with an adapter's W + alpha / rank * B A in the place of each adapted W."""

    def __init__(self, base: TensorSource, adapter: TensorSource) -> None:
        """Pair the two.

        Raises:
            CheckpointError: they do not belong together.
        """
        check_base(adapter, base)
        self.base, self.adapter = base, adapter
        self.path, self.format = adapter.path, adapter.format
        self.common = {**base.common, **{key: value for key, value in adapter.common.items() if key != KEY}}
        self.layers = layer_settings(adapter)
        """Rank and alpha by layer."""
        known, factors = set(base.keys()), set(adapter.keys())
        for name, (rank, _) in self.layers.items():
            if f"{name}.weight" not in known:
                raise CheckpointError(f"{adapter.path} adapts {name}, which {base.path} does not have")
            *more, rows, columns = base.info(f"{name}.weight").shape
            wanted = (*more, rank, columns), (*more, rows, rank)
            found = [adapter.info(name + end).shape for end in (LORA_A, LORA_B) if name + end in factors]
            if [*map(tuple, found)] != [*wanted]:
                raise CheckpointError(
                    f"{adapter.path}: the factors on {name} are {', '.join(map(str, map(list, found)))}, where "
                    f"{' and '.join(map(str, map(list, wanted)))} belong"
                )

    def adapted(self) -> list[str]:
        """Return the weights that have an adapter, in the base's order."""
        return [key for key in self.keys() if key.endswith(".weight") and key.removesuffix(".weight") in self.layers]

    def keys(self) -> list[str]:
        """Return the base's parameters; its optimizer state is of other weights."""
        return [key for key in self.base.keys() if "@" not in key]  # noqa: SIM118 - a method of TensorSource

    def info(self, key: str) -> TensorInfo:
        """Return the global shape and the stored dtype of `key`."""
        return self.base.info(key)

    def read_into(self, key: str, ranges: Sequence[Range], out: np.ndarray) -> int:
        """Fill `out` with one rectangle of `key`: summed in float32, rounded to the base's type."""
        count, name = self.base.read_into(key, ranges, out), key.removesuffix(".weight")
        if name not in self.layers or not key.endswith(".weight"):
            return count
        dtype, (rank, alpha) = self.base.info(key).dtype, self.layers[name]
        a, b = (
            convert(read_tensor(self.adapter, k), self.adapter.info(k).dtype, "float32")
            for k in (name + LORA_A, name + LORA_B)
        )
        *experts, rows, columns = (slice(*bounds) for bounds in ranges)
        of_b, of_a = (*experts, rows), (*experts, slice(None), columns)
        merged = convert(out, dtype, "float32") + np.float32(alpha / rank) * (b[of_b] @ a[of_a])
        np.copyto(out, convert(merged.astype(np.float32), "float32", dtype))
        return count
