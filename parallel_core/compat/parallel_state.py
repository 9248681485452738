"""Megatron's `parallel_state` for user code: one `ParallelContext` kept for the process, under Megatron's names.

The package itself passes contexts and groups down and never looks here; a script written for Megatron-LM does:

    from parallel_core.compat import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()

A `..._group()` is a `parallel_core.comm.interface.Group`: it has `rank`, `size`, `ranks` and the collectives.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from parallel_core.comm.interface import Group
from parallel_core.config.schema import ModelParallelConfig
from parallel_core.context import ParallelContext
from parallel_core.errors import ConfigError

__all__ = [
    "destroy_model_parallel",
    "get_context",
    "get_context_parallel_global_ranks",
    "get_context_parallel_group",
    "get_context_parallel_rank",
    "get_context_parallel_world_size",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_src_rank",
    "get_data_parallel_world_size",
    "get_embedding_group",
    "get_expert_data_parallel_group",
    "get_expert_model_parallel_group",
    "get_expert_model_parallel_rank",
    "get_expert_model_parallel_world_size",
    "get_expert_tensor_parallel_group",
    "get_hierarchical_context_parallel_groups",
    "get_model_parallel_group",
    "get_pipeline_model_parallel_first_rank",
    "get_pipeline_model_parallel_group",
    "get_pipeline_model_parallel_last_rank",
    "get_pipeline_model_parallel_next_rank",
    "get_pipeline_model_parallel_prev_rank",
    "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_world_size",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_src_rank",
    "get_tensor_model_parallel_world_size",
    "get_virtual_pipeline_model_parallel_rank",
    "get_virtual_pipeline_model_parallel_world_size",
    "initialize_model_parallel",
    "is_initialized",
    "is_pipeline_first_stage",
    "is_pipeline_last_stage",
    "is_rank_in_embedding_group",
    "model_parallel_is_initialized",
    "set_context",
    "set_virtual_pipeline_model_parallel_rank",
    "virtual_pipeline_stage",
]

MEGATRON_ORDER = "tp-cp-ep-dp-pp"
"""The axes of Megatron's rank order, from the fastest- to the slowest-varying one; the only order built here."""

_NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    "pipeline_model_parallel_split_rank": ((None,), "encoder-decoder models are not built"),
    "encoder_tensor_model_parallel_size": ((0, None), "encoder-decoder models are not built"),
    "encoder_pipeline_model_parallel_size": ((0, None), "encoder-decoder models are not built"),
    "num_distributed_optimizer_instances": ((1,), "the optimizer is sharded over all data parallel ranks"),
    "use_sharp": ((False,), "SHARP is a feature of NCCL"),
    "nccl_communicator_config_path": ((None,), "NCCL is not used"),
    "communicator_config_path": ((None,), "the communicators take no configuration file"),
    "pipeline_model_parallel_comm_backend": ((None,), "pipeline groups use distributed_backend like all others"),
    "create_gloo_process_groups": ((True, False), ""),
    "get_embedding_ranks": ((None,), "the embedding group is the first and the last stage"),
    "get_position_embedding_ranks": ((None,), "position embeddings are on the first stage only"),
}
"""Megatron's other arguments, the values under which they ask for nothing, and why there is no more."""


@dataclass
class _State:
    """What the process remembers."""

    context: ParallelContext | None = None
    num_chunks: int | None = None
    chunk: int | None = None


_state = _State()


# ---- start and end --------------------------------------------------------------------------------------------------
def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    *,
    context_parallel_size: int = 1,
    hierarchical_context_parallel_sizes: Sequence[int] | None = None,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    distributed_timeout_minutes: float = 10.0,
    distributed_backend: str = "auto",
    order: str = MEGATRON_ORDER,
    **others: object,
) -> ParallelContext:
    """Return this rank's groups in Megatron's order, and keep them for the other functions of this module.

    Sets MindSpore to PyNative mode on the environment's DEVICE_TARGET and joins the job that msrun started, where the
    script has not done so. Collective: every rank calls it with the same arguments. Data parallelism takes what the
    other sizes leave.

    Args:
        tensor_model_parallel_size: ranks that share every layer.
        pipeline_model_parallel_size: ranks that share the sequence of layers.
        virtual_pipeline_model_parallel_size: model chunks on each pipeline rank; None: 1.
        context_parallel_size: ranks that share every sequence.
        hierarchical_context_parallel_sizes: ranks that exchange heads and ranks of a ring, whose product is
            `context_parallel_size`; None: one level.
        expert_model_parallel_size: ranks that share the experts of a layer.
        expert_tensor_parallel_size: ranks that share each expert; None: `tensor_model_parallel_size`.
        distributed_timeout_minutes: time limit of a collective.
        distributed_backend: auto, shm, mccl or hccl.
        order: Megatron's rank order; axes of size 1 may stand anywhere.
        **others: Megatron's remaining arguments, at values that ask for nothing.

    Raises:
        ConfigError: for sizes that do not fit the job, for what is not built, and at a second call.
    """
    if _state.context is not None:
        raise ConfigError(
            "initialize_model_parallel: model parallelism is already initialized; call destroy_model_parallel() first"
        )
    _check_others(others)
    for name, size in (
        ("tensor_model_parallel_size", tensor_model_parallel_size),
        ("pipeline_model_parallel_size", pipeline_model_parallel_size),
        ("virtual_pipeline_model_parallel_size", virtual_pipeline_model_parallel_size or 1),
        ("context_parallel_size", context_parallel_size),
        ("expert_model_parallel_size", expert_model_parallel_size),
        ("expert_tensor_parallel_size", expert_tensor_parallel_size or 1),
    ):
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}={size!r}: use an integer of 1 or more")
    levels = tuple(hierarchical_context_parallel_sizes or ())
    if levels and (len(levels) != 2 or levels[0] * levels[1] != context_parallel_size):
        raise ConfigError(
            f"hierarchical_context_parallel_sizes={list(levels)}: give two numbers whose product is "
            f"context_parallel_size={context_parallel_size}"
        )
    chunks = virtual_pipeline_model_parallel_size
    if chunks is not None and chunks > 1 and pipeline_model_parallel_size < 2:
        raise ConfigError(
            f"virtual_pipeline_model_parallel_size={chunks} needs pipeline_model_parallel_size of 2 or more, got "
            f"{pipeline_model_parallel_size}"
        )
    config = ModelParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks or 1,
        context_parallel_size=context_parallel_size,
        hierarchical_context_parallel_sizes=levels,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size or 0,
        distributed_backend=distributed_backend,
        distributed_timeout_minutes=distributed_timeout_minutes,
    )
    rank, world_size = _join_job()
    _check_order(order, config, world_size)
    context = ParallelContext.create(config, rank, world_size)
    set_context(context, virtual_pipeline_model_parallel_size=chunks)
    return context


def set_context(context: ParallelContext | None, virtual_pipeline_model_parallel_size: int | None = None) -> None:
    """Make this module speak of `context`, for instance of the one that a model provider is given by `pretrain`.

    Args:
        context: a rank's groups; None: forget the one in force.
        virtual_pipeline_model_parallel_size: model chunks on each pipeline rank; None: no virtual pipeline.
    """
    chunks = virtual_pipeline_model_parallel_size
    _state.context, _state.num_chunks = context, chunks
    _state.chunk = None if chunks is None else 0


def get_context() -> ParallelContext:
    """Return the context in force.

    Raises:
        ConfigError: before `initialize_model_parallel` or `set_context`.
    """
    if _state.context is None:
        raise ConfigError(
            "model parallelism is not initialized: call parallel_state.initialize_model_parallel(...) first, or "
            "set_context(...) with a context you have"
        )
    return _state.context


def destroy_model_parallel() -> None:
    """Wait for every rank and forget the groups; without any, do nothing."""
    if _state.context is not None:
        _state.context.destroy()
    set_context(None)


def is_initialized() -> bool:
    """Return whether there is a context."""
    return _state.context is not None


def model_parallel_is_initialized() -> bool:
    """Return whether there is a context; the tensor, pipeline and data parallel groups are made together."""
    return _state.context is not None


# ---- groups ---------------------------------------------------------------------------------------------------------
def get_model_parallel_group() -> Group:
    """Return the ranks that hold one replica of the model: tensor x pipeline."""
    return get_context().model


def get_tensor_model_parallel_group() -> Group:
    """Return the ranks that share this rank's layers."""
    return get_context().tp


def get_pipeline_model_parallel_group() -> Group:
    """Return the pipeline stages of this rank's replica, in stage order."""
    return get_context().pp


def get_data_parallel_group(with_context_parallel: bool = False) -> Group:
    """Return the ranks that hold what this one holds and read other samples.

    Args:
        with_context_parallel: with those that hold other parts of the same sequences.
    """
    if not isinstance(with_context_parallel, bool):
        raise ConfigError(f"with_context_parallel={with_context_parallel!r}: use True or False")
    return get_context().dp_cp if with_context_parallel else get_context().dp


def get_context_parallel_group() -> Group:
    """Return the ranks that hold parts of the same sequences."""
    return get_context().cp


def get_hierarchical_context_parallel_groups() -> list[Group]:
    """Return the levels of a hierarchical exchange: the ranks that exchange heads, and those of this rank's ring."""
    return [get_context().cp_inner, get_context().cp_ring]


def get_context_parallel_global_ranks() -> list[int]:
    """Return the global ranks of the context parallel group."""
    return list(get_context().cp.ranks)


def get_embedding_group() -> Group:
    """Return the first and the last pipeline stage.

    Raises:
        ConfigError: on a stage between them, which is in no such group.
    """
    if not is_rank_in_embedding_group(ignore_virtual=True):
        raise ConfigError(
            f"pipeline rank {get_pipeline_model_parallel_rank()} is in no embedding group: that is the first and the "
            f"last of {get_pipeline_model_parallel_world_size()}; ask is_rank_in_embedding_group() before"
        )
    return get_context().embedding


# ---- ranks and sizes ------------------------------------------------------------------------------------------------
def get_tensor_model_parallel_world_size() -> int:
    """Return the size of the tensor parallel group."""
    return get_context().tp.size


def get_tensor_model_parallel_rank() -> int:
    """Return this rank's position in its tensor parallel group."""
    return get_context().tp.rank


def get_tensor_model_parallel_src_rank() -> int:
    """Return the global rank of the first member of the tensor parallel group."""
    return get_context().mesh.group_of(get_context().rank, "tp")[0]


def get_pipeline_model_parallel_world_size() -> int:
    """Return the number of pipeline ranks."""
    return get_context().pp.size


def get_pipeline_model_parallel_rank() -> int:
    """Return this rank's position in its pipeline."""
    return get_context().pp.rank


def get_data_parallel_world_size(with_context_parallel: bool = False) -> int:
    """Return the number of replicas."""
    return get_data_parallel_group(with_context_parallel).size


def get_data_parallel_rank(with_context_parallel: bool = False) -> int:
    """Return the number of this rank's replica."""
    return get_data_parallel_group(with_context_parallel).rank


def get_data_parallel_src_rank() -> int:
    """Return the global rank of the first replica's counterpart of this rank."""
    return get_context().mesh.group_of(get_context().rank, "dp")[0]


def get_context_parallel_world_size() -> int:
    """Return 1."""
    return get_context_parallel_group().size


def get_context_parallel_rank() -> int:
    """Return 0."""
    return get_context_parallel_group().rank


def get_expert_model_parallel_world_size() -> int:
    """Return how many ranks share the experts of a layer."""
    return get_context().ep.size


def get_expert_model_parallel_rank() -> int:
    """Return which of these ranks this is."""
    return get_context().ep.rank


def get_expert_model_parallel_group() -> Group:
    """Return the ranks that share the experts of a layer."""
    return get_context().ep


def get_expert_tensor_parallel_group() -> Group:
    """Return the ranks that share each expert."""
    return get_context().etp


def get_expert_data_parallel_group() -> Group:
    """Return the ranks that hold the same experts."""
    return get_context().edp


# ---- pipeline stages ------------------------------------------------------------------------------------------------
def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Return the model chunks on each pipeline rank, None without a virtual pipeline."""
    get_context()
    return _state.num_chunks


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """Return the number of the chunk that is being built or run, None without a virtual pipeline."""
    get_context()
    return _state.chunk


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Say which chunk the stage questions are about.

    Raises:
        ConfigError: if there is no such chunk.
    """
    get_context()
    if rank is not None and not 0 <= rank < (_state.num_chunks or 1):
        raise ConfigError(f"there is no chunk {rank}: virtual_pipeline_model_parallel_size={_state.num_chunks}")
    _state.chunk = rank


@contextmanager
def virtual_pipeline_stage(chunk: int) -> Iterator[None]:
    """Inside the block, the stage questions are about `chunk`."""
    before = _state.chunk
    if _state.num_chunks is not None:
        set_virtual_pipeline_model_parallel_rank(chunk)
    try:
        yield
    finally:
        _state.chunk = before


def is_pipeline_first_stage(ignore_virtual: bool = False, vp_stage: int | None = None) -> bool:
    """Return whether this rank holds the model's first stage.

    Args:
        ignore_virtual: ask about the rank, not about one of its chunks.
        vp_stage: the chunk asked about; None: the one in force.
    """
    chunk = 0 if ignore_virtual else _chunk(vp_stage)
    return get_context().is_first_stage and chunk == 0


def is_pipeline_last_stage(ignore_virtual: bool = False, vp_stage: int | None = None) -> bool:
    """Return whether this rank holds the model's last stage; arguments as for `is_pipeline_first_stage`."""
    last = (_state.num_chunks or 1) - 1
    chunk = last if ignore_virtual else _chunk(vp_stage)
    return get_context().is_last_stage and chunk == last


def is_rank_in_embedding_group(ignore_virtual: bool = False, vp_stage: int | None = None) -> bool:
    """Return whether this rank (or one of its chunks) holds an embedding table or its tied copy."""
    return is_pipeline_first_stage(ignore_virtual, vp_stage) or is_pipeline_last_stage(ignore_virtual, vp_stage)


def get_pipeline_model_parallel_first_rank() -> int:
    """Return the global rank of the first stage of this rank's pipeline."""
    return _pipeline_ranks()[0]


def get_pipeline_model_parallel_last_rank() -> int:
    """Return the global rank of the last stage of this rank's pipeline."""
    return _pipeline_ranks()[-1]


def get_pipeline_model_parallel_next_rank() -> int:
    """Return the global rank of the following stage; the last one is followed by the first."""
    return _pipeline_ranks()[(get_context().pp.rank + 1) % get_context().pp.size]


def get_pipeline_model_parallel_prev_rank() -> int:
    """Return the global rank of the preceding stage; the first one is preceded by the last."""
    return _pipeline_ranks()[get_context().pp.rank - 1]


# ---- helpers --------------------------------------------------------------------------------------------------------
def _pipeline_ranks() -> list[int]:
    context = get_context()
    return context.mesh.group_of(context.rank, "pp")


def _chunk(vp_stage: int | None) -> int:
    count = _state.num_chunks or 1
    if vp_stage is not None and not 0 <= vp_stage < count:
        raise ConfigError(f"vp_stage={vp_stage}: this rank has {count} model chunk{'s' if count > 1 else ''}")
    return (_state.chunk or 0) if vp_stage is None else vp_stage


def _join_job() -> tuple[int, int]:
    """Set the device up unless the script has, join msrun's job, and return (rank, world size)."""
    import mindspore as ms

    from parallel_core.training.runtime import start_runtime

    return start_runtime(os.environ.get("DEVICE_TARGET", ms.get_context("device_target")))


def _check_others(others: dict[str, object]) -> None:
    for name, value in others.items():
        if name not in _NEUTRAL:
            close = difflib.get_close_matches(name, (*_NEUTRAL, *_OWN), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"initialize_model_parallel: unknown argument {name}={value!r}{hint}")
        neutral, reason = _NEUTRAL[name]
        if value not in neutral:
            raise ConfigError(f"initialize_model_parallel: {name}={value!r} is not supported: {reason}; leave it out")


_OWN = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "hierarchical_context_parallel_sizes",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "distributed_timeout_minutes",
    "distributed_backend",
    "order",
)


def _check_order(order: str, config: ModelParallelConfig, world_size: int) -> None:
    axes = order.lower().split("-")
    known = MEGATRON_ORDER.split("-")
    if len(set(axes)) != len(axes) or not set(axes) <= set(known):
        raise ConfigError(f"order={order!r}: give each of {', '.join(known)} at most once, joined by '-'")
    sizes = {"tp": config.tensor_model_parallel_size, "cp": config.context_parallel_size}
    model = config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.context_parallel_size
    sizes |= {
        "dp": max(1, world_size // model),
        "pp": config.pipeline_model_parallel_size,
    }
    needed = [axis for axis in known if sizes.get(axis, 1) > 1]
    missing = [axis for axis in needed if axis not in axes]
    if missing:
        raise ConfigError(f"order={order!r} leaves out {missing[0]}, which has size {sizes[missing[0]]}")
    if [axis for axis in axes if axis in needed] != needed:
        raise ConfigError(f"order={order!r} is not built; use Megatron's default {MEGATRON_ORDER!r}")
