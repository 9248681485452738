"""The fastest layouts that fit: all legal ones bounded from below, the promising ones simulated. Pure Python."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parallel_core.config.flags import UserArguments
from parallel_core.config.load import LoadedConfig, load_config, read_levels
from parallel_core.config.plan import Memory, rank_memory
from parallel_core.config.schema import AllConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.stages import StageLayout, stage_layout
from parallel_core.planner.device import Device
from parallel_core.planner.layer_time import AGAIN, LayerClock, MicrobatchTimes, Spans
from parallel_core.planner.layouts import REPLACED, SEARCHED, Candidate, Layouts, Values, without_layout
from parallel_core.planner.step_time import Price, Pricer, layer_counts

GIB = 2**30


@dataclass(frozen=True)
class Found:
    """A priced layout.

    Attributes:
        config: the run.
        values: what the search decided; empty for the user's own layout.
        price: seconds of an iteration.
        memory: bytes of the pipeline rank that needs most.
        fullest: that pipeline rank.
    """

    config: AllConfig
    values: Values
    price: Price
    memory: Memory
    fullest: int


@dataclass
class Search:
    """What a search found.

    Attributes:
        best: the fastest layouts that fit, the fastest first.
        sizes: legal sizes of all axes and of the microbatch, up to the first that is too large; each stands for its
            chunks, schedules, recomputations and optimizers.
        too_large: sizes that do not fit even with what saves most memory.
        priced: layouts that were priced one by one; the sizes of all others are slower with no bubble at all.
        seconds: how long the search took.
        smallest: the least that the fullest rank of a layout needs, in bytes.
    """

    best: list[Found] = field(default_factory=list)
    sizes: int = 0
    too_large: int = 0
    priced: int = 0
    seconds: float = 0.0
    smallest: float = float("inf")


class Searcher:
    """Prices layouts on one machine; what layouts have in common is computed once."""

    def __init__(self, world_size: int, device: Device, memory_bytes: float) -> None:
        self.world_size, self.device, self.memory_bytes = world_size, device, memory_bytes
        self._pieces: dict[tuple[Any, ...], tuple[LayerClock, MicrobatchTimes]] = {}
        self._layouts: dict[tuple[Any, ...], tuple[StageLayout, np.ndarray]] = {}

    # ---- one layout -------------------------------------------------------------------------------------------------
    def on_device(self, config: AllConfig) -> AllConfig:
        """Return the configuration with the activations that the device has, for what they take."""
        model, device = config.model_config, self.device
        fused = model.use_flash_attention or device.fused_attention
        dtype = device.computes_in or model.compute_dtype
        if fused == model.use_flash_attention and dtype == model.compute_dtype:
            return config
        return dataclasses.replace(config, model_config=_with_activations(model, dtype, fused))

    def pricer(self, config: AllConfig) -> Pricer:
        """Return what prices a configuration."""
        layout, counts = self._stages(config)
        return Pricer(config, self.world_size, self.device, layout, self._piece(config), counts)

    def _piece(self, config: AllConfig, ideal_experts: bool = False) -> tuple[LayerClock, MicrobatchTimes]:
        p, data = config.parallel_config, config.dataset_config
        key = (
            p.tensor_model_parallel_size, p.sequence_parallel, p.context_parallel_size, p.pipeline_model_parallel_size,
            p.expert_model_parallel_size, p.expert_tensor_size, data.batch_size, ideal_experts,
        )  # fmt: skip
        if key not in self._pieces:
            clock = LayerClock(config, self.device, Spans.of(config, self.world_size), ideal_experts)
            self._pieces[key] = clock, clock.times()
        return self._pieces[key]

    def _stages(self, config: AllConfig) -> tuple[StageLayout, np.ndarray]:
        p = config.parallel_config
        key = (
            p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size, p.num_layer_list,
            p.decoder_first_pipeline_num_layers, p.decoder_last_pipeline_num_layers, p.standalone_embedding_stage,
            p.account_for_embedding_in_pipeline_split, p.account_for_loss_in_pipeline_split,
        )  # fmt: skip
        if key not in self._layouts:
            layout = stage_layout(config.model_config.num_layers, p)
            self._layouts[key] = layout, layer_counts(config, layout)
        return self._layouts[key]

    def memory(self, config: AllConfig, ranks: Iterator[int] | range | tuple[int, ...]) -> tuple[Memory, int]:
        """Return the largest memory of some pipeline ranks, and which of them it is."""
        layout, _ = self._stages(config)
        p = config.parallel_config
        replicas = self.world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
        on_device = self.on_device(config)
        found = [(rank_memory(on_device, layout, rank, replicas), rank) for rank in ranks]
        return max(found, key=lambda pair: pair[0].total)

    def found(self, config: AllConfig, values: Values) -> Found:
        """Return a layout with its price and memory."""
        pipeline = range(config.parallel_config.pipeline_model_parallel_size)
        memory, fullest = self.memory(config, pipeline)
        return Found(config, values, self.pricer(config).price(), memory, fullest)

    # ---- all of them ------------------------------------------------------------------------------------------------
    def search(self, layouts: Layouts, top: int) -> Search:
        """Return the `top` fastest layouts that fit.

        Sizes are taken in the order of what they cost at least; the search ends where that is more than the seconds of
        `top` layouts. Of the layouts of the same sizes those are simulated whose own bound is below.
        """
        start, result = time.perf_counter(), Search()
        for least, sized in self._sizes(layouts, result):
            if least > _slowest(result, top):
                break
            for bound, spread in self._with_experts(layouts, sized):
                if bound > _slowest(result, top):
                    break
                for pipeline in layouts.pipelines(spread):
                    self._price_choices(layouts, pipeline, result, top)
        result.seconds = time.perf_counter() - start
        return result

    def _price_choices(self, layouts: Layouts, pipeline: Values, result: Search, top: int) -> None:
        """Price a pipeline with and without the distributed optimizer, and with as little recomputation as fits."""
        parallel = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        alone = self.world_size == math.prod(pipeline[name] for name in parallel)
        choices = layouts.choices(pipeline)
        for distributed in (True, False):
            if alone and distributed:
                continue  # there is nothing to share out
            for recompute in [word for word, shared in choices if shared == distributed]:
                candidate = layouts.candidate(pipeline, recompute, distributed)
                result.priced += 1
                if self.pricer(candidate.config).bound > _slowest(result, top):
                    break  # more recomputation takes longer
                if self._least_memory(candidate) > self.memory_bytes:
                    continue
                if layouts.resolve(candidate.values).problems:
                    continue  # a rule asks for what was taken as independent
                found = self.found(candidate.config, candidate.values)
                if found.memory.total <= self.memory_bytes:
                    result.best = sorted([*result.best, found], key=lambda one: one.price.seconds)[:top]
                    break

    def _sizes(self, layouts: Layouts, result: Search) -> list[tuple[float, Values]]:
        """Return the legal sizes that can fit with the seconds that they take at least, the fastest first."""
        found = []
        for shape in layouts.shapes():
            for sized in layouts.microbatches({**shape, "pipeline_schedule": "auto"}):
                result.sizes += 1
                choice = layouts.choices(sized)[-1]
                least = self._least_memory(layouts.candidate(layouts.most_spread(sized), *choice))
                result.smallest = min(result.smallest, least)
                if least > self.memory_bytes:
                    result.too_large += 1
                    break  # a larger microbatch needs more
                config = layouts.candidate(sized, *choice).config
                found.append((self._least_seconds(config, ideal_experts=True), sized))
        return sorted(found, key=lambda pair: pair[0])

    def _with_experts(self, layouts: Layouts, sized: Values) -> list[tuple[float, Values]]:
        """Return sizes with those of experts' axes that can fit, the fastest first."""
        found = []
        for spread in layouts.with_experts(sized):
            candidate = layouts.candidate(spread, *layouts.choices(spread)[-1])
            if self._least_memory(candidate) <= self.memory_bytes:
                found.append((self._least_seconds(candidate.config), spread))
        return sorted(found, key=lambda pair: pair[0])

    def _least_seconds(self, config: AllConfig, *, ideal_experts: bool = False) -> float:
        """Return what no schedule of any number of chunks is faster than: the work, shared out over pipeline ranks."""
        _, counts = self._stages(config)
        _, pieces = self._piece(config, ideal_experts)
        dense, sparse = counts.sum((0, 1))
        work = dense * pieces.dense + sparse * pieces.sparse + pieces.embedding + pieces.head
        ranks = config.parallel_config.pipeline_model_parallel_size
        return float(work[:AGAIN].sum()) * config.dataset_config.micro_batch_num / ranks

    def _least_memory(self, candidate: Candidate) -> int:
        """Return the larger memory of the first and the last pipeline rank."""
        last = candidate.config.parallel_config.pipeline_model_parallel_size - 1
        return self.memory(candidate.config, (0, last) if last else (0,))[0].total


def _slowest(result: Search, top: int) -> float:
    """Return the seconds that a layout must take less than to be among the best."""
    return result.best[-1].price.seconds if len(result.best) >= top else math.inf


@functools.lru_cache(maxsize=1024)
def _with_activations(model: Any, dtype: str, fused: bool) -> Any:
    return dataclasses.replace(model, compute_dtype=dtype, use_flash_attention=fused)


def require_found(search: Search, layouts: Layouts, memory_gb: float) -> None:
    """Refuse a search that found nothing.

    Raises:
        ConfigError: with the reason: no layout is legal, or none fits.
    """
    if search.best:
        return
    if search.sizes:
        raise ConfigError(
            f"--search: no legal layout of {layouts.world_size} ranks fits in {memory_gb:g} GiB, the smallest needs "
            f"{search.smallest / GIB:.3g}; give more ranks, or --memory-gb"
        )
    most = [f"  {words}" for words, _ in layouts.refused.most_common(3)]
    reasons = "\n".join(["; what refused most of them:", *most]) if most else ""
    raise ConfigError(f"--search: no layout of {layouts.world_size} ranks is legal for this configuration{reasons}")


def load_for_search(words: list[str], world_size: int) -> tuple[LoadedConfig, str | None, frozenset[str]]:
    """Return the configuration; why its own layout cannot run on so many ranks, if so; and what it then says of it.

    Args:
        words: the file and flags.
        world_size: ranks.

    Raises:
        ConfigError: if it is wrong in any layout.
    """
    try:
        return load_config(words, world_size=world_size), None, frozenset()
    except ConfigError as error:
        refusal = str(error)
    said = {entry.name for level in read_levels(words, UserArguments(None))[0] for entry in level}
    loaded = load_config([*words, *without_layout()], world_size=1)
    return loaded, refusal, frozenset(said & {*SEARCHED, *REPLACED})
