"""Writing Megatron's `torch` format: one `model_optim_rng.pt` (and `distrib_optim.pt`) per tensor and pipeline rank."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parallel_core.checkpoint.megatron.experts import is_buffer, is_expert
from parallel_core.checkpoint.megatron.export import KINDS, Export
from parallel_core.checkpoint.megatron.flat_buffers import FlatLayout
from parallel_core.checkpoint.megatron.names import with_layer_offset
from parallel_core.checkpoint.megatron.pickle_emitter import torch_dtype, write_torch_zip
from parallel_core.checkpoint.megatron.placement import is_te_spec
from parallel_core.checkpoint.safetensors_file import StreamTensor
from parallel_core.layout.shard import has_weight_decay


def rank_dir_name(tp: int, pp: int, num_stages: int, ep: int = 0, num_ep: int = 1) -> str:
    """Return a rank's directory; its name has parts for stages and experts' ranks where there are several."""
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if num_stages > 1 else "") + (f"_{ep:03d}" if num_ep > 1 else "")


class _Rank(NamedTuple):
    """One rank's view of what is written."""

    export: Export
    tp: int
    pp: int
    ep: int
    progress: Callable[[int], None]

    def tensor(self, name: str, kind: str = "") -> StreamTensor:
        """Return the rank's part, which reports what is read of it."""
        tensor = self.export.tensor(name, self.tp, kind, self.ep)

        def parts() -> Iterator[np.ndarray]:
            for part in tensor.parts():
                yield part
                self.progress(part.nbytes)

        return StreamTensor(tensor.shape, tensor.dtype, parts)

    def names(self, experts: bool | None = None) -> list[str]:
        """Return the rank's parameters, of all chunks, those of one of two optimizers or all."""
        names = [name for chunk in range(self.export.chunks) for name in self.export.layouts.names(self.pp, chunk)]
        return [n for n in names if not is_buffer(n) and (experts is None or is_expert(n) == experts)]


def write_torch_rank(path: Path, export: Export, tp: int, pp: int, ep: int, progress: Callable[[int], None]) -> None:
    """Write one rank's files into an `iter_XXXXXXX` directory, flushed to the disk.

    Args:
        path: the directory.
        export: what to write.
        tp: tensor parallel rank.
        pp: pipeline rank.
        ep: rank among those that share a layer's experts.
        progress: told after each tensor how many bytes it had.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    rank = _Rank(export, tp, pp, ep, progress)
    directory = path / rank_dir_name(tp, pp, export.pp, ep, export.grid.ep)
    directory.mkdir(parents=True, exist_ok=True)
    state = export.common_state()
    for chunk in range(export.chunks):
        state["model" if export.chunks == 1 else f"model{chunk}"] = _model_state(rank, chunk)
    if export.has_optimizer:
        # Experts that ranks share out have an optimizer of their own.
        kinds = (False, True) if export.grid.ep > 1 else (None,)
        optimizers = [_optimizer(rank, experts) for experts in kinds]
        state["optimizer"] = optimizers[0] if len(kinds) == 1 else optimizers
        if export.args["use_distributed_optimizer"]:
            # One of several data parallel ranks gathers the buffers of what they all hold.
            is_first = (export.grid.rank(tp, ep) or 0) < export.tp
            buffers = [_flat_buffers(rank, experts) if experts or is_first else None for experts in kinds]
            _write(directory / "distrib_optim.pt", buffers[0] if len(kinds) == 1 else buffers)
    _write(directory / "model_optim_rng.pt", state)


def _write(file: Path, state: Any) -> None:
    with file.open("wb") as handle:
        write_torch_zip(handle, state, file.stem)
        handle.flush()
        os.fsync(handle.fileno())


def _model_state(rank: _Rank, chunk: int) -> OrderedDict[str, StreamTensor | None]:
    export, previous = rank.export, ""
    te_spec = is_te_spec(export.args)
    first = export.layouts.stages.layers[rank.pp][chunk].start
    state: OrderedDict[str, StreamTensor | None] = OrderedDict()
    for name in export.layouts.names(rank.pp, chunk):
        stored = export.name_in_file(with_layer_offset(name, -first), distributed=False)
        module = stored.rpartition(".")[0]
        if previous and module != previous:
            state.update(_extra_state(previous, te_spec))
        state[stored] = rank.tensor(name)
        previous = module
    state.update(_extra_state(previous, te_spec))
    if export.layouts.stages.is_last(rank.pp, chunk):
        state["output_layer._extra_state"] = None
    return state


def _extra_state(module: str, te_spec: bool) -> dict[str, None]:
    """Return the empty entries that Megatron expects of a linear module, and of attention with its projection."""
    parent, _, name = module.rpartition(".")
    modules = [module] if name.startswith(("linear_", "eh_proj")) else []
    if name == "linear_proj" and te_spec:
        modules.insert(0, f"{parent}.core_attention")
    return {f"{entry}._extra_state": None for entry in modules}


def _optimizer(rank: _Rank, experts: bool | None) -> dict[str, Any]:
    """Return the state of one of a rank's optimizers, as `model_optim_rng.pt` holds it."""
    export = rank.export
    groups: dict[bool, list[str]] = {}
    for name in rank.names(experts):
        shape = export.layouts.local_shape(name)
        groups.setdefault(has_weight_decay(name, shape), []).append(name)
    # The order in which the parameters bring the groups up; where ranks of other stages have experts, one is empty.
    in_order = list(groups.items()) or [(True, [])]
    if export.args["use_distributed_optimizer"]:
        group_list = [export.param_group(decays, bool(experts)) for decays, _ in in_order]
        state: dict[str, Any] = {"optimizer": {"param_groups": group_list}}
    else:
        state = _plain_optimizer(rank, in_order, bool(experts))
    scaler = export.grad_scaler()
    if scaler is not None:
        state["grad_scaler"] = scaler
    return state


def _plain_optimizer(rank: _Rank, groups: list[tuple[bool, list[str]]], experts: bool) -> dict[str, Any]:
    """Return torch's optimizer state: parameters are numbered group by group."""
    export = rank.export
    states: dict[int, dict[str, Any]] = {}
    param_groups, masters = [], []
    for decays, names in groups:
        start = len(states)
        for name in names:
            states[len(states)] = {"step": export.step_tensor(), **{kind: rank.tensor(name, kind) for kind in KINDS}}
        param_groups.append({**export.param_group(decays, experts), "params": list(range(start, len(states)))})
        masters.append([rank.tensor(name, "master") for name in names])
    inner = {"state": states, "param_groups": param_groups}
    if export.params_dtype == "float32":
        return inner
    return {"optimizer": inner, "fp32_from_fp16_params": masters}


def _flat_buffers(rank: _Rank, experts: bool | None) -> dict[Any, Any]:
    """Return the content of `distrib_optim.pt`."""
    export = rank.export
    tag = export.params_dtype
    narrow_gradients = tag == "float16" and not export.args.get("accumulate_allreduce_grads_in_fp32")
    dtypes = (torch_dtype(tag), torch_dtype(tag if narrow_gradients else "float32"))
    buffers: dict[Any, Any] = {"buckets_coalesced": True}
    for index, layout in enumerate(export.layouts.buffers(tag, experts, rank.pp)):
        kinds = (("param", "master"), *((kind, kind) for kind in KINDS))
        flat = {stored: _flat(rank, layout, kind) for stored, kind in kinds}
        buffers[index] = {dtypes: {**flat, "numel_unpadded": layout.numel}}
    return buffers


def _flat(rank: _Rank, layout: FlatLayout, kind: str) -> StreamTensor:
    def parts() -> Iterator[np.ndarray]:
        position = 0
        for place in layout.parameters:
            yield np.zeros(place.file_start - position, np.float32)
            array = rank.export.read(place.name, rank.tp, kind, rank.ep).reshape(-1)
            yield array
            rank.progress(array.nbytes)
            position = place.file_start + place.numel
        yield np.zeros(layout.numel - position, np.float32)

    return StreamTensor((layout.numel,), "float32", parts)
