"""Whether a rank failed for want of memory, what holds it, and what would fit."""

from __future__ import annotations

import re
import resource
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from parallel_core.config.fitting import fullest, settings_that_fit
from parallel_core.config.load import load_config
from parallel_core.config.plan import in_flight
from parallel_core.config.schema import AllConfig
from parallel_core.environment import HANDOVER_VARIABLE
from parallel_core.errors import ConfigError, printable
from parallel_core.files import open_regular
from parallel_core.launch.console import last_lines
from parallel_core.launch.host_memory import RANK_BYTES, HostMemory, host_memory
from parallel_core.launch.outcome import RankFailure, first_failure

_SIGKILL = 9
_LACKS = re.compile(
    r"memory (?:isn't|is not|not) enough|(?:alloc|malloc)[^\n]{0,60}\b(?:memory|mem|workspace)\b[^\n]{0,40}fail"
    r"|\b(?:memory|mem|workspace) (?:malloc |alloc )?failed|out of memory|std::bad_alloc|cannot allocate memory"
    r"|unable to allocate|\bMemoryError\b",
    re.IGNORECASE,
)
"""What NumPy, Python, the C library, MindSpore's pools and CANN say."""
_GIB = 1 << 30
_LESS = 0.8
"""The share of what did not fit that a setting may need, where the formulas would have let the run itself fit."""
_TAIL_LINES, _HEAD_BYTES = 60, 1 << 16


def lacks_memory(failure: RankFailure, tail: Sequence[str], killed: int) -> str:
    """Return what says that a rank failed for want of memory, or nothing.

    Args:
        failure: how it ended.
        tail: the last lines of its log.
        killed: how many processes the kernel has killed for memory since the job began.
    """
    if failure.report is not None:
        said = f"{failure.report.kind}: {failure.report.message}\n{failure.report.traceback}"
        found = next((line for line in said.splitlines() if _LACKS.search(line)), "")
        return printable(found.strip())
    if failure.status == -_SIGKILL and killed > 0:
        return f"the kernel killed {killed} process{'es' if killed > 1 else ''} for want of memory meanwhile"
    return printable(next((line for line in reversed(tail) if _LACKS.search(line)), "").strip())


def explain_memory(
    log_dir: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    ranks: tuple[int, range],
    failures: Sequence[RankFailure],
    most: Mapping[int, int],
    killed: int,
) -> list[str]:
    """Return lines about the memory of a job that failed for want of it, else none.

    Args:
        log_dir: where the ranks log.
        command: the script and its arguments.
        environment: what the ranks had on top of this process's variables.
        ranks: how many the job has, and which of them are here.
        failures: one or more.
        most: see `describe_memory`.
        killed: see `lacks_memory`.
    """
    first = first_failure(failures)
    log = log_dir / f"worker_{first.role}.log"
    evidence = lacks_memory(first, last_lines(log, _TAIL_LINES), killed)
    if not evidence:
        return []
    if HANDOVER_VARIABLE not in environment:  # a script with arguments of its own
        return [f"  out of memory ({evidence})"]
    try:
        config = load_config(command[1:], world_size=ranks[0]).config
        fused = "Kernels: fused" in _beginning(log_dir / "worker_0.log")
        sizes = ranks[0], len(ranks[1])
        return describe_memory(evidence, command[1:], config, sizes, host_memory(), most, fused=fused)
    except (ConfigError, OSError, KeyError, ValueError) as error:
        return [f"  out of memory ({evidence}); what would fit is not known: {printable(str(error))}"]


def _beginning(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read(_HEAD_BYTES).decode(errors="replace")
    except OSError:
        return ""


def describe_memory(
    evidence: str,
    words: Sequence[str],
    config: AllConfig,
    ranks: tuple[int, int],
    host: HostMemory,
    most: Mapping[int, int],
    *,
    fused: bool,
) -> list[str]:
    """Return lines: what a rank may have, what holds it, and three settings that would fit.

    Args:
        evidence: what says that memory was lacking.
        words: the arguments of the run.
        config: what they mean.
        ranks: of the job, and on this machine.
        host: what the machine has.
        most: the largest resident memory of ranks, in bytes, as far as it is known.
        fused: see `config.fitting.fullest`.
    """
    world_size, here = ranks
    together, whose = host.for_job()
    limit: int = together // here
    reason = f"{whose}, {_gib(together)}, for {here} rank{'s' if here > 1 else ''} here"
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY and own < limit:
        limit, reason = own, "the address space that ulimit -v leaves a process"
    memory, stage = fullest(config, world_size, fused=fused)
    held = in_flight(config, stage)
    parts = ", ".join(f"{name} {_gib(getattr(memory, name))}" for name in ("weights", "gradients", "optimizer"))
    times = f"{held} microbatch{'es' if held > 1 else ''} at a time"
    lines = [
        f"  out of memory ({evidence})",
        f"  a rank may have {_gib(limit)}: {reason}",
        f"  by the closed formulas a rank of pipeline stage {stage} holds {_gib(memory.total)}: {parts}, activations "
        f"{_gib(memory.activations)} ({times}); beside it "
        f"{_gib(RANK_BYTES)} of Python and MindSpore, and what running operators need for a moment",
    ]
    if most:
        used = ", ".join(f"rank {rank} {_gib(value)}" for rank, value in sorted(most.items())[:8])
        lines.append(f"  resident at most: {used}")
    room = limit - RANK_BYTES
    if memory.total <= room:
        room = int(_LESS * memory.total)
        lines.append("  by that it fits: other processes, or what operators need for a moment, took the rest")
    fitting = settings_that_fit(words, config, world_size, room, fused=fused)
    if not fitting:
        return [*lines, f"  no layout of up to {8 * world_size} ranks fits: a smaller model, or more memory"]
    lines.append("  by the same formulas these would fit, what costs least time first:")
    for fit in fitting:
        more = f"NPROC={fit.ranks}, on more machines like this one, and " if fit.ranks != world_size else ""
        lines.append(f"    {more}{shlex.join(fit.flags)}    # {_gib(fit.memory.total)}")
    return lines


def _gib(value: float) -> str:
    return f"{value / _GIB:.2f} GiB"
