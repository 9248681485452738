"""Writing Megatron's `torch` format: one `model_optim_rng.pt` (and `distrib_optim.pt`) per tensor and pipeline rank."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.megatron.export import KINDS, Export
from parallel_core.checkpoint.megatron.flat_buffers import FlatLayout
from parallel_core.checkpoint.megatron.names import layer_of, with_layer_offset
from parallel_core.checkpoint.megatron.pickle_emitter import torch_dtype, write_torch_zip
from parallel_core.checkpoint.safetensors_file import StreamTensor
from parallel_core.layout.shard import has_weight_decay


def rank_dir_name(tp: int, pp: int, num_stages: int) -> str:
    """Return a rank's directory name; the pipeline part is there only when there are several stages."""
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if num_stages > 1 else "")


def write_torch_rank(path: Path, export: Export, tp: int, pp: int, progress: Callable[[int], None]) -> None:
    """Write one rank's files into an `iter_XXXXXXX` directory, flushed to the disk.

    Args:
        path: the directory.
        export: what to write.
        tp: tensor parallel rank.
        pp: pipeline rank.
        progress: told after each tensor how many bytes it had.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    directory = path / rank_dir_name(tp, pp, export.pp)
    directory.mkdir(parents=True, exist_ok=True)
    state = export.common_state()
    order = [(chunk, name) for chunk in range(export.chunks) for name in _chunk_names(export, pp, chunk)]
    for chunk in range(export.chunks):
        key = "model" if export.chunks == 1 else f"model{chunk}"
        state[key] = _model_state(export, tp, pp, chunk, progress)
    if export.has_optimizer:
        distributed = bool(export.args["use_distributed_optimizer"])
        groups = _groups(export, [name for _, name in order])
        state["optimizer"] = (
            {"optimizer": {"param_groups": [export.param_group(decays) for decays, _ in groups]}}
            if distributed
            else _plain_optimizer(export, tp, groups, progress)
        )
        scaler = export.grad_scaler()
        if scaler is not None:
            state["optimizer"]["grad_scaler"] = scaler
        if distributed:
            _write(directory / "distrib_optim.pt", _flat_buffers(export, tp, pp, progress))
    _write(directory / "model_optim_rng.pt", state)


def _write(file: Path, state: Any) -> None:
    with file.open("wb") as handle:
        write_torch_zip(handle, state, file.stem)
        handle.flush()
        os.fsync(handle.fileno())


def _chunk_names(export: Export, pp: int, chunk: int) -> list[str]:
    """Return a chunk's parameters in registration order, with global layer numbers."""
    return [place.name for place in reversed(export.layouts.layout(pp, chunk, export.params_dtype).parameters)]


def _tracked(tensor: StreamTensor, progress: Callable[[int], None]) -> StreamTensor:
    def parts() -> Iterator[np.ndarray]:
        for part in tensor.parts():
            yield part
            progress(part.nbytes)

    return StreamTensor(tensor.shape, tensor.dtype, parts)


def _model_state(
    export: Export, tp: int, pp: int, chunk: int, progress: Callable[[int], None]
) -> OrderedDict[str, StreamTensor | None]:
    te_spec = export.args["transformer_impl"] == "transformer_engine"
    first = export.layouts.stages.layers[pp][chunk].start
    state: OrderedDict[str, StreamTensor | None] = OrderedDict()
    previous: int | None = None
    for name in _chunk_names(export, pp, chunk):
        layer = layer_of(name)
        if previous is not None and layer != previous:
            _add_extra_state(state, previous - first, export.linears, te_spec)
        previous = layer
        local = with_layer_offset(name, -first)
        state[export.name_in_file(local, distributed=False)] = _tracked(export.tensor(name, tp), progress)
    if previous is not None:
        _add_extra_state(state, previous - first, export.linears, te_spec)
    if export.layouts.stages.is_last(pp, chunk):
        state["output_layer._extra_state"] = None
    return state


def _add_extra_state(
    state: OrderedDict[str, StreamTensor | None], layer: int, linears: tuple[str, ...], te_spec: bool
) -> None:
    for module in (*linears, "self_attention.core_attention") if te_spec else linears:
        state[f"decoder.layers.{layer}.{module}._extra_state"] = None


def _groups(export: Export, names: list[str]) -> list[tuple[bool, list[str]]]:
    """Return Megatron's parameter groups, (has weight decay, members), in the order the parameters bring them up."""
    groups: dict[bool, list[str]] = {}
    for name in names:
        groups.setdefault(has_weight_decay(name, export.infos[export.stored_name(name)].shape), []).append(name)
    return list(groups.items())


def _plain_optimizer(
    export: Export, tp: int, groups: list[tuple[bool, list[str]]], progress: Callable[[int], None]
) -> dict[str, Any]:
    """Return torch's optimizer state: parameters are numbered group by group."""
    states: dict[int, dict[str, Any]] = {}
    param_groups, masters = [], []
    for decays, names in groups:
        start = len(states)
        for name in names:
            step = export.step_tensor()
            moments = {kind: _tracked(export.tensor(name, tp, kind), progress) for kind in KINDS}
            states[len(states)] = {"step": step, **moments}
        param_groups.append({**export.param_group(decays), "params": list(range(start, len(states)))})
        masters.append([_tracked(export.tensor(name, tp, "master"), progress) for name in names])
    inner = {"state": states, "param_groups": param_groups}
    if export.params_dtype == "float32":
        return inner
    return {"optimizer": inner, "fp32_from_fp16_params": masters}


def _flat_buffers(export: Export, tp: int, pp: int, progress: Callable[[int], None]) -> dict[Any, Any]:
    """Return the content of `distrib_optim.pt`."""
    tag = export.params_dtype
    narrow_gradients = tag == "float16" and not export.args.get("accumulate_allreduce_grads_in_fp32")
    dtypes = (torch_dtype(tag), torch_dtype(tag if narrow_gradients else "float32"))
    buffers: dict[Any, Any] = {"buckets_coalesced": True}
    for chunk in range(export.chunks):
        layout = export.layouts.layout(pp, chunk, tag)
        buffers[chunk] = {
            dtypes: {
                **{
                    ("param" if kind == "master" else kind): _tracked(_flat(export, layout, tp, kind), progress)
                    for kind in ("master", *KINDS)
                },
                "numel_unpadded": layout.numel,
            }
        }
    return buffers


def _flat(export: Export, layout: FlatLayout, tp: int, kind: str) -> StreamTensor:
    def parts() -> Iterator[np.ndarray]:
        position = 0
        for place in layout.parameters:
            yield np.zeros(place.file_start - position, np.float32)
            yield export.read(place.name, tp, kind).reshape(-1)
            position = place.file_start + place.numel
        yield np.zeros(layout.numel - position, np.float32)

    return StreamTensor((layout.numel,), "float32", parts)
