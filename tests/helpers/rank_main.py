"""One rank of a job of cases: `python -m parallel_core.launch --plain tests/helpers/rank_main.py PLAN`.

PLAN is a JSON file: {"directory": where the records go, "cases": [[path, function, variant], ...]}. Every rank appends
to `rank_R.jsonl` what becomes of each case, and starts the next one when all ranks have recorded the last.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from parallel_core.launch.report import is_peer_loss  # noqa: E402
from tests.helpers.cases import Case, CaseContext, run_case  # noqa: E402
from tests.helpers.session import session_module  # noqa: E402


class Records:
    """This rank's records, and the others' as they grow."""

    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        self._directory = directory
        self._rank = rank
        self._world_size = world_size
        self._file = (directory / f"rank_{rank}.jsonl").open("a", encoding="utf-8")

    def write(self, **record: object) -> None:
        self._file.write(json.dumps({"time": time.time(), "pid": os.getpid(), **record}) + "\n")
        self._file.flush()

    def all_outcomes(self, number: int) -> list[dict]:
        """Wait until every rank has recorded the outcome of case `number`, and return them."""
        while True:
            found = []
            for rank in range(self._world_size):
                records = read_records(self._directory / f"rank_{rank}.jsonl")
                found += [one for one in records if one["case"] == number and one["event"] != "start"]
            if len(found) == self._world_size:
                return found
            time.sleep(0.005)


def read_records(path: Path) -> list[dict]:
    """Return the complete lines of a record file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def case_heading(number: int) -> str:
    """Return how the part of a rank's log that belongs to a case begins."""
    return f"DEBUG - case {number}:"


def may_go_on(outcomes: list[dict]) -> bool:
    """Whether the ranks are still in step: all passed, or all failed alike and not by losing each other."""
    kinds = {outcome.get("kind") for outcome in outcomes}
    return len(kinds) == 1 and not any(outcome.get("peer_loss") for outcome in outcomes)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    directory = Path(plan["directory"])
    rank, world_size = int(os.environ["RANK_ID"]), int(os.environ["MS_WORKER_NUM"])
    stacks = (directory / f"stack_{rank}.txt").open("w", encoding="utf-8")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    records = Records(directory, rank, world_size)
    records.write(case=-1, event="start")
    session_module().set_up(rank, world_size)
    for number, (path, function, variant) in enumerate(plan["cases"]):
        records.write(case=number, event="start")
        print(f"{case_heading(number)} {function}", flush=True)
        shared = directory / f"case_{number}"
        shared.mkdir(exist_ok=True)
        try:
            run_case(Case(Path(path), function, variant, world_size), CaseContext(rank, world_size, shared))
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            kind = type(error).__name__
            lost = is_peer_loss(error)
            records.write(case=number, event="failed", kind=kind, traceback=text, peer_loss=lost)
        else:
            records.write(case=number, event="passed")
        if not may_go_on(records.all_outcomes(number)):
            time.sleep(3600)  # out of step: the pytest process ends this job and starts another for the rest
    os._exit(0)  # every rank has recorded its last case; nothing is worth the backend's seconds of closing down


if __name__ == "__main__":
    main()
