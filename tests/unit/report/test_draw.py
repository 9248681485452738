"""`python -m parallel_core.report.pipeline draw`: what it prints, and that its picture shows the simulated times."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from parallel_core.pipeline.schedule import make_schedule
from parallel_core.report.pipeline import main
from parallel_core.report.simulate import simulate

SVG = "{http://www.w3.org/2000/svg}"


def draw(*words: str) -> int:
    return main(["draw", *words])


def test_text(capsys):
    assert draw("--pipeline-model-parallel-size", "2", "--num-microbatches", "3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "1F1B: 2 pipeline ranks x 1 chunk, 3 microbatches",
        "bubble: 25.0% of 12 time units simulated, 25.0% ideal ((P - 1) / (V * M + P - 1))",
        "",
        " rank | peak in flight | idle",
        "    0 |              2 | 25.0%",
        "    1 |              1 | 25.0%",
        "",
        " tick | rank 0 | rank 1",
        "    0 | F0.0   | .",
        "    1 | F1.0   | F0.0",
        "    2 | .      | B0.0",
        "    3 | B0.0   | F1.0",
        "    4 | F2.0   | B1.0",
        "    5 | B1.0   | F2.0",
        "    6 | .      | B2.0",
        "    7 | B2.0   | .",
    ]


def test_options_reach_the_schedule_and_the_clock(capsys):
    common = ["--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2"]
    common += ["--num-microbatches", "6"]

    def time_units(*more: str) -> tuple[float, str]:
        assert draw(*common, *more) == 0
        out = capsys.readouterr().out
        return float(re.search(r"of ([\d.]+) time units", out)[1]), out

    plain, text = time_units()
    assert plain == (2 * 6 + 1) * 3
    assert time_units("--forward-time", "2")[0] == (2 * 6 + 1) * 4
    assert time_units("--backward-time", "1")[0] == (2 * 6 + 1) * 2
    slow = time_units("--transfer-time", "1")[0]
    assert slow > plain
    assert time_units("--transfer-time", "1", "--no-overlap-p2p-communication")[0] > slow
    grouped = time_units("--microbatch-group-size-per-virtual-pipeline-stage", "3")[1]
    column = [line.split("|")[1].split() for line in grouped.splitlines() if re.match(r" +\d+ \| F", line)]
    assert [cell[0] for cell in column[:6]] == ["F0.0", "F1.0", "F2.0", "F0.1", "F1.1", "F2.1"]
    assert "sF0.0" not in text
    assert "sF0.0" in time_units("--exchanges")[1]
    only = time_units("--forward-only")
    assert only[0] == 2 * 6 + 1
    assert "forward only" in only[1]
    assert "B0.0" not in only[1]


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), [(4, 1, 8), (4, 2, 8), (3, 4, 6), (1, 1, 2)])
def test_every_box_of_the_picture_is_where_its_action_is(tmp_path, ranks, chunks, microbatches):
    path = tmp_path / "schedule.svg"
    words = ["--pipeline-model-parallel-size", str(ranks), "--virtual-pipeline-model-parallel-size", str(chunks)]
    assert draw(*words, "--num-microbatches", str(microbatches), "--output", str(path)) == 0
    boxes = [box for box in ET.parse(path).getroot().iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    timeline = simulate(make_schedule(ranks, chunks, microbatches))
    spans = [(rank, span) for rank, row in enumerate(timeline.spans) for span in row]
    assert len(boxes) == len(spans)
    scale = float(boxes[0].get("width")) / (spans[0][1].end - spans[0][1].start)
    left, top = float(boxes[0].get("x")), float(boxes[0].get("y"))
    colours = {}
    for box, (rank, span) in zip(boxes, spans):
        assert box.find(f"{SVG}title").text == f"{span.action}: {span.start:g} to {span.end:g}"
        assert float(box.get("x")) == pytest.approx(left + span.start * scale, abs=1)
        assert float(box.get("width")) == pytest.approx((span.end - span.start) * scale, abs=1)
        assert float(box.get("y")) == top + 30 * rank
        colours.setdefault((span.action.op, span.action.chunk), set()).add(box.get("fill"))
    assert all(len(fills) == 1 for fills in colours.values())
    assert len(set().union(*colours.values())) == 2 * chunks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pipeline-model-parallel-size", "0"], "--pipeline-model-parallel-size 0: use 1 or more"),
        (["--pipeline-model-parallel-size", "1", "--virtual-pipeline-model-parallel-size", "2"], "of 2 or more"),
        (["--pipeline-model-parallel-size", "2", "--output", "a.png"], "--output a.png: the picture is SVG"),
        (["--pipeline-model-parallel-size", "2", "--output", "no/such/a.svg"], "no/such/a.svg cannot be written"),
        (["--pipeline-model-parallel-size", "2", "--forward-time", "-1"], "forward_time=-1.0: use a number"),
        (["--pipeline-model-parallel-size", "3", "--virtual-pipeline-model-parallel-size", "2"], "last group"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert draw(*words, "--num-microbatches", "4") == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_it_runs_as_a_module_without_mindspore():
    code = (
        "import sys, runpy; sys.modules['mindspore'] = None; sys.argv[1:] = "
        "'draw --pipeline-model-parallel-size 2 --num-microbatches 2'.split(); "
        "runpy.run_module('parallel_core.report.pipeline', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1F1B: 2 pipeline ranks")
