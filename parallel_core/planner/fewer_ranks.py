"""Which layouts a run can go on in with fewer ranks than it began with. Pure Python."""

from __future__ import annotations

from parallel_core.config.load import LoadedConfig, is_legal
from parallel_core.errors import ConfigError
from parallel_core.launch.layout import describe_layout
from parallel_core.launch.together import Layout
from parallel_core.planner.device import load_device
from parallel_core.planner.layouts import Layouts, layout_flags
from parallel_core.planner.search import GIB, Found, Searcher, load_for_search

_DEVICES = {"CPU": "cpu", "Ascend": "ascend910b"}


def find_layouts(words: list[str], loaded: LoadedConfig, world_size: int, target: str, top: int = 3) -> list[Layout]:
    """Return layouts for fewer ranks: the configuration's own, if it fits, and the fastest that the search finds.

    The samples of an iteration stay what they were, so the losses do, too.

    Args:
        words: the arguments of the run.
        loaded: the configuration as it was with all ranks.
        world_size: ranks that are left.
        target: CPU or Ascend.
        top: how many the search finds.
    """
    batch = ["--global-batch-size", str(loaded.config.dataset_config.global_batch_size)]
    machine = load_device(_DEVICES[target])
    searcher = Searcher(world_size, machine, machine.memory_gb * GIB)
    try:
        fewer, refusal, said = load_for_search([*words, *batch], world_size)
        layouts = Layouts(fewer, world_size, machine.fused_attention, said)
        best = searcher.search(layouts, top).best
    except ConfigError:
        return []  # wrong in any layout of so many ranks
    found = [_layout(one, world_size, [*batch, *layout_flags(fewer, layouts, one.values)]) for one in best]
    if refusal is None:
        own = searcher.found(fewer.config, {})
        if own.memory.total <= searcher.memory_bytes:
            found.insert(0, _layout(own, world_size, batch))
    return [layout for layout in found if is_legal([*words, *layout.flags], world_size)]


def _layout(found: Found, world_size: int, flags: list[str]) -> Layout:
    name = describe_layout(found.config, world_size) or "one rank"
    size = f"{found.price.seconds:.3g} s an iteration, {found.memory.total / GIB:.2g} GiB a rank"
    return Layout(f"{name} ({size} by the planner)", tuple(flags))
