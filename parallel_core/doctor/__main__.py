"""`python -m parallel_core.doctor`: look at this machine, and between nodes, before a run does."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from parallel_core.doctor import machine
from parallel_core.doctor.collective import two_ranks
from parallel_core.doctor.finding import BAD, NOTE, Finding
from parallel_core.doctor.nodes import nodes

_EPILOG = """between nodes, at the same time on each of them, with the variables of the launch:
  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=8848 python -m parallel_core.doctor
  NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=8848 python -m parallel_core.doctor"""


def examine(folder: Path, wait_s: float, quick: bool) -> Iterator[Finding]:
    """Yield the findings, one check after the other.

    Args:
        folder: where checkpoints and logs are to go.
        wait_s: seconds that nodes wait for each other.
        quick: leave out what takes more than a second or two: kernels, disk, the job of two ranks.
    """
    yield from machine.python()
    yield from machine.packages()
    if not quick:
        yield from machine.kernels()
    yield from machine.cores()
    yield from machine.memory()
    yield from machine.shared_memory()
    yield from machine.ports()
    yield from machine.files()
    if not quick:
        yield from machine.disk(folder)
    yield from machine.ascend()
    yield from nodes(wait_s)
    if not quick:
        yield from two_ranks()


def main(argv: Sequence[str] | None = None) -> int:
    """Examine, print as it goes, and return 0, or 1 when something would keep a run from working."""
    options = _parser().parse_args(argv)
    findings = []
    for finding in examine(options.folder, options.wait, options.quick):
        findings.append(finding)
        if not options.json:
            print(finding.text(width=16), flush=True)
    bad, notes = (sum(finding.state == state for finding in findings) for state in (BAD, NOTE))
    if options.json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=1))
    elif bad:
        print(f"\n{bad} of {len(findings)} would keep a run from working; what to do stands behind ->")
    else:
        print(f"\nready to train{f', with {notes} note(s)' if notes else ''}")
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0].startswith("parallel-core") else "python -m parallel_core.doctor",
        description="look at this machine, and between nodes, before a run does",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("LOG_DIR") or "."), metavar="DIR",
                        help="where checkpoints and logs are to go (default: LOG_DIR, or this folder)")  # fmt: skip
    parser.add_argument("--wait", type=float, default=60.0, metavar="S", help="how long nodes wait for each other")
    parser.add_argument("--quick", action="store_true", help="leave out kernels, disk speed and the job of two ranks")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


if __name__ == "__main__":
    # `-m` puts the current folder first, where a file called yaml.py would be taken for the library.
    if sys.path[0] == os.getcwd():
        del sys.path[0]
    sys.exit(main())
