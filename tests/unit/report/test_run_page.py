"""The report of runs: what is read, what is counted, and that the page holds it, also in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from parallel_core.errors import ConfigError
from parallel_core.report.__main__ import main
from parallel_core.report.charts import line_chart
from parallel_core.report.page import report_page
from parallel_core.report.run_files import read_run
from parallel_core.report.step_time import rank_times, simulated


def event(name, start, end, cat="schedule", **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": 1e9 + 1e3 * start, "dur": 1e3 * (end - start), "args": args}


def trace(rank, shift=0.0):
    """Two microbatches through two stages: 10 ms forward, 20 ms backward of which 5 are weight gradients."""
    starts = [(0, 10, 30, 50), (10, 40, 20, 60)][rank]
    f0, f1, b0, b1 = (start + shift for start in starts)
    events = [event("iteration", 0, 100, iteration=1), event("optimizer", 90, 95)]
    for microbatch, (forward, backward) in enumerate(((f0, b0), (f1, b1))):
        events += [event("forward-compute", forward, forward + 10, microbatch=microbatch, chunk=0),
                   event("backward-compute", backward, backward + 20, microbatch=microbatch, chunk=0),
                   event("weight-gradient", backward + 1, backward + 6, "within")]  # fmt: skip
    events += [event("receive", 82, 86, "communication"), event("waiting", 82, 85, "waiting"),
               event("all-reduce", f0 + 1, f0 + 3, "communication"),
               event("batch-generator", f1 + 1, f1 + 2, "within")]  # fmt: skip
    return {"traceEvents": events, "metadata": {"rank": rank, "tp": 0, "pp": rank, "dp": 0, "cp": 0, "host": "here"}}


@pytest.fixture
def run_folder(tmp_path):
    def make(name, lr=0.1, timelines=True):
        folder = tmp_path / name
        (folder / "profile").mkdir(parents=True)
        rows = [{"iteration": i, "loss": 5.0 / i, "lr": lr, "grad_norm": 1.0, "elapsed_ms": 10.0 + i, "skipped": i == 3,
                 "tokens_per_s": 100.0, "load_balancing_loss": 0.5 * i, "consumed_samples": i}
                for i in range(1, 9)]  # fmt: skip
        rows.append({"iteration": 8, "split": "validation", "loss": 0.75, "ppl": 2.1})
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 9, "lo'
        (folder / "metrics.jsonl").write_text(text)
        (folder / "config.yaml").write_text(
            f"# optimizer_config.learning_rate: --lr\noptimizer_config:\n  learning_rate: {lr}\nmodel_config:\n"
            "  num_layers: 2\n")
        (folder / "worker_0.log").write_text("INFO - Kernels: <fused>\nnoise\nINFO - Epoch: 0, Step: 4, Loss: 1, "
                                             "Memory: 470 MB, Progress\n")  # fmt: skip
        if timelines:
            for rank in range(2):
                (folder / "profile" / f"timeline_rank_{rank}.json").write_text(json.dumps(trace(rank)))
        return folder

    return make


def test_a_run_is_read_whole(run_folder):
    run = read_run(run_folder("a"))
    assert len(run.steps) == 8 and run.evaluations[0]["loss"] == 0.75 and run.memory_mb == {4: 470.0}
    assert run.series("loss")[1] == (2, 2.5) and run.series("skipped") == []
    assert run.began == ["INFO - Kernels: <fused>"]
    assert run.config["optimizer_config.learning_rate"] == "0.1"
    assert run.sources == {"optimizer_config.learning_rate": "--lr"}
    assert [document["metadata"]["rank"] for document in run.timelines] == [0, 1]


def test_the_parts_of_a_step_add_up_to_it():
    first, second = rank_times([trace(0), trace(1)])
    assert first.milliseconds == pytest.approx({
        "compute": 60 - 10 - 2 - 1, "weight gradient": 10, "waiting": 3, "communication": 1 + 2, "reading batches": 1,
        "optimizer": 5, "Python and other": 100 - 60 - 4 - 5})  # fmt: skip
    assert sum(second.milliseconds.values()) == pytest.approx(100) and second.length == pytest.approx(100)
    assert ("forward", 1, 0, pytest.approx(10), pytest.approx(20)) in first.boxes
    clock = simulated([first, second])
    assert [rank.length for rank in clock] == pytest.approx([90, 90])
    assert clock[0].boxes[-1] == ("backward", 1, 0, pytest.approx(70), pytest.approx(90))
    assert rank_times([{"traceEvents": ["odd", {"ph": "X"}]}]) == [] and simulated([]) == []


class Tags(HTMLParser):
    """Counts tags, and checks that they nest."""

    def __init__(self):
        super().__init__()
        self.open, self.count, self.links = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "rect", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        if tag not in ("rect", "circle", "polyline"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(run_folder):
    page = report_page([read_run(run_folder("a")), read_run(run_folder("b", lr=0.2, timelines=False))])
    tags = Tags()
    tags.feed(page)
    assert not tags.open and all(link.startswith("#") for link in tags.links)
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", page) and tags.count.get("script", 0) == 0
    assert tags.count["polyline"] == 2 * 6 and page.count("<h3>load_balancing_loss</h3>") == 1
    assert "&lt;fused&gt;" in page and "<fused>" not in page
    differing = re.findall(r'<tr class=differs><th scope="row">([\w.]+)', page)
    assert differing == ["optimizer_config.learning_rate"]
    for section in ("numbers", "curves", "step", "pipeline", "configuration", "began"):
        assert f'<section id="{section}">' in page
    hostile = read_run(run_folder("c"), "<script>alert(1)</script>")
    assert "<script>" not in report_page([hostile])


def test_charts_keep_spikes_and_bear_odd_numbers():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321] = (4321.0, 50.0)
    drawn = line_chart("loss", {"a": points})
    assert len(re.findall(r"[\d.]+,[\d.]+", drawn)) <= 900 and ",12.0" in drawn  # the spike reaches the top
    assert line_chart("x", {"a": []}) == "" and line_chart("x", {"a": [(1.0, 0.0)]}, logarithmic=True) == ""
    assert "polyline" in line_chart("x", {"a": [(1.0, 2.0)]})
    wide = ["1e-05", "0.001", "0.1", "10", "1000"]
    for values, labels in (((120.0, 450.0), ["200", "300", "400"]), ((1e-5, 3e4), wide)):
        drawn = line_chart("x", {"a": list(enumerate(values))}, logarithmic=True)
        assert re.findall('text-anchor="end">([^<]+)<', drawn) == labels  # round numbers


def test_the_command(run_folder, capsys, tmp_path):
    a, b = run_folder("a"), run_folder("x/a")
    assert main([str(a), str(b)]) == 0 and (a / "report.html").read_text().startswith("<!doctype html>")
    assert "<title>" + f"{tmp_path.name}/a, x/a" in (a / "report.html").read_text()
    assert main([str(tmp_path / "none")]) == 2 and "has no metrics.jsonl" in capsys.readouterr().err
    assert main([str(a), "--output", str(tmp_path / "no" / "x.html")]) == 2
    with pytest.raises(ConfigError, match="give the log directory"):
        read_run(tmp_path)


@pytest.mark.slow
@pytest.mark.browser
def test_in_a_browser_it_is_readable_light_dark_narrow_and_by_keyboard(run_folder, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    a, b = run_folder("a"), run_folder("b", lr=0.2)
    assert main([str(a), str(b), "--output", str(tmp_path / "page.html")]) == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, scheme, width in (("light", "light", 1200), ("dark", "dark", 1200), ("narrow", "light", 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            asked, errors = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(error))
            page.goto(f"file://{tmp_path}/page.html")
            assert len(asked) == 1 and not errors
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
            ink, paper = page.evaluate("[getComputedStyle(document.body).color,"
                                       " getComputedStyle(document.body).backgroundColor]")  # fmt: skip
            assert contrast(ink, paper) > 7
            assert page.locator("svg.chart").count() >= 6 and page.locator("svg.wide").count() >= 3
            assert all(box["width"] > 250 for box in page.locator("svg.chart").evaluate_all(
                "all => all.map(one => ({width: one.getBoundingClientRect().width}))"))  # fmt: skip
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.textContent") == "In numbers"
            page.locator("details summary").first.focus()
            page.keyboard.press("Enter")
            assert page.locator("details").first.evaluate("one => one.open")
            page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
            page.close()
        browser.close()
    assert all((tmp_path / f"{name}.png").stat().st_size > 20_000 for name in ("light", "dark", "narrow"))


def contrast(one, other):
    def luminance(colour):
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
