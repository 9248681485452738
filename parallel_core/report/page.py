"""The report: one HTML page that needs nothing else. Pure Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import median

from parallel_core.report.charts import line_chart, parts_chart, pipeline_chart
from parallel_core.report.run_files import RunFiles, is_number
from parallel_core.report.step_time import PARTS, RankTime, rank_times, simulated

_CHARTS = (
    ("loss", "Loss", False),
    ("lr", "Learning rate", False),
    ("grad_norm", "Gradient norm", True),
    ("tokens_per_s", "Tokens per second", False),
    ("tflops_per_device", "TFLOP/s per device", False),
    ("elapsed_ms", "Milliseconds per iteration", True),
    ("params_norm", "Norm of the parameters", False),
    ("num_zeros_in_grad", "Zeros among the gradients", False),
)
"""Key of a row, title, logarithmic axis; what else the rows hold follows, one chart each."""
_NOT_DRAWN = {"iteration", "consumed_samples", "weight_decay", "loss_scale", "skipped"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --mark: #fff3c4; --focus: #0550ae }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --paper: #0d1117; --card: #161b22;
  --line: #30363d; --mark: #4a3a00; --focus: #79c0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid var(--line) }
h3 { font-size: 1em; margin: .2em 0 }
nav a { margin-right: 1em; display: inline-block } a { color: var(--focus) }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; min-width: 0 }
.scroll { overflow-x: auto } svg { width: 100%; height: auto; display: block } svg.wide { min-width: 620px }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif } svg .grid { stroke: var(--line) }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: 3px 10px; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top } td.n, th.n { text-align: right }
tr.differs { background: var(--mark) } summary { cursor: pointer; padding: 4px 0 }
pre { overflow-x: auto; background: var(--card); padding: 10px; border: 1px solid var(--line); border-radius: 8px }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin: 0 5px 0 12px; vertical-align: -1px }
.note { color: var(--soft) } svg .idle { fill: var(--line); opacity: .45 } svg text.inside { fill: #ffffff }
svg .forward { fill: #2f6fd0 } svg .backward { fill: #2a8a4a } svg .chunk1 { opacity: .8 } svg .chunk2 { opacity: .65 }
svg .chunk3 { opacity: .5 }
"""
_RUNS = ("#2f6fd0", "#d1492e", "#2a8a4a", "#9a5bd0", "#b07d00", "#008b9a", "#c2408f", "#6b7785")
_PARTS = ("#2f6fd0", "#2a8a4a", "#9aa5b1", "#d1492e", "#b07d00", "#9a5bd0", "#57606a")


def report_page(runs: Sequence[RunFiles]) -> str:
    """Return the page about one or several runs."""
    colours = "".join(f"polyline.run{i} {{ stroke: {c} }} circle.run{i}, .key.run{i} {{ fill: {c}; background: {c} }}\n"
                      for i, c in enumerate(_RUNS))  # fmt: skip
    colours += "".join(f"svg .part{i} {{ fill: {c} }} .key.part{i} {{ background: {c} }}\n"
                       for i, c in enumerate(_PARTS))  # fmt: skip
    title = ", ".join(run.name for run in runs)
    sections = [("numbers", "In numbers", _numbers(runs)), ("curves", "Curves", _curves(runs)),
                ("step", "Where a step's time goes", _steps(runs)), ("pipeline", "Pipeline", _pipelines(runs)),
                ("configuration", "Configuration", _configurations(runs)), ("began", "Environment", _began(runs)),
                ]  # fmt: skip
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, body in sections if body)
    content = "".join(f'<section id="{name}"><h2>{heading}</h2>{body}</section>'
                      for name, heading, body in sections if body)  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}{colours}</style></head>'
        f'<body><h1>{escape(title)}</h1><nav aria-label="sections">{links}</nav><main>{content}</main></body></html>\n'
    )


def _legend(runs: Sequence[RunFiles]) -> str:
    if len(runs) < 2:
        return ""
    keys = [f'<span class="key run{i % 8}"></span>{escape(run.name)}' for i, run in enumerate(runs)]
    return f"<p>{''.join(keys)}</p>"


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], numbers: bool = True) -> str:
    kind = ' class="n"' if numbers else ""
    top = "".join(f'<th scope="col"{kind if i else ""}>{escape(cell)}</th>' for i, cell in enumerate(head))
    body = "".join(
        f"<tr{f' class={style}' if style else ''}><th scope=\"row\">{escape(cells[0])}</th>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in cells[1:]) + "</tr>"
        for style, cells in rows
    )  # fmt: skip
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table><thead><tr>{top}</tr></thead>' \
           f"<tbody>{body}</tbody></table></div>"  # fmt: skip


def _numbers(runs: Sequence[RunFiles]) -> str:
    def of(run: RunFiles, key: str, pick: Callable[[list[float]], float]) -> str:
        values = [value for _, value in run.series(key)]
        return f"{pick(values):.5g}" if values else "-"

    def best(run: RunFiles) -> str:
        losses = [loss for _, loss in _validation(run)]
        return f"{min(losses):.5g}" if losses else "-"

    lines: list[tuple[str, Callable[[RunFiles], str]]] = [
        ("iterations", lambda run: str(len(run.steps))),
        ("last loss", lambda run: of(run, "loss", lambda values: values[-1])),
        ("best validation loss", best),
        ("median tokens per second", lambda run: of(run, "tokens_per_s", median)),
        ("median ms per iteration", lambda run: of(run, "elapsed_ms", median)),
        ("skipped iterations", lambda run: str(sum(bool(row.get("skipped")) for row in run.steps))),
        ("largest memory, MB", lambda run: f"{max(run.memory_mb.values()):.0f}" if run.memory_mb else "-"),
    ]
    rows = [("", [name, *(value(run) for run in runs)]) for name, value in lines]
    return _legend(runs) + _table(["", *(run.name for run in runs)], rows)


def _validation(run: RunFiles) -> list[tuple[float, float]]:
    return [(row["iteration"], float(row["loss"])) for row in run.evaluations
            if row["split"] == "validation" and is_number(row.get("loss")) and "name" not in row]  # fmt: skip


def _curves(runs: Sequence[RunFiles]) -> str:
    known = [key for key, _, _ in _CHARTS]
    others = dict.fromkeys(key for run in runs for row in run.steps for key, value in row.items()
                           if is_number(value) and key not in known and key not in _NOT_DRAWN)  # fmt: skip
    cards = []
    for key, title, logarithmic in (*_CHARTS, *((name, name, False) for name in others)):
        series = {run.name: run.series(key) for run in runs}
        dots = None
        if key == "loss":
            dots = {run.name: _validation(run) for run in runs}
        drawn = line_chart(title, series, dots=dots, logarithmic=logarithmic)
        if drawn:
            note = " <span class=note>(dots: validation)</span>" if dots and any(dots.values()) else ""
            cards.append(f'<div class="card"><h3>{escape(title)}{note}</h3>{drawn}</div>')
    memory = {run.name: sorted((float(step), mb) for step, mb in run.memory_mb.items()) for run in runs}
    if any(len(points) > 1 for points in memory.values()):
        drawn = line_chart("Memory", memory)
        cards.append(f'<div class="card"><h3>Largest memory so far, MB, of the rank that logs</h3>{drawn}</div>')
    return _legend(runs) + f'<div class="charts">{"".join(cards)}</div>' if cards else ""


_NO_TIMELINE = '<p class="note">{} has no timeline; --profile records one.</p>'


def _steps(runs: Sequence[RunFiles]) -> str:
    if not any(run.timelines for run in runs):
        return _NO_TIMELINE.format("The run" if len(runs) == 1 else "None of the runs")
    keys = "".join(f'<span class="key part{i}"></span>{name}' for i, name in enumerate(PARTS))
    out = [f"<p>{keys}</p>"]
    for run in runs:
        ranks = rank_times(run.timelines)
        if not ranks:
            continue
        head = ["ms per iteration", *(f"rank {rank.rank}" for rank in ranks)]
        rows = [("", [name, *(f"{rank.milliseconds[name]:.2f}" for rank in ranks)]) for name in PARTS]
        out.append(f'<h3>{escape(run.name)}</h3><div class="card scroll" tabindex="0" role="region" '
                   f'aria-label="picture">{parts_chart(ranks)}</div>{_table(head, rows)}')  # fmt: skip
    return "".join(out)


def _pipelines(runs: Sequence[RunFiles]) -> str:
    out = []
    for run in runs:
        ranks = rank_times(run.timelines)
        first: list[RankTime] = [rank for rank in ranks
                                 if all(rank.place.get(axis, 0) == 0 for axis in ("tp", "dp", "cp"))]  # fmt: skip
        if not first:
            continue
        first.sort(key=lambda rank: rank.place.get("pp", 0))
        late = run.config.get("parallel_config.overlap_p2p_comm", "True") != "False"
        group = run.config.get("parallel_config.microbatch_group_size_per_virtual_pipeline_stage", "0")
        clock = simulated(first, int(group) if group.isdigit() else 0, late)
        length = max([rank.length for rank in first] + [rank.length for rank in clock])
        measured = pipeline_chart("measured", first, length)
        out.append(f'<h3>{escape(run.name)}: measured, one iteration, ms</h3><div class="card scroll" tabindex="0" '
                   f'role="region" aria-label="measured timeline">{measured}</div>')  # fmt: skip
        if clock:
            drawn = pipeline_chart("simulated", clock, length)
            out.append('<h3>simulated: the same passes without waiting for cores or transfers</h3>'
                       '<div class="card scroll" tabindex="0" role="region" aria-label="simulated timeline">'
                       f"{drawn}</div>")  # fmt: skip
    if not out:
        return ""
    keys = '<span class="key part0"></span>forward<span class="key part1"></span>backward'
    return f"<p>{keys}; numbers are microbatches, later chunks paler</p>{''.join(out)}"


def _configurations(runs: Sequence[RunFiles]) -> str:
    paths = sorted({path for run in runs for path in run.config})
    if not paths:
        return ""
    head = ["field", *(run.name for run in runs)]
    rows = [(path, [run.config.get(path, "-") for run in runs]) for path in paths]
    different = [(path, values) for path, values in rows if len(set(values)) > 1]
    out = ""
    if len(runs) > 1:
        out = _table(head, [("differs", [path, *values]) for path, values in different], numbers=False) if different \
            else "<p>The configurations are the same.</p>"  # fmt: skip
    given = [(path, values) for path, values in rows if any(path in run.sources for run in runs)]
    said = _table([*head, "from"], [
        ("", [path, *values, next((run.sources[path] for run in runs if path in run.sources), "")])
        for path, values in given
    ], numbers=False)  # fmt: skip
    every = _table(head, [("", [path, *values]) for path, values in rows], numbers=False)
    return out + f"<details><summary>Given or derived: {len(given)} fields</summary>{said}</details>" \
                 f"<details><summary>All {len(rows)} fields</summary>{every}</details>"  # fmt: skip


def _began(runs: Sequence[RunFiles]) -> str:
    out = []
    for run in runs:
        if run.began:
            hosts = sorted({str(document.get("metadata", {}).get("host")) for document in run.timelines} - {"None"})
            where = f" on {', '.join(hosts)}" if hosts else ""
            out.append(f"<h3>{escape(run.name + where)}</h3><pre tabindex=0>{escape(chr(10).join(run.began))}</pre>")
    return "".join(out)

