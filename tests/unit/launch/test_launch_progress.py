"""The line under the log: on a terminal only, from the newest iterations, never in the way of the log."""

from __future__ import annotations

import io
import json

import pytest

from parallel_core.launch.console import LogFollower
from parallel_core.launch.progress import ProgressLine, progress_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def row(iteration, loss=None, **more):
    loss = 10.0 / iteration if loss is None else loss
    return {"iteration": iteration, "loss": loss, "elapsed_ms": 500.0, "tokens_per_s": 1000.0, **more}


def rows(*iterations, **more):
    return "".join(json.dumps(row(iteration, **more)) + "\n" for iteration in iterations)


def test_what_the_line_says():
    assert progress_text([], 10, 80) == ""
    assert progress_text([row(4)], 0, 80) == "iteration 4  loss 2.5000  1000 tokens/s  500 ms"
    line = progress_text([row(i) for i in range(1, 31)], 60, 100)
    assert line == f"[{'#' * 10}{'.' * 10}] 30/60  left 0:15  loss 0.3333 (falling)  1000 tokens/s  500 ms"
    rising = progress_text([row(i, loss=float(i)) for i in range(1, 31)], 0, 100)
    level = progress_text([row(i, loss=3.0) for i in range(1, 31)], 0, 100)
    assert "(rising)" in rising and "(level)" in level
    assert progress_text([row(1, tflops_per_device=0.5)], 0, 100).endswith("0.5 TFLOP/s per device")
    with_share = row(1, tflops_per_device=0.5, share_of_peak=0.25)
    assert "0.5 TFLOP/s per device, 25% of its best" in progress_text([with_share], 0, 100)
    assert "loss" not in progress_text([{"iteration": 1, "loss": None}], 0, 100)


@pytest.mark.parametrize("width", range(0, 100, 7))
def test_it_is_never_wider_than_the_terminal(width):
    assert len(progress_text([row(i) for i in range(1, 31)], 60, width)) <= width


def test_a_terminal_has_the_line_below_the_log(tmp_path):
    out, metrics, log = Terminal(), tmp_path / "metrics.jsonl", tmp_path / "worker_0.log"
    follower = LogFollower([log], out, ProgressLine(metrics, out))
    log.write_text("INFO - Batch: 16 samples = 1 x 4 microbatches of 4; 8 iterations\n")
    metrics.write_text(rows(1, 2) + '{"iteration": 3, "lo')
    follower.poll()
    assert out.getvalue().endswith("\r\x1b[2K[#####...............] 2/8  left 0:03  loss 5.0000  1000 tokens/s  500 ms")
    before = len(out.getvalue())
    follower.poll()
    assert len(out.getvalue()) == before  # nothing new, nothing drawn
    with open(log, "a") as file:
        file.write("INFO - Epoch: 0, Step: 2\n")
    follower.poll()
    assert "\r\x1b[2KINFO - Epoch: 0, Step: 2\n\r\x1b[2K[#####" in out.getvalue()
    follower.end()
    assert out.getvalue().endswith("500 ms\r\x1b[2K")


def test_a_pipe_gets_the_lines_alone(tmp_path):
    out, metrics, log = io.StringIO(), tmp_path / "metrics.jsonl", tmp_path / "worker_0.log"
    follower = LogFollower([log], out, ProgressLine(metrics, out))
    log.write_text("INFO - one\nnoise\n")
    metrics.write_text(rows(1, 2))
    follower.poll()
    follower.end()
    assert out.getvalue() == "INFO - one\n"


def test_a_resumed_run_is_followed_in_the_file_that_it_takes_over(tmp_path):
    out, metrics = Terminal(), tmp_path / "metrics.jsonl"
    metrics.write_text(rows(1, 2, 3))
    line = ProgressLine(metrics, out)
    line.poll()
    assert out.getvalue() == ""  # those are of the run before
    partial = tmp_path / "metrics.jsonl.partial"
    partial.write_text(rows(1, 2) + json.dumps({"iteration": 2, "split": "test", "loss": 9.0}) + "\n")
    partial.replace(metrics)
    with open(metrics, "a") as file:
        file.write(rows(3))
    line.poll()
    assert "iteration 3  loss 3.3333" in out.getvalue()
