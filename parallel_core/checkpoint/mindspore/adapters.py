"""Adapters (LoRA) that lie beside the weights in MindFormers' files, added to the weights when they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.dtypes import convert
from parallel_core.checkpoint.huggingface.tensors import Part
from parallel_core.checkpoint.mindspore.slices import Whole
from parallel_core.checkpoint.source import PieceSource, TensorInfo, read_tensor
from parallel_core.errors import CheckpointError, bullet_list
from parallel_core.layout.shard import Range
from parallel_core.records import show

_FACTOR = re.compile(r"(.+)\.(?:mindpet|tk)_delta_lora_([abAB])")
"""A factor on a linear layer: A [rank, in], B [out, rank]. The second spelling is that of older files."""


@dataclass(frozen=True)
class _Added:
    """What is added to rows of one of our matrices: scale times their rows of B, times A."""

    part: Part
    A: str  # noqa: N815 - the paper's name
    B: str
    scale: float


class StoredAdapters:
    """The adapters of a directory, by the matrix of ours that they are added to.

    Args:
        path: the directory, for messages.
        found: the stored tensors by name.
        told: `model.model_config.pet_config` of its `.yaml`.
        shapes: of our tensors.
        sources: which rows of theirs each of ours consists of.

    Raises:
        CheckpointError: an adapter is on no linear layer that has one here, is not whole, does not fit its layer, or
            its scale is not told.
    """

    def __init__(
        self, path: Path, found: Mapping[str, Whole], told: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, Sequence[Part]],
    ) -> None:  # fmt: skip
        factors: dict[str, dict[str, str]] = {}
        for name in found:
            match = _FACTOR.fullmatch(name)
            if match is not None:
                factors.setdefault(f"{match[1]}.weight", {})[match[2].lower()] = name
        self.names = frozenset(name for pair in factors.values() for name in pair.values())
        """Their tensors."""
        stored = {name: (TensorInfo(found[name].shape, found[name].dtype), list(found[name].pieces))
                  for name in self.names}  # fmt: skip
        self._factors = PieceSource(path, "mindformers", stored, {})
        self._added: dict[str, list[_Added]] = {}
        for ours, parts in sources.items():
            for part in parts:
                if part.name in factors and not part.transpose and len(shapes[ours]) == 2:
                    added = self._of_part(path, part, factors[part.name], told, found)
                    self._added.setdefault(ours, []).append(added)
        reached = {name for some in self._added.values() for one in some for name in (one.A, one.B)}
        strange = sorted(show(name) for name in self.names - reached)
        if strange:
            raise CheckpointError(
                f"{path}: {len(strange)} factors of adapters on layers that have none here:\n{bullet_list(strange, 20)}"
            )

    def _of_part(
        self, path: Path, part: Part, pair: Mapping[str, str], told: Mapping[str, Any], found: Mapping[str, Whole]
    ) -> _Added:
        if pair.keys() != {"a", "b"}:
            raise CheckpointError(f"{path}: of the adapter on {part.name} there is {', '.join(pair.values())} alone")
        if part.name not in found:
            raise CheckpointError(f"{path}: {part.name} is in no file, an adapter on it is")
        first, second = (self._factors.info(pair[end]).shape for end in "ab")
        base = found[part.name].shape
        rank = first[0] if first else 0
        if not rank or (first, second) != ((rank, base[-1]), (base[0], rank)):
            raise CheckpointError(
                f"{path}: the adapter on {part.name} is {list(first)} and {list(second)}, which does not fit its "
                f"{list(base)}"
            )
        alpha, said = told.get("lora_alpha"), told.get("lora_rank", rank)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < float("inf"):
            raise CheckpointError(
                f"{path} holds adapters; its .yaml must say their scale as model.model_config.pet_config.lora_alpha, "
                f"a number (found {show(alpha)})"
            )
        if said != rank:
            raise CheckpointError(f"{path}: pet_config says lora_rank {show(said)}, the adapters have rank {rank}")
        return _Added(part, pair["a"], pair["b"], alpha / rank)

    def add_to(self, key: str, dtype: str, ranges: Sequence[Range], out: np.ndarray) -> None:
        """Add what belongs to a rectangle of one of our tensors, in float32, rounded to the tensor's type.

        Args:
            key: our tensor.
            dtype: its dtype tag.
            ranges: the rectangle.
            out: its weights [rows, columns], in the storage dtype; changed.
        """
        if key not in self._added:
            return
        (top, bottom), columns = ranges[0], slice(*ranges[1])
        sums = convert(out, dtype, "float32").copy()
        for one in self._added[key]:
            begin, end = max(top, one.part.ours), min(bottom, one.part.ours + one.part.rows)
            if begin < end:
                A, B = (self._read(name) for name in (one.A, one.B))  # noqa: N806
                moved = one.part.theirs - one.part.ours
                rows = B[begin + moved : end + moved]
                sums[begin - top : end - top] += np.float32(one.scale) * (rows @ A[:, columns])
        np.copyto(out, convert(sums, "float32", dtype))

    def _read(self, name: str) -> np.ndarray:
        return convert(read_tensor(self._factors, name), self._factors.info(name).dtype, "float32")
