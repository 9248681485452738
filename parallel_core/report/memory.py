"""What a layout costs in memory: the closed formulas beside what a short run really uses, as a table.

    python -m parallel_core.report.memory --config configs/gpt_tiny.yaml
    python -m parallel_core.report.memory --layouts single,tp2+sp,pp2+vpp2,cp2,dp2+distopt,single+full --config FILE

Every layout is started as a job of its own and runs three iterations on random tokens. Parameters, gradients and
optimizer state are measured as the bytes of the real buffers, activations as the peak that `MemoryMeter` sees in the
third iteration. That peak also holds what the formula leaves out: the temporaries of the operators that are running.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from parallel_core.config.fitting import FULL, memory_by_stage
from parallel_core.config.load import load_config, required_world_size
from parallel_core.config.plan import Memory, in_flight
from parallel_core.errors import ConfigError
from parallel_core.layout.sequence import EXCHANGES
from parallel_core.report.short_run import ShortRun, run_on_ranks, write_report

_OUTPUT = "PARALLEL_CORE_MEMORY_OUTPUT"
"""Set in the measured job: where its ranks leave what they found."""

_USAGE = "usage: python -m parallel_core.report.memory [--layouts L,L,..] [--config FILE] [--megatron-flag value ...]"

_EXCHANGES = tuple(word for word in EXCHANGES if "+" not in word)
_WORDS = f"single, tpN, ppN, vppN, cpN, dpN, epN, etpN, sp, zb, distopt, {', '.join(_EXCHANGES)}, selective, full"


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the ranks of one pipeline stage, by formula and as measured (the largest of its ranks)."""

    layout: str
    pp_rank: int
    in_flight: int
    formula: Memory
    measured: Memory


def layout_flags(layout: str) -> tuple[list[str], int]:
    """Return the flags that a layout stands for, and its number of ranks.

    Args:
        layout: words joined by '+': single, tpN, ppN, vppN (chunks per pipeline rank), cpN, dpN, epN (ranks that share
            the experts), etpN (ranks that share each), sp (sequence parallelism), zb (zero-bubble pipeline), distopt
            (distributed optimizer), p2p, all_gather or a2a (how context parallel ranks exchange keys), selective or
            full (recomputation).

    Raises:
        ConfigError: for another word.
    """
    sizes = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1, "ep": 1, "etp": 0}
    switches = {"sp": False, "distopt": False, "zb": False}
    recompute: list[str] = []
    exchange: list[str] = []
    for word in layout.split("+"):
        sized = re.fullmatch(r"(tp|pp|vpp|cp|dp|ep|etp)([1-9]\d*)", word)
        if sized:
            sizes[sized[1]] = int(sized[2])
        elif word in switches:
            switches[word] = True
        elif word in _EXCHANGES:
            exchange = ["--cp-comm-type", word]
        elif word == "selective":
            recompute = ["--recompute-granularity", "selective"]
        elif word == "full":
            recompute = [*FULL]
        elif word != "single":
            raise ConfigError(f"--layouts: {layout!r} has the word {word!r}; use {_WORDS}, joined by '+'")
    flags = ["--tensor-model-parallel-size", str(sizes["tp"]), "--pipeline-model-parallel-size", str(sizes["pp"])]
    if sizes["cp"] > 1:
        flags += ["--context-parallel-size", str(sizes["cp"]), *exchange]
    if sizes["vpp"] > 1:
        flags += ["--virtual-pipeline-model-parallel-size", str(sizes["vpp"])]
    if sizes["ep"] > 1:
        flags += ["--expert-model-parallel-size", str(sizes["ep"])]
    if sizes["etp"]:
        flags += ["--expert-tensor-parallel-size", str(sizes["etp"])]
    if switches["zb"]:
        flags += ["--pipeline-schedule", "zero-bubble"]
    flags.append("--sequence-parallel" if switches["sp"] else "--no-sequence-parallel")
    flags.append("--use-distributed-optimizer" if switches["distopt"] else "--no-use-distributed-optimizer")
    return flags + recompute, sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"]


def compare(layout: str, argv: Sequence[str]) -> list[StageMemory]:
    """Run one layout and return the memory of every pipeline stage.

    Args:
        layout: as for `layout_flags`; empty: as the configuration says.
        argv: `--config FILE --megatron-flag value ...`.

    Raises:
        ConfigError: if the configuration is wrong, or the run fails; the message has its last lines.
    """
    flags, world_size = layout_flags(layout) if layout else ([], 0)
    arguments = [*argv, *flags]
    world_size = world_size or required_world_size(load_config(arguments).config)
    config = load_config(arguments, world_size=world_size).config
    measured, fused = _run(arguments, world_size)
    # The compiled attention keeps no scores either, flash attention or not.
    formulas = memory_by_stage(config, world_size, fused=fused)
    rows = []
    for pp_rank, formula in enumerate(formulas):
        ranks = [memory for stage, memory in measured if stage == pp_rank]
        largest = Memory(**{name: max(getattr(m, name) for m in ranks) for name in asdict(ranks[0])})
        rows.append(StageMemory(layout or "as configured", pp_rank, in_flight(config, pp_rank), formula, largest))
    return rows


def memory_table(rows: Sequence[StageMemory]) -> str:
    """Return the rows as text, in MiB."""
    columns = ("weights", "gradients", "optimizer", "activations")
    cells = [["layout", "stage", "in flight", *columns]]
    for row in rows:
        pairs = [(getattr(row.formula, name), getattr(row.measured, name)) for name in columns]
        numbers = [f"{formula / 2**20:.2f} / {measured / 2**20:.2f}" for formula, measured in pairs]
        cells.append([row.layout, str(row.pp_rank), str(row.in_flight), *numbers])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    head, *lines = [
        " | ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in cells
    ]
    rule = "-+-".join("-" * width for width in widths)
    return "\n".join(["MiB per rank: closed formula / measured", head, rule, *lines])


def _run(arguments: Sequence[str], world_size: int) -> tuple[list[tuple[int, Memory]], bool]:
    """Run the job; return (pipeline rank, memory) of every rank, and whether the compiled kernels ran."""
    reports = run_on_ranks(__file__, arguments, world_size, _OUTPUT)
    memories = [(report["pp_rank"], Memory(**report["memory"])) for report in reports]
    return memories, all(report["fused"] for report in reports)


# ---- on a rank ------------------------------------------------------------------------------------------------------
def measure(argv: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run three iterations as this rank and return its global rank and what it reports."""
    from parallel_core.training.runtime import select_kernels, start_runtime, supported_precision

    rank, world_size = start_runtime()
    config, _ = supported_precision(load_config(argv, world_size=world_size).config)
    fused = select_kernels(config).startswith("fused")
    run = ShortRun(config, rank, world_size)
    run.iterate()
    run.iterate()
    report = {"pp_rank": run.context.pp.rank, "memory": asdict(measured_memory(run)), "fused": fused}
    run.close()
    return rank, report


def measured_memory(run: ShortRun) -> Memory:
    """Return this rank's bytes, its activations by one more iteration."""
    from parallel_core.report.memory_meter import MemoryMeter

    meter = MemoryMeter()
    meter.start()
    run.iterate()
    peak, bytes_of = meter.stop(), run.step.ddp.memory_bytes()
    return Memory(bytes_of["parameters"], bytes_of["gradients"], run.step.optimizer.memory_bytes(), peak)


def main(argv: Sequence[str]) -> int:
    """Print the table and return the exit status; in the measured job, write what this rank found."""
    if _OUTPUT in os.environ:
        rank, report = measure(argv)
        write_report(_OUTPUT, rank, report)
        return 0
    arguments, layouts = list(argv), [""]
    if {"-h", "--help"} & set(arguments):
        print(f"{_USAGE}\n\nwords of a layout, joined by '+': {_WORDS}\n{__doc__}")
        return 0
    try:
        if "--layouts" in arguments:
            place = arguments.index("--layouts")
            layouts = arguments[place + 1].split(",") if place + 1 < len(arguments) else []
            del arguments[place : place + 2]
        if not layouts:
            raise ConfigError(f"--layouts needs a value\n{_USAGE}")
        for layout in filter(None, layouts):
            layout_flags(layout)
        rows = [row for layout in layouts for row in compare(layout, arguments)]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(memory_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
