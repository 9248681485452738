"""`--inspect DIR`: what is this checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from parallel_core.checkpoint import TensorSource, verify
from parallel_core.checkpoint.megatron.export import Export, Target
from parallel_core.checkpoint.native import is_native
from parallel_core.checkpoint.safetensors_file import StreamTensor
from parallel_core.errors import ParallelCoreError, printable


def describe(source: TensorSource) -> str:
    """Return format, layout, model, counters, every tensor, and what would not convert."""
    common = source.common
    lines = [f"checkpoint    {source.path}", f"format        {source.format}{_optimizer_form(source)}"]
    lines.append(f"layout        {_layout(common)}")
    for key in ("iteration", "consumed_train_samples", "adam_step"):
        if key in common:
            lines.append(f"{key:<13} {common[key]}")
    lines.append("model")
    lines += [f"  {key:<36} {value}" for key, value in (common.get("model_config") or {}).items() if value is not None]
    lines += _tensors(source)
    lines.append("to native     everything")
    lines.append(f"to megatron   {_to_megatron(source)}")
    if is_native(Path(source.path)):
        problems = verify(source.path)
        lines.append("checksums     " + ("; ".join(problems) if problems else "intact"))
    return "\n".join(printable(line) if not line.startswith("to megatron") else line for line in lines)


def _optimizer_form(source: TensorSource) -> str:
    dialect = getattr(source, "optimizer_dialect", None)
    return f", optimizer {dialect}" if dialect else ""


def _layout(common: dict[str, Any]) -> str:
    mesh = common.get("mesh") or {}
    names = (("tp", "tensor_model"), ("pp", "pipeline_model"), ("vpp", "virtual_pipeline_model"), ("dp", "data"),
             ("ep", "expert_model"), ("etp", "expert_tensor"))  # fmt: skip
    return " ".join(
        f"{short}{mesh[f'{name}_parallel_size']}" for short, name in names if mesh.get(f"{name}_parallel_size")
    )


def _tensors(source: TensorSource) -> list[str]:
    keys = source.keys()
    kinds = Counter(key.partition("@")[2] or "parameters" for key in keys)
    total = sum(StreamTensor(source.info(key).shape, source.info(key).dtype, tuple).nbytes for key in keys)
    lines = [f"tensors       {', '.join(f'{count} {kind}' for kind, count in kinds.items())}, {total / 1e6:.1f} MB"]
    for key in keys:
        info = source.info(key)
        lines.append(f"  {key:<72} {info.dtype:<9} {list(info.shape)}")
    return lines


def _to_megatron(source: TensorSource) -> str:
    try:
        Export(source, Target())
    except ParallelCoreError as error:
        return f"no: {error}"
    return "everything (random number generator states are not carried over: load with --no-load-rng)"
