"""What a machine can do, as numbers in a YAML file: rates, links, memory. Pure Python."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from parallel_core.config.yaml_tree import read_leaves
from parallel_core.errors import ConfigError

FOLDER = Path(__file__).resolve().parent / "devices"
DTYPES = ("float32", "float16", "bfloat16")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "point_to_point")

Link = Mapping[str, tuple[float, float]]
"""Collective -> (microseconds until the first byte, gigabytes a second of what a rank sends)."""


@dataclass(frozen=True)
class Span:
    """Where the ranks of a group are: so many, `stride` apart."""

    size: int
    stride: int = 1


@dataclass(frozen=True, kw_only=True)
class Device:
    """The fields of a device file. Rates are those of one rank."""

    name: str
    ranks_per_node: int
    """Ranks that `inside` links join."""
    memory_gb: float
    """GiB that a rank may use."""
    computes_in: str
    """Type of activations whatever a configuration says; empty: as it says."""
    fused_attention: bool
    """Attention keeps no scores even without --use-flash-attn."""
    asynchronous: bool
    """The host runs ahead of the device, so that dispatch costs only where it takes longer than what it starts."""
    overlap: bool
    """Transfers run beside arithmetic, where a configuration asks for it."""
    product_tflops: Mapping[str, float]
    """Of large matrix products, by type."""
    product_half: tuple[float, float, float]
    """Rows, inner size and columns at which a product reaches half of that."""
    attention_tflops: Mapping[str, float]
    """Of fused attention over long sequences, by type."""
    attention_half: float
    """Sequence length at which it reaches half of that."""
    memory_gb_per_s: float
    """Of kernels that go once over their operands: norms, activations, residuals, losses."""
    update_gb_per_s: float
    """Of the optimizer's update."""
    layer_us: float
    """Host time to start a layer's kernels, forward and backward."""
    experts_us: float
    """More of it where a layer has experts."""
    ring_us: float
    """More of it for each further context parallel rank."""
    microbatch_us: float
    """Of a microbatch outside the layers."""
    step_us: float
    """Of an iteration outside its microbatches."""
    inside: Link
    between: Link
    """Links between nodes, of one rank."""

    def product_seconds(self, rows: float, inner: float, columns: float, dtype: str) -> float:
        """Return the time of [rows, inner] x [inner, columns]; at least that of moving the operands."""
        if not rows or not inner or not columns:
            return 0.0
        a, b, c = self.product_half
        share = rows / (rows + a) * inner / (inner + b) * columns / (columns + c)
        width = 4 if dtype == "float32" else 2
        moved = width * (rows * inner + inner * columns + rows * columns) / self.memory_gb_per_s / 1e9
        busy = 2.0 * rows * inner * columns / (self.product_tflops[dtype] * 1e12 * share)
        return max(busy, moved) if self.asynchronous else busy

    def attention_seconds(self, operations: float, length: float, dtype: str) -> float:
        """Return the time of fused attention over sequences of `length`."""
        return operations / (self.attention_tflops[dtype] * 1e12 * length / (length + self.attention_half))

    def collective_seconds(self, kind: str, size_bytes: float, span: Span) -> float:
        """Return the time of one collective.

        Args:
            kind: of `COLLECTIVES`.
            size_bytes: the whole tensor: what is reduced, what a gather ends with, what a scatter starts with, what
                each rank deals out, what is sent.
            span: the group; between nodes a ring has the links of all its ranks on a node, other transfers those of
                one rank.
        """
        if span.size == 1 or not size_bytes:
            return 0.0
        whole = span.size * span.stride <= self.ranks_per_node
        latency, rate = (self.inside if whole else self.between)[kind]
        if not whole and kind in ("all_reduce", "all_gather", "reduce_scatter"):
            here = max(1, min(span.size, self.ranks_per_node // span.stride))
            rate = min(self.inside[kind][1], rate * here)
        sent = size_bytes if kind == "point_to_point" else size_bytes * (span.size - 1) / span.size
        sent *= 2 if kind == "all_reduce" else 1
        hops = 1 if kind == "point_to_point" else math.ceil(math.log2(span.size))
        return latency * hops * 1e-6 + sent / rate * 1e-9


def load_device(name: str) -> Device:
    """Return a device by the name of a bundled file, or from a file of the user's.

    Raises:
        ConfigError: if there is none of that name, or the file lacks a field, has an unknown one, or a wrong value.
    """
    bundled = FOLDER / f"{name}.yaml"
    if name == Path(name).name and bundled.is_file():
        return read_device(str(bundled))
    if not name.endswith((".yaml", ".yml")):
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise ConfigError(f"--device {name}: no such device; use {known}, or FILE.yaml that `python -m "
                          "parallel_core.config calibrate` writes")  # fmt: skip
    return read_device(name)


def read_device(file: str) -> Device:
    """Return the device that a YAML file describes.

    Raises:
        ConfigError: as `load_device`, all that is wrong at once.
    """
    tree: dict[str, Any] = {}
    leaves, problems = read_leaves(file)
    names = {field.name for field in dataclasses.fields(Device)}
    for leaf in leaves:
        head, *rest = leaf.path
        if head not in names:
            near = difflib.get_close_matches(head, names, 1)
            known = f"did you mean {near[0]}?" if near else f"a device has {', '.join(sorted(names))}"
            problems.append(f"{leaf.source}: {head} is no field of a device; {known}")
        elif len(rest) > 1:
            problems.append(f"{leaf.source}: {'.'.join(leaf.path)} is too deep")
        elif rest:
            inner = tree.setdefault(head, {})
            inner[rest[0]] = leaf.value
        else:
            tree[head] = leaf.value
    problems += [f"{file}: lacks {name}" for name in sorted(names - tree.keys())]
    values = {name: _checked(file, name, value, problems) for name, value in tree.items()}
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return Device(**values)


_KINDS = {"name": str, "computes_in": str, "fused_attention": bool, "asynchronous": bool, "overlap": bool}
_MAY_BE_ZERO = ("layer_us", "experts_us", "ring_us", "microbatch_us", "step_us", "attention_half", "product_half")


def _checked(file: str, name: str, value: Any, problems: list[str]) -> Any:
    """Return a field's value as `Device` has it; what is wrong with it goes to `problems`."""
    zero = name in _MAY_BE_ZERO
    kind = _KINDS.get(name)
    if kind is not None:
        fits = type(value) is kind and (name != "computes_in" or value in ("", *DTYPES))
        words = f"one of {', '.join(DTYPES)}, or empty" if name == "computes_in" else "a word" if kind is str else \
            "true or false"
        return value if fits else problems.append(f"{file}: {name}={value!r}: use {words}")
    if name in ("product_tflops", "attention_tflops"):
        return _table(file, name, value, DTYPES, lambda one: _number(one, False), "a number above zero", problems)
    if name in ("inside", "between"):
        words = "[microseconds, gigabytes a second]"
        return _table(file, name, value, COLLECTIVES, lambda one: _pair(one), words, problems)
    if name == "product_half":
        fits = isinstance(value, list) and len(value) == 3 and all(_number(one, True) for one in value)
        return tuple(value) if fits else problems.append(f"{file}: {name}={value!r}: use three numbers of 0 or more")
    fits = _number(value, zero) and (name != "ranks_per_node" or type(value) is int)
    words = "a number of 0 or more" if zero else "a whole number above zero" if name == "ranks_per_node" else \
        "a number above zero"
    return value if fits else problems.append(f"{file}: {name}={value!r}: use {words}")


def _table(
    file: str, name: str, value: Any, keys: tuple[str, ...], fits: Any, words: str, problems: list[str]
) -> dict[str, Any] | None:
    if not isinstance(value, dict) or set(value) != set(keys):
        problems.append(f"{file}: {name}: needs {', '.join(keys)}, each {words}")
        return None
    problems += [f"{file}: {name}.{key}={one!r}: use {words}" for key, one in value.items() if not fits(one)]
    return {key: tuple(one) if isinstance(one, list) else one for key, one in value.items()}


def _number(value: object, zero: bool) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and (value > 0 or (zero and value == 0))  # type: ignore[arg-type,operator]


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _number(value[0], True) and _number(value[1], False)


def device_text(device: Device) -> str:
    """Return the YAML of a device file."""
    plain = {
        name: {key: list(one) if isinstance(one, tuple) else one for key, one in value.items()}
        if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(device).items()
    }  # fmt: skip
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=110)
