"""`verify A B`: are two checkpoints, of whatever formats and layouts, the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parallel_core.checkpoint import TensorSource, compare_model_config, read_tensor
from parallel_core.checkpoint.dtypes import FLOAT_TAGS, convert
from parallel_core.checkpoint.loading import VOCABULARY_TENSORS
from parallel_core.errors import bullet_list

_COMMON_KEYS = ("iteration", "consumed_train_samples", "adam_step", "opt_param_scheduler", "loss_scaler")


@dataclass
class Comparison:
    """What two checkpoints have in common, and what not.

    Attributes:
        equal: tensors equal bit for bit.
        padding: vocabulary tensors equal in every real row, padded differently.
        different: a line per tensor whose values, shape or dtype differ.
        only_first: keys the second one lacks.
        only_second: keys the first one lacks.
        settings: a line per setting or counter that differs.
    """

    equal: list[str] = field(default_factory=list)
    padding: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether every tensor of each is in the other, with the same real values."""
        return not (self.different or self.only_first or self.only_second)

    def text(self) -> str:
        """Return the comparison for a reader, at most ten lines of each kind."""
        lines = [f"{len(self.equal)} tensors equal bit for bit"]
        for what, items in (
            ("equal up to vocabulary padding", self.padding),
            ("different", self.different),
            ("only in the first", self.only_first),
            ("only in the second", self.only_second),
            ("settings differ", self.settings),
        ):
            if items:
                lines.append(f"{len(items)} {what}:\n{bullet_list(items)}")
        return "\n".join(lines)


def compare(first: TensorSource, second: TensorSource, with_optimizer: bool = True) -> Comparison:
    """Compare two checkpoints tensor by tensor, one tensor in memory at a time.

    A float32 weight stands for its own master, so checkpoints that keep it apart and ones that do not are the same.

    Args:
        first: an opened checkpoint.
        second: another.
        with_optimizer: whether optimizer state counts.
    """
    result = Comparison()
    a, b = (_keys(source, with_optimizer) for source in (first, second))
    result.only_first = sorted(a - b)
    result.only_second = sorted(b - a)
    for key in sorted(a & b):
        _compare_one(first, second, key, result)
    configs = [source.common.get("model_config") or {} for source in (first, second)]
    both = [{key: value for key, value in config.items() if value is not None} for config in configs]
    shared = both[0].keys() & both[1].keys()
    result.settings = compare_model_config(*({key: config[key] for key in shared} for config in both))
    for key in _COMMON_KEYS:
        values = [source.common.get(key) for source in (first, second)]
        if values[0] != values[1] and None not in values:
            result.settings.append(f"{key}: {values[0]!r} and {values[1]!r}")
    return result


def _keys(source: TensorSource, with_optimizer: bool) -> set[str]:
    keys = set(source.keys())
    if not with_optimizer:
        return {key for key in keys if "@" not in key}
    own = {
        key for key in keys if key.endswith("@master") and source.info(key.removesuffix("@master")).dtype == "float32"
    }
    return keys - own


def _compare_one(first: TensorSource, second: TensorSource, key: str, result: Comparison) -> None:
    infos = [source.info(key) for source in (first, second)]
    if infos[0].dtype != infos[1].dtype:
        result.different.append(f"{key}: {infos[0].dtype} and {infos[1].dtype}")
        return
    vocabulary = key.partition("@")[0] in VOCABULARY_TENSORS
    same_rows = all(len(info.shape) > 1 for info in infos) and infos[0].shape[1:] == infos[1].shape[1:]
    repadded = vocabulary and same_rows and infos[0].shape != infos[1].shape
    if infos[0].shape != infos[1].shape and not repadded:
        result.different.append(f"{key}: shape {list(infos[0].shape)} and {list(infos[1].shape)}")
        return
    a, b = (read_tensor(source, key) for source in (first, second))
    if repadded:
        known = [(source.common.get("model_config") or {}).get("vocab_size") for source in (first, second)]
        rows = min([len(a), len(b), *(n for n in known if n)])
        a, b = a[:rows], b[:rows]
    if np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)):
        (result.padding if repadded else result.equal).append(key)
    else:
        result.different.append(f"{key}: {_difference(a, b, infos[0].dtype)}")


def _difference(a: np.ndarray, b: np.ndarray, tag: str) -> str:
    count = int(np.count_nonzero(a != b))
    if tag not in FLOAT_TAGS:
        return f"{count} of {a.size} elements"
    values: list[Any] = [convert(array, tag, "float64") for array in (a, b)]
    with np.errstate(invalid="ignore"):
        return f"{count} of {a.size} elements, by up to {np.nanmax(np.abs(values[0] - values[1])):.3g}"
