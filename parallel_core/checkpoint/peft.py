"""PEFT directories (`adapter_config.json`, `adapter_model.safetensors`) of LoRA adapters, read and written.

PEFT has an adapter on each of Hugging Face's linear layers, where a fused layer here has one. Written, its parts share
A and each has its rows of B. Read, layers that share A become one of the same rank, and others one whose A is all of
theirs stacked and whose B is zero where a part has no business: the same product.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.dtypes import convert
from parallel_core.checkpoint.huggingface.tensors import Part, TensorTable
from parallel_core.checkpoint.huggingface.values import read_json
from parallel_core.checkpoint.huggingface.writer import architecture_of
from parallel_core.checkpoint.layout_files import write_durably
from parallel_core.checkpoint.lora import KEY, LORA_A, LORA_B, MergedAdapter, fingerprint
from parallel_core.checkpoint.safetensors_file import StreamTensor, read_header, write_safetensors
from parallel_core.checkpoint.source import TensorInfo, TensorSource, read_tensor
from parallel_core.errors import CheckpointError, bullet_list
from parallel_core.layout.shard import Range
from parallel_core.records import Record, show

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "modules_to_save": ([],),
    "use_rslora": (False, True), "fan_in_fan_out": (False, True), "lora_bias": (False,), "layer_replication": ([],),
    "trainable_token_indices": ([],),
    "target_parameters": ([],), "megatron_config": (), "use_qalora": (False,), "use_bdlora": (False,),
}  # fmt: skip
"""Keys that say what an adapter computes, with the values that are read; none of them may be missing or null."""


def is_peft(path: Path) -> bool:
    """Tell whether a directory is of PEFT adapters."""
    return (path / CONFIG_NAME).exists()


def read_peft(path: Path, open_base: Callable[[str], TensorSource], chosen_base: str = "") -> MergedAdapter:
    """Return a PEFT directory with the model it is on.

    Args:
        path: the directory.
        open_base: opens the model, told the directory that the adapters name.
        chosen_base: a directory that stands over that one.

    Raises:
        CheckpointError: adapters of another kind than LoRA on linear layers, or of another model.
    """
    found = read_json(path / CONFIG_NAME)
    config = Record(dict(found), str(path / CONFIG_NAME), CheckpointError)
    wrong = [f"{key}: {show(found[key])}" for key, good in _ONLY.items()
             if found.get(key) is not None and found[key] not in good]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{path / CONFIG_NAME}: not built:\n{bullet_list(wrong)}")
    base = open_base(chosen_base or _named_base(path, config.text("base_model_name_or_path", "") or ""))
    model, architecture = architecture_of(base)
    layers = _Layers(path, config)
    factors: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    for name, parts in architecture.tensors.parts(model).items():
        if name.endswith(".weight") and any(layers.has(part.name) for part in parts):
            _refuse_vocabulary(path, name)
            factors[name] = layers.fused(parts, base.info(name).shape)
    layers.refuse_left_over()
    if not factors:
        raise CheckpointError(f"{path}: there are no adapters in it")
    tensors, alphas = {}, {name.removesuffix(".weight"): scale * A.shape[0] for name, (A, _, scale) in factors.items()}
    if found.get("rank_pattern") or found.get("alpha_pattern"):  # layers are told apart
        rank, alpha = (Counter(values).most_common(1)[0][0]
                       for values in ([A.shape[0] for A, _, _ in factors.values()], alphas.values()))  # fmt: skip
    else:  # of one rank, with zeros for what a layer does not have, and one scale
        rank, scale = max(A.shape[0] for A, _, _ in factors.values()), next(iter(factors.values()))[2]
        alpha, alphas = scale * rank, {}
        factors = {name: _widened(*factor, rank, scale) for name, factor in factors.items()}
    for name, (A, B, _) in factors.items():
        tensors[name.removesuffix(".weight") + LORA_A] = A
        tensors[name.removesuffix(".weight") + LORA_B] = B
    told = {"rank": rank, "alpha": alpha, "alphas": alphas, "base": str(base.path), "fingerprint": fingerprint(base)}
    return MergedAdapter(base, _Renamed(path, tensors, {"iteration": 0, KEY: told}))


def _widened(A: np.ndarray, B: np.ndarray, own: float, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray, float]:  # noqa: N803
    """Return factors of `rank` and `scale` with the product that A and B have at a scale of their own."""
    more = rank - A.shape[0]
    return np.pad(A, ((0, more), (0, 0))), np.pad(B * np.float32(own / scale), ((0, 0), (0, more))), scale


class _Renamed:
    """A `TensorSource` of the factors, float32, by the names that they have here."""

    def __init__(self, path: Path, tensors: Mapping[str, np.ndarray], common: dict[str, Any]) -> None:
        self.path, self.format, self.common, self._tensors = path, "PEFT", common, dict(tensors)

    def keys(self) -> list[str]:
        """Return the factors' names."""
        return list(self._tensors)

    def info(self, key: str) -> TensorInfo:
        """Return shape and dtype of a factor."""
        return TensorInfo(tuple(self._tensors[key].shape), "float32")

    def read_into(self, key: str, ranges: Sequence[Range], out: np.ndarray) -> int:
        """Fill `out` with one rectangle of a factor."""
        out[...] = self._tensors[key][tuple(slice(*bounds) for bounds in ranges)].reshape(out.shape)
        return 1


def _named_base(path: Path, named: str) -> str:
    if not named:
        told = path / CONFIG_NAME
        raise CheckpointError(f"{told} names no base model; write its directory as base_model_name_or_path")
    return named if os.path.isabs(named) or Path(named).is_dir() else str(path / named)


def _refuse_vocabulary(path: Path, name: str) -> None:
    if not name.startswith("decoder.layers."):
        raise CheckpointError(
            f"{path}: adapters on {name}: embeddings and output layers have none here; train without them, or merge "
            "them with peft (merge_and_unload)"
        )


@dataclass(frozen=True)
class _Factors:
    """A [r, in], B [out, r] and scale of one of their layers."""

    A: np.ndarray  # noqa: N815 - the paper's name
    B: np.ndarray
    scale: float


class _Layers:
    """The adapters of a PEFT directory by the name of their layer's weight, and which of them were asked for."""

    def __init__(self, path: Path, config: Record) -> None:
        self.path, self._config = path, config
        blobs, _ = read_header(path / WEIGHTS_NAME)
        self._blobs = {name.removeprefix(_PREFIX): blob for name, blob in blobs.items()}
        self._left = set(self._blobs)

    def has(self, weight: str) -> bool:
        """Tell whether a layer has an adapter."""
        return self._key(weight, LORA_A) in self._blobs or self._key(weight, LORA_B) in self._blobs

    def refuse_left_over(self) -> None:
        """Refuse tensors that belong to no layer of the model."""
        if self._left:
            raise CheckpointError(
                f"{self.path / WEIGHTS_NAME}: {len(self._left)} tensors of no known place:\n"
                + bullet_list(sorted(self._left))
            )

    def fused(self, parts: list[Part], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float]:
        """Return A [r, in], B [out, r] and scale of one of our layers, made of the adapters on its parts."""
        names = list(dict.fromkeys(part.name for part in parts))
        found = {name: self._one(name) for name in names if self.has(name)}
        first = next(iter(found.values()))
        A = first.A  # noqa: N806
        shared = all(np.array_equal(one.A, A) for one in found.values())
        if not shared:
            A = np.concatenate([one.A for one in found.values()])  # noqa: N806
        B = np.zeros((shape[0], A.shape[0]), np.float32)  # noqa: N806
        begins = dict(zip(found, np.cumsum([0, *(one.A.shape[0] for one in found.values())])))
        for part in parts:
            if part.name in found:
                one, at = found[part.name], 0 if shared else int(begins[part.name])
                rows = one.B[part.theirs : part.theirs + part.rows]
                rows = rows if one.scale == first.scale else rows * np.float32(one.scale / first.scale)
                if rows.shape[0] != part.rows or one.A.shape[1] != shape[1]:
                    raise CheckpointError(
                        f"{self.path}: the adapter on {part.name} is {list(one.A.shape)} and {list(one.B.shape)}, "
                        f"which does not fit the model's {list(shape)}"
                    )
                B[part.ours : part.ours + part.rows, at : at + one.A.shape[0]] = rows
        return A, B, first.scale

    def _one(self, weight: str) -> _Factors:
        arrays = []
        for suffix in (LORA_A, LORA_B):
            key = self._key(weight, suffix)
            blob = self._blobs.get(key)
            if blob is None or len(blob.shape) != 2:
                raise CheckpointError(f"{self.path / WEIGHTS_NAME}: {key} is missing, or no matrix")
            self._left.discard(key)
            arrays.append(convert(np.ascontiguousarray(blob.read()), blob.dtype, "float32"))
        A, B = arrays  # noqa: N806
        if A.shape[0] != B.shape[1]:
            raise CheckpointError(f"{self.path}: the factors on {weight} have ranks {A.shape[0]} and {B.shape[1]}")
        return _Factors(A, B, self._scale(weight.removesuffix(".weight"), A.shape[0]))

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._config.number("lora_alpha", 8)
        for pattern, value in dict(self._config.values.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(?:.*\.)?{pattern}", module) and isinstance(value, (int, float)):
                alpha = value
                break
        return float(alpha) / (rank**0.5 if self._config.flag("use_rslora", False) else rank)

    @staticmethod
    def _key(weight: str, suffix: str) -> str:
        return weight.removesuffix(".weight") + suffix


def write_peft(source: MergedAdapter, path: Path, base_path: str = "") -> None:
    """Write adapters as a PEFT directory.

    Args:
        source: the opened adapters, with the model they are on.
        path: an existing empty directory.
        base_path: the model that its readers shall load; empty: the one the adapters are on.

    Raises:
        CheckpointError: no architecture that is written for Hugging Face has such a model.
    """
    model, architecture = architecture_of(source.base)
    table = architecture.tensors
    tensors: dict[str, StreamTensor] = {}
    adapter = Record(source.adapter.common[KEY], f"{source.adapter.path}: {KEY}", CheckpointError)
    rank, alpha = adapter.integer("rank", minimum=1), _number(adapter.number("alpha"))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in source.adapted():
        own_rank, own_alpha = source.layers[name.removesuffix(".weight")]
        if len(source.info(name).shape) > 2:
            raise CheckpointError(
                f"{source.path}: {name} is of experts, whose adapters PEFT has no form for; merge them (--to hf)"
            )
        A, B = (  # noqa: N806
            convert(read_tensor(source.adapter, key), source.adapter.info(key).dtype, "float32")
            for key in (name.removesuffix(".weight") + LORA_A, name.removesuffix(".weight") + LORA_B)
        )
        by_layer: dict[str, list[Part]] = {}
        for part in table.parts(model)[name]:
            by_layer.setdefault(part.name, []).append(part)
        for theirs, parts in by_layer.items():
            rows = np.empty((sum(part.rows for part in parts), B.shape[1]), np.float32)
            for part in parts:
                rows[part.theirs : part.theirs + part.rows] = B[part.ours : part.ours + part.rows]
            module = _PREFIX + theirs.removesuffix(".weight")
            tensors[module + LORA_A] = StreamTensor.of(A, "float32")
            tensors[module + LORA_B] = StreamTensor.of(rows, "float32")
            if own_rank != rank:
                ranks[module.removeprefix(_PREFIX)] = own_rank
            if own_alpha != alpha:
                alphas[module.removeprefix(_PREFIX)] = _number(own_alpha)
    write_safetensors(path / WEIGHTS_NAME, tensors, {"format": "pt"})
    names = {key.removeprefix(_PREFIX).removesuffix(LORA_A) for key in tensors if key.endswith(LORA_A)}
    config: Mapping[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path or str(source.base.path),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _targets(names, table, model.num_layers),
        "bias": "none",
        "fan_in_fan_out": table.transposed,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    write_durably(path / CONFIG_NAME, json.dumps(config, indent=2))


def _number(value: float) -> float:
    return int(value) if value % 1 == 0 else float(value)


def _targets(names: set[str], table: TensorTable, num_layers: int) -> list[str]:
    """Return the layers with adapters: by the end of their name where all have one, else by all of it."""
    layers = [table.prefix + table.layers.format(i) + "." for i in range(num_layers)]
    ends = {name.removeprefix(layer) for layer in layers for name in names if name.startswith(layer)}
    whole = {end for end in ends if all(layer + end in names for layer in layers)}
    rest = {name for name in names if not any(name == layer + end for layer in layers for end in whole)}
    return sorted(whole | rest)
