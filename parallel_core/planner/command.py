"""`python -m parallel_core.config plan ... --search` as text: the best layouts, why, and what of the user's own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from parallel_core.config.load import LoadedConfig
from parallel_core.config.plan import Memory, num_floating_point_operations
from parallel_core.config.schema import AllConfig
from parallel_core.errors import ConfigError
from parallel_core.pipeline.schedule import name_of_schedule
from parallel_core.planner.device import load_device
from parallel_core.planner.layouts import Layouts, command_line
from parallel_core.planner.search import GIB, Found, Search, Searcher, load_for_search, require_found

_WORTH_SAYING = 0.005
"""Share of an iteration below which a cause is not named."""


def search_text(
    words: list[str], world_size: int, *, device: str = "ascend910b", memory_gb: float | None = None, top: int = 10
) -> str:
    """Return the best layouts of a configuration for people.

    Args:
        words: the file and flags.
        world_size: ranks.
        device: name of a bundled device, or a device file.
        memory_gb: GiB that a rank may use; None: the device's.
        top: how many layouts.

    Raises:
        ConfigError: if the configuration or the device is wrong, a number makes no sense, or no layout is legal or
            fits.
    """
    if world_size < 1 or top < 1:
        raise ConfigError(f"--world-size {world_size}, --top {top}: use numbers above zero")
    machine = load_device(device)
    memory_gb = machine.memory_gb if memory_gb is None else memory_gb
    if not 0 < memory_gb < math.inf:
        raise ConfigError(f"--memory-gb {memory_gb:g}: use a number above zero")
    loaded, refusal, said = load_for_search(words, world_size)
    layouts = Layouts(loaded, world_size, machine.fused_attention, said)
    searcher = Searcher(world_size, machine, memory_gb * GIB)
    search = searcher.search(layouts, top)
    require_found(search, layouts, memory_gb)
    own = None if refusal is not None else searcher.found(loaded.config, {})
    lines = [
        f"{world_size} ranks of {machine.name}, {memory_gb:g} GiB each; {layouts.global_batch_size} samples a step",
        f"{search.sizes:,} legal sizes of tp, sp, cp, pp and microbatch, {search.too_large:,} of them too large; "
        f"{search.priced:,} layouts priced one by one, the others are slower even without a bubble; "
        f"{search.seconds:.1f} s",
        "",
        *_table(search, memory_gb),
        "",
        *_reasons(search, loaded, words, layouts),
        "",
        *_own(own, refusal, search, memory_gb),
    ]
    return "\n".join(lines) + "\n"


_HEADING = (
    "    |  seconds | TFLOP/s |   GiB | tp sp cp dp pp vpp | ep etp | schedule    | micro batch |   M | recompute | "
    "distributed optimizer"
)


def _table(search: Search, memory_gb: float) -> Iterator[str]:
    yield _HEADING
    for number, found in enumerate(search.best, 1):
        yield _row(f"{number:3d}", found)


def _row(name: str, found: Found) -> str:
    config = found.config
    p, model, data = config.parallel_config, config.model_config, config.dataset_config
    sequence = "yes" if p.sequence_parallel else "-"
    replicas = data.global_batch_size // (data.batch_size * data.micro_batch_num)
    experts = f"{p.expert_model_parallel_size:2d} {p.expert_tensor_size:3d}" if model.moe.num_experts else " -   -"
    chunks = p.virtual_pipeline_model_parallel_size
    optimizer = "yes" if config.training_config.use_distributed_optimizer else "no"
    return (
        f"{name:3} | {found.price.seconds:8.3f} | {_teraflops(found):7.1f} | {found.memory.total / GIB:5.3g} | "
        f"{p.tensor_model_parallel_size:2d} {sequence:>2} {p.context_parallel_size:2d} {replicas:2d} "
        f"{p.pipeline_model_parallel_size:2d} {chunks:3d} | {experts} | {_schedule(config):11} | "
        f"{data.batch_size:11d} | {data.micro_batch_num:3d} | {_recomputation(config):9} | {optimizer}"
    )


def _schedule(config: AllConfig) -> str:
    p = config.parallel_config
    if p.pipeline_model_parallel_size == 1:
        return "-"
    return name_of_schedule(p.pipeline_schedule, p.virtual_pipeline_model_parallel_size)


def _recomputation(config: AllConfig) -> str:
    p, word = config.parallel_config, config.model_config.recompute_granularity
    return "by layer" if p.recompute or p.select_recompute else "-" if word == "none" else word


def _teraflops(found: Found) -> float:
    config = found.config
    p, data = config.parallel_config, config.dataset_config
    operations = num_floating_point_operations(config, data.batch_size * data.micro_batch_num)
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    return operations / ranks / found.price.seconds / 1e12


def _reasons(search: Search, loaded: LoadedConfig, words: list[str], layouts: Layouts) -> Iterator[str]:
    for number, found in enumerate(search.best, 1):
        total = found.price.seconds
        shares = sorted(found.price.parts.items(), key=lambda item: -item[1])
        named = [f"{cause} {100 * part / total:.0f}%" for cause, part in shares if part > _WORTH_SAYING * total]
        yield f"{number:3d} why: {', '.join(named)}"
        yield f"    pipeline rank {found.fullest} is the fullest: {_holds(found.memory)}"
        words_of_layout = command_line(loaded, words, layouts, found.values)
        yield f"    {words_of_layout}"


def _holds(memory: Memory) -> str:
    return ", ".join(f"{name} {getattr(memory, name) / GIB:.3g} GiB" for name in vars(memory))


def _own(own: Found | None, refusal: str | None, search: Search, memory_gb: float) -> Iterator[str]:
    """Say where the user's own layout stands."""
    if refusal is not None or own is None:
        yield "your layout cannot run on so many ranks:"
        yield from (f"    {line.strip()}" for line in str(refusal).splitlines())
        return
    best, last = search.best[0], search.best[-1]
    same = [number for number, found in enumerate(search.best, 1) if _sizes(found) == _sizes(own)]
    if same:
        yield f"your layout is number {same[0]}"
        return
    yield _HEADING
    yield _row("own", own)
    if own.memory.total > memory_gb * GIB:
        yield (
            f"your layout is not among them because it does not fit: pipeline rank {own.fullest} needs "
            f"{own.memory.total / GIB:.3g} of {memory_gb:g} GiB ({_holds(own.memory)})"
        )
    if own.price.seconds > last.price.seconds:
        places = {1: best, len(search.best): last}
        more = [f"{100 * (own.price.seconds / one.price.seconds - 1):.0f}% more than number {n}" for n, one in
                places.items()]  # fmt: skip
        yield (
            f"your layout takes {own.price.seconds:.3f} s, {' and '.join(more)}; against number 1: "
            f"{_differences(own, best)}"
        )
    elif own.memory.total <= memory_gb * GIB:
        yield (
            f"your layout takes {own.price.seconds:.3f} s, as little as these; its split of layers or its "
            "recomputation is not one that the search makes"
        )


def _sizes(found: Found) -> tuple[object, ...]:
    config = found.config
    p = config.parallel_config
    return (
        p.tensor_model_parallel_size, p.sequence_parallel, p.context_parallel_size, p.pipeline_model_parallel_size,
        p.virtual_pipeline_model_parallel_size, p.num_layer_list, p.expert_model_parallel_size, p.expert_tensor_size,
        _schedule(config), config.dataset_config.batch_size, p.recompute, p.select_recompute,
        config.model_config.recompute_granularity, config.model_config.recompute_num_layers,
        config.training_config.use_distributed_optimizer,
    )  # fmt: skip


def _differences(own: Found, best: Found) -> str:
    differences = {cause: own.price.parts[cause] - best.price.parts[cause] for cause in own.price.parts}
    worth = _WORTH_SAYING * own.price.seconds
    named = sorted(differences.items(), key=lambda item: -item[1])
    return ", ".join(f"{cause} {seconds:+.3f} s" for cause, seconds in named if abs(seconds) > worth)
