"""What ranks leave for the launcher, damaged or written by somebody else: reports and logs."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from parallel_core.launch.console import LogFollower
from parallel_core.launch.outcome import RankFailure, describe_failures
from parallel_core.launch.report import read_report, report_path
from tests.helpers.fuzzing import Target, fuzz, mutate_bytes, mutate_value

REPORT = {
    "rank": 0,
    "time": 1.5,
    "kind": "KeyError",
    "message": "first\nsecond",
    "traceback": "Traceback (most recent call last):\n  File x\nKeyError: 'é'",
    "exit_status": 1,
    "peer_loss": False,
}
LOG = "INFO - step 1\nnothing\nWARNING - é\x1b[2J\x9b\nERROR - \u202e end\r\nINFO - no end".encode()


def show(data: bytes, log: bytes, folder: Path) -> str:
    """Return everything the launcher would print of a rank's report and log."""
    (folder / "worker_0.log").write_bytes(log)
    report_path(folder, 0).write_bytes(data)
    out = io.StringIO()
    follower = LogFollower([folder / "worker_0.log", folder / "worker_1.log"], out)
    follower.poll()
    report = read_report(report_path(folder, 0))
    first = RankFailure(0, report.time, report.exit_status, report) if report else RankFailure(0, 1.0, -7)
    return out.getvalue() + describe_failures(folder, 2, [first, RankFailure(1, 2.0, 75)], [])


def _read(made, folder):
    text = show(*made, folder)
    assert all(character.isprintable() or character in "\n\t" for character in text), repr(text)
    forged = [line for line in text.splitlines() if line.startswith("INFO - forged")]
    assert not forged, text


def _special(what, folder):
    path = report_path(folder, 0) if what[0] == "report" else folder / "worker_0.log"
    if what[1] == "pipe":
        os.mkfifo(path)
    elif what[1] == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    LogFollower([folder / "worker_0.log"], io.StringIO()).poll()
    assert read_report(report_path(folder, 0)) is None
    describe_failures(folder, 1, [RankFailure(0, 1.0, 1)], [])


TARGETS = {
    "values of a report": Target(lambda rng: (json.dumps(mutate_value(rng, REPORT)).encode(), LOG), _read),
    "bytes": Target(
        lambda rng: (mutate_bytes(rng, json.dumps(REPORT).encode()), mutate_bytes(rng, LOG)),
        _read,
    ),
    "special files": Target(
        lambda rng: (rng.choice(("report", "log")), rng.choice(("pipe", "endless", "directory"))), _special
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_ranks_leave_can_be_shown(name):
    fuzz(__file__, name, 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_ranks_leave_can_be_shown_for_long(name):
    fuzz(__file__, name, 20_000, first=300)


def test_a_good_report_is_shown_in_full(tmp_path):
    text = show(json.dumps(REPORT).encode(), LOG, tmp_path)
    assert "rank 0 failed first, of 2 ranks: KeyError: first" in text and "    KeyError: 'é'" in text
    assert text.startswith("INFO - step 1\nWARNING - é\\x1b[2J\\x9b\nERROR - \\u202e end\n")


def test_a_bus_error_is_explained():
    assert "(SIGBUS); memory that it had mapped was gone" in RankFailure(0, 1.0, -7).summary()
