"""Which settings would make a run fit into memory, by the closed formulas. Pure Python."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel_core.config.load import load_config
from parallel_core.config.plan import Memory, rank_memory
from parallel_core.config.schema import AllConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.stages import stage_layout

FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")


@dataclass(frozen=True)
class Setting:
    """Arguments that change what a rank needs.

    Attributes:
        flags: the arguments, as they are added to the command line.
        ranks: how many it is for.
        memory: bytes of the rank that needs most, with them.
    """

    flags: tuple[str, ...]
    ranks: int
    memory: Memory


def memory_by_stage(config: AllConfig, world_size: int, *, fused: bool) -> list[Memory]:
    """Return the memory of a rank of each pipeline stage.

    Args:
        config: the run.
        world_size: ranks.
        fused: attention is computed by a kernel that keeps no scores, whatever the configuration says of it.
    """
    if fused and not config.model_config.use_flash_attention:
        config = dataclasses.replace(
            config, model_config=dataclasses.replace(config.model_config, use_flash_attention=True)
        )
    parallel = config.parallel_config
    layout = stage_layout(config.model_config.num_layers, parallel)
    replicas = world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    return [rank_memory(config, layout, rank, replicas) for rank in range(layout.num_ranks)]


def fullest(config: AllConfig, world_size: int, *, fused: bool) -> tuple[Memory, int]:
    """Return the memory of the pipeline rank that needs most, and which one it is; see `memory_by_stage`."""
    found = memory_by_stage(config, world_size, fused=fused)
    stage = max(range(len(found)), key=lambda number: found[number].total)
    return found[stage], stage


def settings_that_fit(
    words: Sequence[str], config: AllConfig, world_size: int, limit: float, *, fused: bool, count: int = 3
) -> list[Setting]:
    """Return the first settings that fit, those that cost least time first; each is legal, with the same global batch.

    On as many ranks, and where too few fit there, on two, four or eight times as many.

    Args:
        words: the command line of the run.
        config: what it means.
        world_size: ranks.
        limit: bytes that a rank may have for what the formulas count.
        fused: see `fullest`.
        count: how many are wanted.
    """
    most = min(limit, fullest(config, world_size, fused=fused)[0].total - 1)
    fitting: list[Setting] = []
    for ranks in (world_size, 2 * world_size, 4 * world_size, 8 * world_size):
        for flags in _candidates(config, ranks):
            if any(set(one.flags) <= set(flags) for one in fitting):
                continue  # it has what is enough without the rest
            try:
                changed = load_config([*words, *flags], world_size=ranks).config
                memory, _ = fullest(changed, ranks, fused=fused)
            except ConfigError:
                continue
            if memory.total <= most:
                fitting.append(Setting(tuple(flags), ranks, memory))
            if len(fitting) == count:
                return fitting
    return fitting


def _candidates(config: AllConfig, world_size: int) -> Iterator[list[str]]:
    """Yield arguments in the order of what they cost: one alone, then two, three and four together."""
    parallel, data, training = config.parallel_config, config.dataset_config, config.training_config
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    steps: list[list[str]] = []
    if not training.use_distributed_optimizer:
        steps.append(["--use-distributed-optimizer"])
    if tp > 1 and not parallel.sequence_parallel:
        steps.append(["--sequence-parallel"])
    if config.model_config.recompute_granularity not in ("selective", "full"):
        steps.append(["--recompute-granularity", "selective"])
    micro = data.batch_size
    batch = ["--global-batch-size", str(data.global_batch_size)]
    if micro > 1:
        half = max(n for n in range(1, micro) if micro % n == 0)
        steps.append(["--micro-batch-size", str(half), *batch, "--micro-batch-num", "null"])
        if half > 1:
            steps.append(["--micro-batch-size", "1", *batch, "--micro-batch-num", "null"])
    if config.model_config.recompute_granularity != "full":
        steps.append(list(FULL))
    if world_size % (2 * tp * pp) == 0:
        steps.append(["--tensor-model-parallel-size", str(2 * tp), *batch, "--micro-batch-num", "null"])
        steps.append(["--pipeline-model-parallel-size", str(2 * pp), *batch, "--micro-batch-num", "null"])
    for number in range(1, 5):
        for chosen in itertools.combinations(steps, number):
            flags = [word for one in chosen for word in one]
            if len({one[0] for one in chosen}) == number:  # not two values of one argument
                yield _once(flags)


def _once(flags: list[str]) -> list[str]:
    """Return the flags without those that come again."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            name = word
            found[name] = [word]
        else:
            found[name].append(word)
    return [word for words in found.values() for word in words]
