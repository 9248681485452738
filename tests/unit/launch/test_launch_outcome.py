"""Which of several failures came first, what a rank reports, and what the console shows of a log."""

from __future__ import annotations

import io
import json
import signal
from types import SimpleNamespace

import pytest

from parallel_core.comm.watchdog import EXIT_CODE
from parallel_core.errors import CommError, ConfigError
from parallel_core.launch.console import LogFollower, last_lines
from parallel_core.launch.entry import run_as_rank
from parallel_core.launch.job import Job, JobSpec
from parallel_core.launch.outcome import PEER_TIMEOUT_STATUS, RankFailure, describe_failures, first_failure
from parallel_core.launch.report import (
    LOG_DIR_VARIABLE,
    FailureReport,
    read_report,
    report_failure,
    report_path,
)


def reported(rank: int, time: float, kind: str = "ValueError", peer_loss: bool = False) -> RankFailure:
    return RankFailure(rank, time, 1, FailureReport(rank, time, kind, "why", "Traceback\n  why", 1, peer_loss))


def killed(rank: int, time: float, signum: int = signal.SIGKILL) -> RankFailure:
    return RankFailure(rank, time, -signum)


def elsewhere(time: float, *, follows: bool = False) -> RankFailure:
    return RankFailure("node 1 (10.0.0.2, b)", time, 1, said="is lost: its launcher has gone", follows=follows)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([reported(0, 2.0), reported(1, 1.0)], 1),
        ([killed(0, 1.0), reported(1, 1.5)], 0),
        # Rank 1 saw its peer vanish before the launcher learnt that rank 0 was killed.
        ([killed(0, 1.1), reported(1, 1.0, "CommError", peer_loss=True)], 0),
        # A node may be known to be lost long after ranks here have lost it; what failed here by itself is first.
        ([reported(0, 1.0, "CommError", peer_loss=True), elsewhere(21.0)], "node 1 (10.0.0.2, b)"),
        ([reported(0, 1.0), elsewhere(1.5)], 0),
        ([killed(0, 1.1), elsewhere(1.0, follows=True)], 0),
        # What MindSpore does to the others, and what the watchdog does, are consequences too.
        ([reported(0, 1.1), killed(1, 1.0, signal.SIGTERM)], 0),
        ([reported(0, 1.1), RankFailure(1, 1.0, PEER_TIMEOUT_STATUS)], 0),
        # Much later it is a failure of its own.
        ([killed(0, 9.0), reported(1, 1.0, "CommError", peer_loss=True)], 1),
        ([reported(0, 1.1, peer_loss=True), reported(1, 1.0, peer_loss=True)], 1),
    ],
)
def test_the_first_failure_is_the_cause(failures, expected):
    assert first_failure(failures).role == expected


def test_the_status_of_a_time_limit_is_that_of_the_watchdog():
    assert PEER_TIMEOUT_STATUS == EXIT_CODE


@pytest.mark.parametrize(("status", "expected"), [(1, 1), (2, 2), (-9, 137), (0, 1)])
def test_a_job_that_failed_never_ends_with_status_0(status, expected):
    assert RankFailure(0, 0.0, status).job_status() == expected


def test_the_description_has_the_cause_in_full_and_the_others_in_a_line(tmp_path):
    text = describe_failures(tmp_path, 4, [reported(2, 2.0, "CommError", True), reported(1, 1.0)], [3])
    assert text.splitlines() == [
        "ERROR - rank 1 failed first, of 4 ranks: ValueError: why",
        "    Traceback",
        "      why",
        "  rank 2 then: CommError: why",
        "  ended before that, with status 0: ranks 3",
        f"  All ranks were stopped. Logs: {tmp_path}/worker_*.log",
    ]


def test_a_rank_without_a_report_is_shown_by_its_log(tmp_path):
    (tmp_path / "worker_0.log").write_text("one\ntwo\n")
    text = describe_failures(tmp_path, 1, [RankFailure(0, 1.0, 3)], [])
    assert text.splitlines()[1:4] == [f"  the last lines of {tmp_path}/worker_0.log:", "    one", "    two"]


@pytest.mark.parametrize(
    ("error", "status", "peer_loss", "has_traceback"),
    [
        (ValueError("bad"), 1, False, True),
        (ConfigError("lr"), 2, False, False),
        (CommError("all_reduce over tp"), 1, True, False),
        (RuntimeError("Recv failed.\nC++"), 1, True, True),
        (SystemExit(7), 7, False, False),
    ],
)
def test_a_report_survives_the_rank(tmp_path, monkeypatch, capsys, error, status, peer_loss, has_traceback):
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("RANK_ID", "3")
    try:
        raise error
    except (Exception, SystemExit) as caught:
        assert report_failure(caught) == status
    report = read_report(report_path(tmp_path, 3))
    assert (report.rank, report.exit_status, report.peer_loss) == (3, status, peer_loss)
    assert bool(report.traceback) == has_traceback
    assert ("Traceback" in capsys.readouterr().err) == has_traceback


def test_a_report_that_is_damaged_is_no_report(tmp_path):
    path = tmp_path / "error_rank_0.json"
    assert read_report(path) is None
    for content in ("", "{", json.dumps({"rank": 0})):
        path.write_text(content)
        assert read_report(path) is None


def test_a_program_of_one_process_ends_with_the_message_of_a_mistake_alone(monkeypatch, capsys):
    monkeypatch.delenv("MS_ROLE", raising=False)

    def main():
        raise ConfigError("num_layers=3 is odd")

    with pytest.raises(SystemExit) as ended:
        run_as_rank(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "num_layers=3 is odd\n"


def test_the_console_has_the_marked_lines_once_they_are_complete(tmp_path):
    first, second, out = tmp_path / "worker_0.log", tmp_path / "worker_1.log", io.StringIO()
    follower = LogFollower([first, second], out)
    follower.poll()
    first.write_bytes(b"INFO - a\nDEBUG - b\n[WARNING] ME: c\nWARNING - d\nINFO - e\xff")
    second.write_bytes(b"ERROR - f\r\n")
    follower.poll()
    assert out.getvalue() == "INFO - a\nWARNING - d\nERROR - f\n"
    with first.open("ab") as file:
        file.write(b" end\n")
    follower.poll()
    follower.poll()
    assert out.getvalue().splitlines()[3:] == ["INFO - e\N{REPLACEMENT CHARACTER} end"]


def test_last_lines(tmp_path):
    path = tmp_path / "log"
    assert last_lines(path) == []
    path.write_text("".join(f"{number}\n" for number in range(10000)))
    assert last_lines(path, 2) == ["9998", "9999"]


def test_another_node_that_is_lost_is_named_first(tmp_path):
    failures = [reported(0, 1.0, "CommError", peer_loss=True), elsewhere(21.0)]
    first, then, *_ = describe_failures(tmp_path, 2, failures, []).splitlines()
    assert first == "ERROR - node 1 (10.0.0.2, b) is lost: its launcher has gone"
    assert then.startswith("  rank 0 then: CommError")


def test_a_wait_that_python_returns_nothing_of_is_no_request_to_stop(tmp_path, monkeypatch):
    job = Job(JobSpec(("train.py",), 1, tmp_path, 8848))
    monkeypatch.setattr(signal, "sigtimedwait", lambda *_: SimpleNamespace(si_signo=2143102800))
    job._tick({signal.SIGCHLD, signal.SIGTERM})
    assert not job.was_stopped
    monkeypatch.setattr(signal, "sigtimedwait", lambda *_: SimpleNamespace(si_signo=int(signal.SIGTERM)))
    job._tick({signal.SIGCHLD, signal.SIGTERM})
    assert job.was_stopped
