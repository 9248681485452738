"""What the multi-rank cases share: groups, tiny models, data by sample number, and whole tensors from shards."""

from __future__ import annotations

import base64
import functools
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.checkpoint import TensorSource, load_shards
from parallel_core.comm.background import in_background
from parallel_core.comm.factory import group_factory
from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    ModelParallelConfig,
    OptimizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from parallel_core.context import GROUP_AXES, ParallelContext, hierarchy
from parallel_core.layout.expert_mesh import expert_spans
from parallel_core.layout.mesh import Mesh
from parallel_core.layout.shard import Box, region, shard_of
from parallel_core.ops.documents import remember
from parallel_core.optimizer.schedules import OptimizerParamScheduler
from parallel_core.pipeline import recorded
from parallel_core.pipeline.stage import ForwardStep
from parallel_core.training.batches import get_batch_on_this_cp_rank
from parallel_core.training.forward_step import forward_step_with, get_batch
from parallel_core.training.model import get_model
from parallel_core.training.runtime import select_kernels
from parallel_core.training.schedule import batch_sizes, loss_scaler, schedule_shape
from parallel_core.training.step import StepReport, TrainingStep
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import make_model
from tests.helpers.cases import CaseContext

Model = dict[str, Any]


@contextmanager
def on_a_tape() -> Iterator[None]:
    """Fail if MindSpore's autograd has to record a stage."""
    logger, said = recorded.logger, list[str]()
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not said, said


# ---- groups ---------------------------------------------------------------------------------------------------------
@functools.cache
def _factory(rank: int, world_size: int) -> Callable[[str, list[int]], Group]:
    return group_factory("auto", 60.0, rank, world_size)


@functools.cache
def _group(rank: int, world_size: int, ranks: tuple[int, ...]) -> Group:
    if len(ranks) == 1:
        return SoloGroup("solo", rank)
    label = "world" if len(ranks) == world_size else "ranks-" + "-".join(map(str, ranks))
    return _factory(rank, world_size)(label, list(ranks))


def group_of(ctx: CaseContext, ranks: list[int]) -> Group:
    """Return a group that this rank is in; its members call this alike."""
    return _group(ctx.rank, ctx.world_size, tuple(ranks))


def world_group(ctx: CaseContext) -> Group:
    """Return the group of all ranks."""
    return _group(ctx.rank, ctx.world_size, tuple(range(ctx.world_size)))


@functools.cache
def parallel_context(
    rank: int,
    world_size: int,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    levels: tuple[int, ...] = (),
    ep: int = 1,
    etp: int = 0,
) -> ParallelContext:
    """Return what `ParallelContext.create` makes, with groups that are made once for all cases of a job."""
    mesh = Mesh.megatron(world_size, tensor_parallel=tp, pipeline_parallel=pp, context_parallel=cp)
    if world_size == 1:
        return ParallelContext.solo()
    world = _group(rank, world_size, tuple(range(world_size)))
    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    parallel = ModelParallelConfig(pipeline_model_parallel_size=pp, **sizes)
    spans = {name: mesh.group_of(rank, *axes) for name, axes in GROUP_AXES.items()}
    spans |= dict(expert_spans(rank, world_size, parallel))
    groups = {name: _group(rank, world_size, tuple(ranks)) for name, ranks in spans.items()}
    stages = mesh.group_of(rank, "pp")
    ends = tuple(dict.fromkeys((stages[0], stages[-1])))
    embedding = _group(rank, world_size, ends) if rank in ends else SoloGroup("embedding", rank)
    config = ModelParallelConfig(hierarchical_context_parallel_sizes=levels)
    inner, ring = (_group(rank, world_size, tuple(x)) for x in hierarchy(mesh.group_of(rank, "cp"), rank, config))
    return ParallelContext(mesh, rank, world, **groups, embedding=embedding, cp_inner=inner, cp_ring=ring)


# ---- a tiny run -----------------------------------------------------------------------------------------------------
TINY: Model = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "seq_length": 8,
    "ffn_hidden_size": 24,
    "attention_dropout_rate": 0.0,
    "hidden_dropout_rate": 0.0,
    "init_method_std": 0.2,
}
TINY_OPTIMIZER: Model = {"learning_rate": 1e-2, "eps": 1e-3, "lr_decay_style": "cosine"}


@dataclass(frozen=True, eq=False)
class Tiny:
    """A run small enough to do several of in one case: sections of the configuration that differ from the defaults."""

    model: Model = field(default_factory=dict)
    parallel: Model = field(default_factory=dict)
    training: Model = field(default_factory=dict)
    optimizer: Model = field(default_factory=dict)
    data: Model = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def with_(self, **sections: Model) -> Tiny:
        """Return this run with further settings."""
        return Tiny(**{name: {**getattr(self, name), **sections.get(name, {})} for name in vars(self)})

    def config(self) -> AllConfig:
        """Return the configuration."""
        return AllConfig(
            model_config=TransformerConfig(**{**TINY, **self.model}),
            parallel_config=ModelParallelConfig(**self.parallel),
            training_config=TrainingConfig(**{"training_iters": 8, **self.training}),
            dataset_config=DatasetConfig(**{"batch_size": 2, "global_batch_size": 8, **self.data}),
            optimizer_config=OptimizerConfig(**{**TINY_OPTIMIZER, **self.optimizer}),
        )


LLAMA = Tiny(
    model={
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "hidden_act": "swiglu",
        "group_query_attention": True,
        "num_query_groups": 4,
        "num_attention_heads": 8,
        "untie_embeddings_and_output_weights": True,
        "add_bias_linear": False,
        "qkv_has_bias": False,
        "out_proj_has_bias": False,
    }
)
"""A LLaMA-like model."""


def context_of(ctx: CaseContext, tiny: Tiny) -> ParallelContext:
    """Return this rank's groups for a run's layout."""
    parallel = tiny.config().parallel_config
    found = parallel_context(
        ctx.rank,
        ctx.world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.hierarchical_context_parallel_sizes,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    return replace(found, tp=in_background(found.tp)) if parallel.micro_batch_interleave_num > 1 else found


class SampleSource:
    """Microbatches whose content depends on the iteration and the sample's number alone, not on the layout."""

    forward_step: ForwardStep = staticmethod(forward_step_with(get_batch))

    def __init__(self, config: AllConfig, context: ParallelContext, num_microbatches: int, iteration: int) -> None:
        model, size = config.model_config, config.dataset_config.batch_size
        self._batches = []
        for microbatch in range(num_microbatches):
            number = microbatch * context.dp.size + context.dp.rank
            rng = np.random.default_rng([iteration, number])
            ids = rng.integers(0, model.vocab_size, (size, model.seq_length + 1)).astype(np.int32)
            mask = self._mask(rng, number, (size, model.seq_length)).astype(np.float32)
            starts = None
            if config.dataset_config.reset_attention_mask:
                cuts = rng.integers(0, model.seq_length, size)
                place = np.arange(model.seq_length)
                starts = np.where(place >= cuts[:, None], cuts[:, None], 0).astype(np.int32)
            places = np.broadcast_to(np.arange(model.seq_length, dtype=np.int32), mask.shape)
            if starts is not None and config.dataset_config.reset_position_ids:
                places = places - starts
            whole = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "position_ids": places}
            part = get_batch_on_this_cp_rank(whole, context.cp)
            batch = {name: Tensor(array.copy()) for name, array in part.items()}
            if not config.dataset_config.reset_position_ids:
                batch["position_ids"] = None
            known = None if starts is None else remember(Tensor(starts), starts)
            self._batches.append({**batch, "document_start": known})

    def iterator(self, chunk: int) -> Iterator[dict[str, Tensor | None]]:
        """Return the microbatches, for one model chunk."""
        return iter(self._batches)

    def _mask(self, rng: np.random.Generator, number: int, shape: tuple[int, int]) -> np.ndarray:
        """Return which tokens [B, S] of a microbatch count."""
        mask = rng.random(shape) < 0.8
        mask[0, 0] = True
        return mask


def provide_model(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
    """Build a model's chunk, as the training programs do."""
    return make_model(stage)


class TinyRun:
    """A training run on this rank, one iteration at a time."""

    def __init__(
        self,
        tiny: Tiny,
        context: ParallelContext,
        provider: Callable[..., nn.Cell] = provide_model,
        source: type[SampleSource] = SampleSource,
    ) -> None:
        self.config, self.context, self._source = tiny.config(), context, source
        select_kernels(self.config)
        self.sizes = batch_sizes(self.config, context.dp.size)
        iterations = self.config.training_config.training_iters
        scheduler = OptimizerParamScheduler(schedule_shape(self.config, self.sizes, iterations))
        model = get_model(provider, self.config, context)
        self.step = TrainingStep(self.config, context, model, source.forward_step, scheduler, loss_scaler(self.config))
        self.iteration = 0

    def take_weights(self, source: TensorSource) -> None:
        """Give this rank's parameters the values of a checkpoint."""
        for parameter, storage in self.step.ddp.parameters():
            shard = shard_of(parameter)
            storage.load(load_shards(source, {shard.name: shard})[0][shard.name].reshape(-1))
        self.step.optimizer.reload_masters()

    def train(self, iterations: int = 1) -> list[StepReport]:
        """Run iterations."""
        reports = []
        for _ in range(iterations):
            self.iteration += 1
            count = self.sizes.num_microbatches(0)
            data: Any = self._source(self.config, self.context, count, self.iteration)
            samples = self.sizes.global_batch_size
            reports.append(self.step.train(data, self.iteration, count, samples))
        return reports

    def evaluate(self) -> dict[str, float]:
        """Return the losses of one global batch."""
        count = self.sizes.num_microbatches(0)
        data: Any = self._source(self.config, self.context, count, 1000)
        return self.step.evaluate(data, self.iteration, count, 1)

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the whole model's parameters; collective."""
        self.step.ddp.finish_param_gather()
        parts = []
        for parameter, _ in self.step.ddp.parameters():
            spec = shard_of(parameter)
            values = parameter.astype(ms.float32).asnumpy()
            parts += [(spec.name, spec.global_shape, *_part(values, box)) for box in spec.boxes]
        return assemble(gather_values(self.context.world, parts))

    def gradients(self) -> dict[str, np.ndarray]:
        """Return the whole model's gradients as the last update found them (before unscaling); collective."""
        return self._from_segments(lambda s: self.step.ddp.buffers[s.buffer].grads.part(s.start, s.end).numpy())

    def moments(self, key: str) -> dict[str, np.ndarray]:
        """Return the whole model's optimizer state `key`; collective."""
        return self._from_segments(lambda s: self.step.optimizer.state_part(s, key).numpy())

    def _from_segments(self, value: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
        parts = []
        for parameter, segments in self.step.optimizer.segments_by_parameter():
            spec = shard_of(parameter)
            local = np.full(parameter.size, np.nan, np.float32)
            for one in segments:
                local[one.offset : one.offset + one.end - one.start] = value(one)
            local = local.reshape(spec.local_shape)
            parts += [(spec.name, spec.global_shape, *_part(local, box)) for box in spec.boxes]
        return assemble(gather_values(self.context.world, parts))


def _part(array: np.ndarray, box: Box) -> tuple[tuple[slice, ...], np.ndarray]:
    """Return where a rectangle of a rank's array belongs in the whole tensor, and its values."""
    return tuple(slice(*there) for there in box.globe), region(array, box.local).copy()


def assemble(parts_of_ranks: list[list[tuple[str, tuple[int, ...], Any, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Join the ranks' parts to whole tensors; where several ranks hold an element they must agree to the bit.

    NaN says that a rank does not hold an element.
    """
    whole: dict[str, np.ndarray] = {}
    for rank, parts in enumerate(parts_of_ranks):
        for name, shape, box, values in parts:
            target = whole.setdefault(name, np.full(shape, np.nan, np.float32))[box]
            both = ~np.isnan(target) & ~np.isnan(values)
            np.testing.assert_array_equal(values[both], target[both], err_msg=f"{name}: rank {rank} and an earlier one")
            np.copyto(target, values, where=~np.isnan(values))
    for name, values in whole.items():
        assert not np.isnan(values).any(), f"{name}: no rank holds some of its elements"
    return whole


def assert_close(got: dict[str, np.ndarray], want: dict[str, np.ndarray], rtol: float) -> None:
    """Compare dictionaries of tensors, each within `rtol` of its largest element."""
    assert sorted(got) == sorted(want)
    for name, values in want.items():
        scale = float(np.abs(values).max()) or 1.0
        np.testing.assert_allclose(got[name], values, rtol=0, atol=rtol * scale, err_msg=name)


def from_rank_0(ctx: CaseContext, compute: Callable[[], Any]) -> Any:
    """Return what rank 0 computed, on every rank."""
    if ctx.world_size == 1:
        return compute()
    return gather_values(world_group(ctx), compute() if ctx.rank == 0 else None)[0]


def gather_values(group: Group, value: Any) -> list[Any]:
    """Return the members' values in rank order, arrays among them, which the package itself does not send so."""
    texts = group.all_gather_object(base64.b64encode(pickle.dumps(value)).decode())
    return [pickle.loads(base64.b64decode(text)) for text in texts]


@contextmanager
def kernels(mode: str) -> Iterator[str]:
    """Use these kernels inside the block, and plain MindSpore operators after it; gives which were selected."""
    sentence = ops.use_kernels(mode)
    try:
        yield sentence
    finally:
        ops.use_kernels("local")
