"""Which versions of driver, CANN and MindSpore go together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from parallel_core.doctor.finding import BAD, GOOD, NOTE, Finding

_DRIVER_OF = {(8, 2): (25, 2), (8, 3): (25, 3), (8, 5): (25, 5), (9, 0): (26, 0)}
"""The drivers that MindSpore's own installation guides name beside each CANN; older ones are not tested there."""


def versions_fit(driver: str, cann: str, check_file: Path | None = None) -> Iterator[Finding]:
    """Yield whether MindSpore takes this CANN, and whether the driver is as new as it.

    Args:
        driver: version of the NPU's driver.
        cann: version of CANN.
        check_file: MindSpore's file with the versions that it takes; None: the installed one's.
    """
    found, taken = _first_two(cann), cann_versions(check_file)
    if taken and found:
        name, have = "CANN, MindSpore", f"CANN {cann}, {_mindspore()}"
        if found in taken:
            yield Finding(name, GOOD, have)
        else:
            known = ", ".join(f"{a}.{b}" for a, b in taken)
            yield Finding(name, BAD, have, f"this MindSpore takes CANN {known}: install one of them, or the MindSpore "
                          "that goes with yours (mindspore.cn/install)")  # fmt: skip
    least = _DRIVER_OF.get(found) if found else None
    if least and (_first_two(driver) or least) < least:
        yield Finding("driver, CANN", NOTE, f"driver {driver}, CANN {cann}",
                      f"CANN {cann} comes with driver {least[0]}.{least[1]} or later: upgrade it")  # fmt: skip


def cann_versions(check_file: Path | None = None) -> list[tuple[int, int]]:
    """Return the CANN versions that MindSpore takes, as its own check says; none where that is not there."""
    if check_file is None:
        spec = importlib.util.find_spec("mindspore")
        if spec is None or spec.origin is None:
            return []
        check_file = Path(spec.origin).parent / "run_check" / "_check_version.py"
    try:
        text = check_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.search(r"class AscendEnvChecker\b.*?self\.version\s*=\s*\[([^\]]*)\]", text, re.DOTALL)
    return [pair for pair in map(_first_two, match[1].split(",")) if pair] if match else []


def _first_two(version: str) -> tuple[int, int] | None:
    match = re.search(r"(\d+)\.(\d+)", version.rpartition(":")[2])  # CANN writes 7.6.0.1:8.0.RC3, its own version last
    return (int(match[1]), int(match[2])) if match else None


def _mindspore() -> str:
    try:
        return f"MindSpore {importlib.metadata.version('mindspore')}"
    except importlib.metadata.PackageNotFoundError:
        return "MindSpore"
