"""Memory of this machine and of the container; what the kernel has done for want of it. Python's library alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RANK_BYTES = 500 << 20
"""What a rank takes before its model: Python, MindSpore and the kernels."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of this machine.

    Attributes:
        total: that the machine has.
        free: that a process can have now.
        limit: the least of the container's limits below that, with what is used of it; None without one.
    """

    total: int
    free: int
    limit: tuple[int, int] | None

    def for_job(self) -> tuple[int, str]:
        """Return the bytes that all processes of a job can have together, and whose limit that is."""
        if self.limit is None:
            return self.total, "all that the machine has"
        return self.limit[0], "the container's limit"


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Return what this machine, and the container, has.

    Raises:
        OSError: /proc cannot be read.
    """
    known = dict(re.findall(r"^(\w+):\s+(\d+) kB", (proc / "meminfo").read_text(encoding="ascii"), re.M))
    total, limits = int(known["MemTotal"]) << 10, []
    for folder in _control_groups(proc, cgroups):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, use = _number(folder / most), _number(folder / used)
            if limit is not None and limit < total:  # without one, version 1 says 2^63
                limits.append((limit, use or 0))
    return HostMemory(total, int(known["MemAvailable"]) << 10, min(limits, default=None))


def killed_for_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many processes the kernel has killed for want of memory so far, on the machine or in the container."""
    count = _counted(proc / "vmstat", "oom_kill")
    for folder in _control_groups(proc, cgroups):
        count += _counted(folder / "memory.events", "oom_kill") + _counted(folder / "memory.oom_control", "oom_kill")
    return count


def _control_groups(proc: Path, cgroups: Path) -> list[Path]:
    """Return the folders of this process's control groups, its own and those around it, of both versions."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = [cgroups, cgroups / "memory"]
    for line in lines:
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        root = cgroups if number == "0" else cgroups / "memory" if "memory" in kinds.split(",") else None
        folder = root / path.strip("/") if root is not None else None
        while folder is not None and root is not None and folder != root:
            found.append(folder)
            folder = folder.parent
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file; "max"
        return None


def _counted(path: Path, key: str) -> int:
    try:
        found = re.search(rf"^{key} (\d+)$", path.read_text(encoding="ascii"), re.M)
    except (OSError, ValueError):
        return 0
    return int(found[1]) if found else 0
