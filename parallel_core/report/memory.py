"""What a layout costs in memory: the closed formulas beside what a short run really uses, as a table.

    python -m parallel_core.report.memory --config configs/gpt_tiny.yaml
    python -m parallel_core.report.memory --layouts single,tp2+sp,pp2+vpp2,cp2,dp2+distopt,single+full --config FILE

Every layout is started as a job of its own and runs three iterations on random tokens. Parameters, gradients and
optimizer state are measured as the bytes of the real buffers, activations as the peak that `MemoryMeter` sees in the
third iteration. That peak also holds what the formula leaves out: the temporaries of the operators that are running.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.config.load import load_config, required_world_size
from parallel_core.config.plan import Memory, in_flight, rank_memory
from parallel_core.config.schema import AllConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.sequence import EXCHANGES
from parallel_core.layout.stages import stage_layout

_OUTPUT = "PARALLEL_CORE_MEMORY_OUTPUT"
"""Set in the measured job: where its ranks leave what they found."""

_USAGE = "usage: python -m parallel_core.report.memory [--layouts L,L,..] [--config FILE] [--megatron-flag value ...]"

_EXCHANGES = tuple(word for word in EXCHANGES if "+" not in word)
_WORDS = f"single, tpN, ppN, vppN, cpN, dpN, sp, zb, distopt, {', '.join(_EXCHANGES)}, selective, full"


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
        layout: words joined by '+': single, tpN, ppN, vppN (chunks per pipeline rank), cpN, dpN, sp (sequence
            parallelism), zb (zero-bubble pipeline), distopt (distributed optimizer), p2p, all_gather or a2a (how
            context parallel ranks exchange keys), selective or full (recomputation).

    Raises:
        ConfigError: for another word.
    """
    sizes = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}
    switches = {"sp": False, "distopt": False, "zb": False}
    recompute: list[str] = []
    exchange: list[str] = []
    for word in layout.split("+"):
        sized = re.fullmatch(r"(tp|pp|vpp|cp|dp)([1-9]\d*)", word)
        if sized:
            sizes[sized[1]] = int(sized[2])
        elif word in switches:
            switches[word] = True
        elif word in _EXCHANGES:
            exchange = ["--cp-comm-type", word]
        elif word == "selective":
            recompute = ["--recompute-granularity", "selective"]
        elif word == "full":
            recompute = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            recompute += ["--recompute-num-layers", "1"]
        elif word != "single":
            raise ConfigError(f"--layouts: {layout!r} has the word {word!r}; use {_WORDS}, joined by '+'")
    flags = ["--tensor-model-parallel-size", str(sizes["tp"]), "--pipeline-model-parallel-size", str(sizes["pp"])]
    if sizes["cp"] > 1:
        flags += ["--context-parallel-size", str(sizes["cp"]), *exchange]
    if sizes["vpp"] > 1:
        flags += ["--virtual-pipeline-model-parallel-size", str(sizes["vpp"])]
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
    if fused:  # the compiled attention keeps no scores either, flash attention or not
        config = replace(config, model_config=replace(config.model_config, use_flash_attention=True))
    stages = stage_layout(config.model_config.num_layers, config.parallel_config)
    replicas = world_size // (stages.num_ranks * config.parallel_config.tensor_model_parallel_size)
    rows = []
    for pp_rank in range(stages.num_ranks):
        ranks = [memory for stage, memory in measured if stage == pp_rank]
        largest = Memory(**{name: max(getattr(m, name) for m in ranks) for name in asdict(ranks[0])})
        formula = rank_memory(config, stages, pp_rank, replicas)
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
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="parallel_core_memory_") as folder:
        environment = {**os.environ, _OUTPUT: folder, "NPROC": str(world_size), "LOG_DIR": f"{folder}/logs"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "parallel_core.launch", "--plain", str(Path(__file__).resolve()), *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise ConfigError("the measured run failed; its last lines:\n" + "\n".join(done.stdout.splitlines()[-15:]))
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("rank_*.json"))]
    memories = [(report["pp_rank"], Memory(**report["memory"])) for report in reports]
    return memories, all(report["fused"] for report in reports)


# ---- on a rank ------------------------------------------------------------------------------------------------------
def measure(argv: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run three iterations as this rank and return its global rank and what it reports."""
    from parallel_core.optimizer.schedules import OptimizerParamScheduler
    from parallel_core.report.memory_meter import MemoryMeter
    from parallel_core.training.batches import make_batch_source
    from parallel_core.training.forward_step import forward_step
    from parallel_core.training.model import get_model
    from parallel_core.training.runtime import select_kernels, start_context, start_runtime, supported_precision
    from parallel_core.training.schedule import batch_sizes, loss_scaler, schedule_shape
    from parallel_core.training.step import TrainingStep
    from parallel_core.transformer import GPTModel, ModelStage

    def model_provider(pre_process: bool, post_process: bool, stage: ModelStage) -> GPTModel:
        return GPTModel(stage)

    rank, world_size = start_runtime()
    config, _ = supported_precision(load_config(argv, world_size=world_size).config)
    fused = select_kernels(config).startswith("fused")
    context = start_context(config, rank, world_size)
    sizes = batch_sizes(config, context.dp.size)
    scheduler = OptimizerParamScheduler(schedule_shape(config, sizes, 3))
    model = get_model(model_provider, config, context)
    step = TrainingStep(config, context, model, forward_step, scheduler, loss_scaler(config))
    data = make_batch_source(_random_batches(config), 0, config, context, len(model.chunks), external=True)
    microbatches, meter = sizes.num_microbatches(0), MemoryMeter()
    for iteration in (1, 2, 3):
        if iteration == 3:
            meter.start()
        step.train(data, iteration, microbatches, sizes.current(0))
    peak = meter.stop()
    bytes_of = step.ddp.memory_bytes()
    memory = Memory(bytes_of["parameters"], bytes_of["gradients"], step.optimizer.memory_bytes(), peak)
    report = {"pp_rank": context.pp.rank, "memory": asdict(memory), "fused": fused}
    context.destroy()
    return rank, report


def _random_batches(config: AllConfig) -> Iterator[dict[str, np.ndarray]]:
    """Yield microbatches of random tokens without end."""
    generator = np.random.default_rng(0)
    shape = (config.dataset_config.batch_size, config.model_config.seq_length)
    while True:
        tokens = generator.integers(0, config.model_config.vocab_size, (2, *shape)).astype(np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = {"tokens": tokens[0], "labels": tokens[1], "loss_mask": np.ones(shape, np.float32)}
        batch["position_ids"] = positions
        if config.dataset_config.reset_attention_mask:
            batch["document_start"] = np.zeros(shape, np.int32)
        yield batch


def main(argv: Sequence[str]) -> int:
    """Print the table and return the exit status; in the measured job, write what this rank found."""
    if _OUTPUT in os.environ:
        rank, report = measure(argv)
        (Path(os.environ[_OUTPUT]) / f"rank_{rank}.json").write_text(json.dumps(report), encoding="utf-8")
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
