"""Optimizer state of the `torch` format, by parameter: with and without the distributed optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel_core.checkpoint.megatron.common_state import scalar
from parallel_core.checkpoint.megatron.experts import is_buffer, is_expert
from parallel_core.checkpoint.megatron.flat_buffers import FlatLayout, bucket_size_of, flat_layout
from parallel_core.checkpoint.megatron.names import OUTPUT_LAYER, WORD_EMBEDDINGS
from parallel_core.checkpoint.megatron.placement import Chunk
from parallel_core.checkpoint.megatron.safe_pickle import TorchTensor
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.checkpoint.source import Blob
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import has_weight_decay
from parallel_core.records import Record, show


@dataclass
class OptimizerState:
    """One rank's optimizer: (kind, global name, local array) of every tensor, and Adam's step count.

    Kinds are "master", "exp_avg" and "exp_avg_sq"; a float32 model has no masters of its own.
    """

    tensors: list[tuple[str, str, Blob]] = field(default_factory=list)
    step: float | int | None = None


def read_optimizer(
    directory: Path,
    state: Mapping[str, Any],
    chunks: Sequence[Chunk],
    args: Mapping[str, Any],
    allow_inert: tuple[str, ...] = (),
) -> OptimizerState:
    """Return a rank's optimizer state, empty when none was saved.

    Args:
        directory: the rank's `mp_rank_XX[_YYY]`.
        state: top-level dict of its `model_optim_rng.pt`.
        chunks: the rank's model chunks.
        args: Megatron's arguments.
        allow_inert: further class names to read as inert data.

    Raises:
        CheckpointError: the state does not fit the parameters, or is in a form that cannot be read.
    """
    optimizer = state.get("optimizer")
    chunks = [chunk.only(lambda name: not is_buffer(name)) for chunk in chunks]
    if isinstance(optimizer, list) and len(optimizer) == 2:  # the second one is of the experts
        return _read_both(directory, optimizer, chunks, args, allow_inert)
    if isinstance(optimizer, list) and len(optimizer) == 1:
        optimizer = optimizer[0]
    if optimizer is None:
        if list(directory.parent.glob(f"{directory.name}_[0-9][0-9][0-9]/optim.pt")):
            raise CheckpointError(
                f"{directory}: its optimizer is in per-data-parallel-rank optim.pt files (Megatron of 2022), which "
                "cannot be read; use --no-load-optim with a copy that has no optim.pt"
            )
        return OptimizerState()
    if not isinstance(optimizer, Mapping):
        raise CheckpointError(f"{directory}: several chained optimizers cannot be read")
    where = f"{directory}: its optimizer"
    inner = Record(optimizer.get("optimizer", optimizer), where, CheckpointError)
    groups = inner.records("param_groups") if "param_groups" in inner.values else []
    if (directory / "distrib_optim.pt").exists():
        return _read_distributed(directory / "distrib_optim.pt", chunks, args, groups, allow_inert)
    if "state" not in inner.values:
        if args.get("use_distributed_optimizer"):
            raise CheckpointError(f"{directory / 'distrib_optim.pt'} is missing")
        return OptimizerState()
    return _read_plain(directory, Record(optimizer, where, CheckpointError), inner.record("state"), chunks, groups)


def _read_both(
    directory: Path,
    optimizers: Sequence[Any],
    chunks: Sequence[Chunk],
    args: Mapping[str, Any],
    allow_inert: tuple[str, ...],
) -> OptimizerState:
    """Read the optimizer of the experts and that of everything else, each with its own numbers of parameters."""
    result = OptimizerState()
    for number, (optimizer, wanted) in enumerate(zip(optimizers, (lambda name: not is_expert(name), is_expert))):
        mine = [chunk.only(wanted) for chunk in chunks]
        where = f"{directory}: its optimizer {number}"
        facts = Record(optimizer if isinstance(optimizer, Mapping) else {}, where, CheckpointError)
        inner = Record(facts.values.get("optimizer", facts.values), where, CheckpointError)
        groups = inner.records("param_groups") if "param_groups" in inner.values else []
        if (directory / "distrib_optim.pt").exists():
            part = _read_distributed(directory / "distrib_optim.pt", mine, args, groups, allow_inert, number)
        elif "state" in inner.values:
            part = _read_plain(directory, facts, inner.record("state"), mine, groups)
        else:
            continue
        result.tensors += part.tensors
        result.step = part.step if result.step is None else result.step
    return result


def _read_plain(
    directory: Path,
    optimizer: Record,
    state: Record,
    chunks: Sequence[Chunk],
    groups: Sequence[Record],
) -> OptimizerState:
    """Read torch's own optimizer state, whose indices run group by group."""
    result = OptimizerState()
    members = _members_of_groups(directory, chunks, groups)
    key = "fp32_from_fp16_params" if optimizer.values.get("fp32_from_fp16_params") else "fp32_from_fp16"
    masters = [*optimizer.sequence(key)] if optimizer.values.get(key) else []
    for position, (group, names) in enumerate(zip(groups, members)):
        for index, (chunk, name) in zip(group.integers("params"), names):
            shape, tensors = chunk.tensors[name].shape, state.inner(str(index), state.values.get(index, {})).values
            for kind in ("exp_avg", "exp_avg_sq"):
                _append(result, directory, kind, chunk.global_name(name), tensors.get(kind), shape)
            step = tensors.get("step", group.values.get("step"))
            result.step = result.step if result.step is not None else scalar(step)
        half = [(chunk, name) for chunk, name in names if chunk.tensors[name].dtype != "float32"]
        if half and masters:
            mine = masters[position] if position < len(masters) else None
            if not isinstance(mine, (list, tuple)) or len(mine) != len(half):
                raise CheckpointError(
                    f"{directory}: group {position} should have fp32 masters of {len(half)} parameters, found "
                    f"{show(mine)}"
                )
            for (chunk, name), tensor in zip(half, mine):
                _append(result, directory, "master", chunk.global_name(name), tensor, chunk.tensors[name].shape)
    return result


def _append(result: OptimizerState, where: Path, kind: str, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, TorchTensor) or tensor.shape != shape:
        found = list(tensor.shape) if isinstance(tensor, TorchTensor) else "nothing"
        raise CheckpointError(f"{where}: {kind} of {name} should have shape {list(shape)}, found {found}")
    result.tensors.append((kind, name, tensor.blob))


def _members_of_groups(
    directory: Path, chunks: Sequence[Chunk], groups: Sequence[Record]
) -> list[list[tuple[Chunk, str]]]:
    """Return which parameters each group holds, in order.

    Megatron walks all parameters of all chunks and sorts them into groups by weight decay and learning rate. Which
    group comes first depends on which parameter the walk meets first, so groups are told apart by what they say.
    """
    walk = [(chunk, name) for chunk in chunks for name in chunk.tensors]
    decoupled = any(group.values.get("is_decoupled_lr") for group in groups)
    members = []
    for group in groups:
        decays = group.number("wd_mult", group.number("weight_decay", 1)) != 0
        is_decoupled = bool(group.values.get("is_decoupled_lr"))
        members.append(
            [
                (chunk, name)
                for chunk, name in walk
                if has_weight_decay(name, chunk.tensors[name].shape) == decays
                and (not decoupled or is_decoupled == (name in (WORD_EMBEDDINGS, OUTPUT_LAYER)))
            ]
        )
    for i, (group, names) in enumerate(zip(groups, members)):
        if len(group.integers("params")) != len(names):
            raise CheckpointError(
                f"{directory}: optimizer group {i} has {len(group.integers('params'))} parameters, the model has "
                f"{len(names)} with that weight decay; the state cannot be assigned"
            )
    return members


def _read_distributed(
    file: Path,
    chunks: Sequence[Chunk],
    args: Mapping[str, Any],
    groups: Sequence[Record],
    allow_inert: tuple[str, ...],
    number: int = 0,
) -> OptimizerState:
    """Read the flat buffers of `distrib_optim.pt`, of one of its optimizers where there are several."""
    content = load_torch_zip(file, allow_inert=allow_inert)
    if isinstance(content, list) and number < len(content) <= 2:
        content = content[number]
        if content is None:  # written by another rank
            return OptimizerState()
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: several chained optimizers cannot be read")
    result = OptimizerState(step=next((scalar(g.values["step"]) for g in groups if "step" in g.values), None))
    with_any = [chunk for chunk in chunks if chunk.tensors]  # a chunk without experts has no buffer of them
    for index, chunk in enumerate(with_any):
        add_flat_buffers(result, str(file), content.get(index), chunk, args)
    return result


def add_flat_buffers(result: OptimizerState, where: str, buffers: Any, chunk: Chunk, args: Mapping[str, Any]) -> None:
    """Cut one model chunk's flat buffers into parameters.

    Args:
        result: is extended.
        where: the file, for messages.
        buffers: {(param dtype, grad dtype): {"param", "exp_avg", "exp_avg_sq", "numel_unpadded"}}.
        chunk: the model chunk.
        args: Megatron's arguments.

    Raises:
        CheckpointError: the buffer has another length than the arguments give, or an unknown structure.
    """
    if not isinstance(buffers, Mapping) or not all(isinstance(key, tuple) and len(key) == 2 for key in buffers):
        raise CheckpointError(
            f"{where}: its buffers are in the form Megatron used before February 2024; load it there with "
            "--ckpt-convert-update-legacy-dist-opt-format and save it again"
        )
    for (dtype, _), content in buffers.items():
        buffer = Record(content, f"{where}: the buffer of {show(dtype)}", CheckpointError).values
        tag = str(dtype).removeprefix("torch.")
        members = [(name, tensor) for name, tensor in chunk.tensors.items() if tensor.dtype == tag]
        flat = buffer.get("param")
        if not isinstance(flat, TorchTensor) or len(flat.shape) != 1:
            raise CheckpointError(f"{where}: the buffer of {tag} holds no flat `param`")
        layout = matching_layout(where, [(n, t.blob) for n, t in members], chunk.pp, chunk.index, args, flat.shape[0])
        shapes = {name: tensor.shape for name, tensor in members}
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            if kind == "param" and tag == "float32":
                continue  # the same values as the weights
            if not isinstance(buffer.get(kind), TorchTensor) or buffer[kind].shape != flat.shape:
                raise CheckpointError(f"{where}: the buffer of {tag} holds no {kind} of {flat.shape[0]} elements")
            for place in layout.parameters:
                part = buffer[kind].blob.crop([(place.file_start, place.file_start + place.numel)])
                name = chunk.global_name(place.name)
                result.tensors.append(("master" if kind == "param" else kind, name, part.reshape(shapes[place.name])))


def matching_layout(
    where: str,
    members: Sequence[tuple[str, Any]],
    pp: int,
    index: int,
    args: Mapping[str, Any],
    numel: int,
) -> FlatLayout:
    """Return the layout of a flat buffer, checked against its length.

    Args:
        where: the file, for messages.
        members: (name, local array) in registration order.
        pp: pipeline rank.
        index: model chunk.
        args: Megatron's arguments.
        numel: elements of the buffer in the file.

    Raises:
        CheckpointError: the lengths differ, so the places of the parameters are not known.
    """
    sizes = [(name, _numel(array.shape)) for name, array in members]
    layout = flat_layout(
        sizes,
        bucket_size_of(args, pp, index, sum(size for _, size in sizes)),
        shared_embeddings(args),
    )
    if layout.numel != numel:
        raise CheckpointError(
            f"{where}: the flat optimizer buffer of pipeline rank {pp}, chunk {index} has {numel} elements; by the "
            f"checkpoint's arguments it should have {layout.numel}, so the parameters in it cannot be located"
        )
    return layout


def shared_embeddings(args: Mapping[str, Any]) -> frozenset[str]:
    """Return the parameters the distributed optimizer keeps in buckets of their own: embeddings of two stages."""
    if int(args.get("pipeline_model_parallel_size") or 1) == 1:
        return frozenset()
    if not args.get("untie_embeddings_and_output_weights"):
        return frozenset({WORD_EMBEDDINGS, OUTPUT_LAYER})
    return frozenset({WORD_EMBEDDINGS} if args.get("mtp_num_layers") else ())


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
