"""The multi-rank harness reports failures, hangs and crashes, and still runs the cases after them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.case_jobs import MAX_BROKEN_JOBS, CaseFailed, CaseJobs
from tests.helpers.cases import Case
from tests.helpers.launching import REPO
from tests.helpers.rank_main import may_go_on

CASES = """
import os, signal, time
from tests.helpers.cases import case

@case(world_size=2)
def test_a_passes(ctx): pass

@case(world_size=2)
def test_b_fails_on_rank_1(ctx):
    if ctx.rank == 1:
        raise ValueError("bad on one")
    wait_for_the_other()

def wait_for_the_other(): time.sleep(600)

@case(world_size=2)
def test_c_passes_after_it(ctx): pass

@case(world_size=2)
def test_d_fails_on_both(ctx):
    print("a word from the log")
    assert ctx.rank == 5, f"rank is {ctx.rank}"

@case(world_size=2)
def test_e_crashes(ctx):
    if ctx.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_the_other()

@case(world_size=2, timeout_s=2)
def test_f_hangs(ctx): wait_for_the_other()

@case(world_size=(1, 2), variants=[{"x": 1}, {"x": 2}])
def test_g_variants(ctx, x): assert x == 1
"""


def run_pytest(directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (directory / "conftest.py").write_text("from tests.conftest import *\n")
    path = f"{REPO}{os.pathsep}{directory}"
    environment = {**os.environ, "PYTHONPATH": path, "RANK_SESSION": "tests.helpers.bare_session", **variables}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", str(directory)]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("harness")
    (directory / "cases_made_to_fail.py").write_text(CASES)
    return run_pytest(directory).stdout


def outcome(report: str, item: str) -> str:
    return re.search(rf"::{re.escape(item)} (\w+)", report).group(1)


def section(report: str, item: str) -> str:
    """Return what pytest says about one failed item."""
    return re.search(rf"_ {re.escape(item)} _(.*?)\n(?:___|===)", report, re.DOTALL).group(1)


def test_every_case_and_variant_is_an_item_with_its_own_outcome(report):
    expected = {
        "test_a_passes[2 ranks]": "PASSED",
        "test_b_fails_on_rank_1[2 ranks]": "FAILED",
        "test_c_passes_after_it[2 ranks]": "PASSED",
        "test_d_fails_on_both[2 ranks]": "FAILED",
        "test_e_crashes[2 ranks]": "FAILED",
        "test_f_hangs[2 ranks]": "FAILED",
        "test_g_variants[1 rank, x=1]": "PASSED",
        "test_g_variants[1 rank, x=2]": "FAILED",
        "test_g_variants[2 ranks, x=1]": "PASSED",
        "test_g_variants[2 ranks, x=2]": "FAILED",
    }
    assert {item: outcome(report, item) for item in expected} == expected
    assert "6 failed, 4 passed" in report.splitlines()[-1]


def test_a_failure_on_one_rank_shows_its_traceback_and_where_the_other_waits(report):
    text = section(report, "test_b_fails_on_rank_1[2 ranks]")
    assert "rank 1 first:\nTraceback" in text
    assert "ValueError: bad on one" in text
    assert "in wait_for_the_other" in text[text.index("rank 0 stands here:") :]


def test_a_failure_on_all_ranks_shows_each_and_the_log(report):
    text = section(report, "test_d_fails_on_both[2 ranks]")
    assert re.search(r"AssertionError: rank is (\d)(.|\n)*rank (\d) then: AssertionError: rank is \3", text)
    assert "a word from the log" in text


def test_a_crash_is_named_with_its_signal(report):
    text = section(report, "test_e_crashes[2 ranks]")
    assert "ERROR - rank 0 failed first, of 2 ranks: killed by signal 9 (SIGKILL)" in text


def test_a_hang_shows_the_stacks_of_all_ranks(report):
    text = section(report, "test_f_hangs[2 ranks]")
    assert "ranks [0, 1] did not end it within 2 s" in text
    assert text.count("in wait_for_the_other") == 2


def test_one_rank_runs_in_the_pytest_process(report):
    assert "assert x == 1" in section(report, "test_g_variants[1 rank, x=2]")


def test_a_rank_out_of_step_ends_the_job_and_failing_alike_does_not():
    passed = {"event": "passed"}
    failed = {"event": "failed", "kind": "AssertionError", "peer_loss": False}
    assert may_go_on([passed, passed])
    assert may_go_on([failed, failed])
    assert not may_go_on([passed, failed])
    assert not may_go_on([failed, {**failed, "kind": "ValueError"}])
    assert not may_go_on([{**failed, "peer_loss": True}] * 2)


def test_a_job_that_does_not_start_is_tried_once(tmp_path):
    (tmp_path / "cases_two.py").write_text(
        "from tests.helpers.cases import case\n"
        "@case(world_size=2)\ndef test_one(ctx): pass\n"
        "@case(world_size=2)\ndef test_two(ctx): pass\n"
    )
    (tmp_path / "broken_session.py").write_text("def set_up(rank, size): 1 / 0\n")
    report = run_pytest(tmp_path, RANK_SESSION="broken_session").stdout
    assert "ZeroDivisionError: division by zero" in section(report, "test_one[2 ranks]")
    assert "not run: no job of 2 ranks starts; see test_one[2 ranks]" in section(report, "test_two[2 ranks]")


def test_after_many_broken_jobs_the_rest_is_not_run(tmp_path):
    jobs = CaseJobs(tmp_path)
    last = Case(tmp_path / "cases_x.py", "test_x", 0, world_size=2, label="2 ranks")
    jobs.select([last])
    jobs.broken[2] = ["test_y[2 ranks]"] * MAX_BROKEN_JOBS
    with pytest.raises(CaseFailed, match=rf"not run: {MAX_BROKEN_JOBS} jobs of 2 ranks were broken, last by test_y"):
        jobs.run(last)
    assert not list(tmp_path.iterdir())
