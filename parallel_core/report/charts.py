"""Pictures of the report, as SVG that takes its colours from the page's style. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from parallel_core.report.step_time import PARTS, RankTime

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Name of a run -> its (iteration, value) points."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 260, 64, 12, 12, 34
_MOST_POINTS = 800


def line_chart(title: str, series: Series, *, dots: Series | None = None, logarithmic: bool = False) -> str:
    """Return a chart of numbers over iterations: a line for each run, and dots for what was measured now and then."""
    drawn = {name: _thinned(points, logarithmic) for name, points in series.items()}
    marks = {name: [p for p in points if not logarithmic or p[1] > 0] for name, points in (dots or {}).items()}
    every = [point for points in (*drawn.values(), *marks.values()) for point in points]
    if not every:
        return ""
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    values = [_scaled(y, logarithmic) for _, y in every]
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1e-9), high + 0.5 * max(abs(high), 1e-9)

    def x_of(x: float) -> float:
        return _LEFT + (x - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        return _TOP + (high - _scaled(y, logarithmic)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    label = escape(_summary(title, series))
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    for tick in _decades(low, high) if logarithmic else _ticks(low, high):
        place = _TOP + (high - tick) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        label = _short(10**tick if logarithmic else tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
                     f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')  # fmt: skip
    for tick in _ticks(left, right):
        parts.append(f'<text x="{x_of(tick):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{_short(tick)}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="run{number % 8}" points="{path}"><title>{escape(name)}</title></polyline>')
        for x, y in marks.get(name, ()):
            parts.append(f'<circle class="run{number % 8}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4">'
                         f"<title>{escape(name)}: {_short(y)} at iteration {_short(x)}</title></circle>")  # fmt: skip
    return "".join([*parts, "</svg>"])


def _summary(title: str, series: Series) -> str:
    ends = [f"{name} from {_short(points[0][1])} to {_short(points[-1][1])}"
            for name, points in series.items() if points]  # fmt: skip
    return f"{title} over iterations: {'; '.join(ends)}"


def _thinned(points: Sequence[tuple[float, float]], logarithmic: bool) -> list[tuple[float, float]]:
    """Return at most about 800 points: of each stretch its smallest and its largest, so that no spike is lost."""
    good = [point for point in points if not logarithmic or point[1] > 0]
    if len(good) <= _MOST_POINTS:
        return good
    size = math.ceil(len(good) / (_MOST_POINTS / 2))
    kept = []
    for start in range(0, len(good), size):
        stretch = good[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log10(value) if logarithmic else value


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(step * (first + i), 12) for i in range(12) if step * (first + i) <= high + 1e-12 * abs(high)]


def _decades(low: float, high: float) -> list[float]:
    """Return the logarithms of round numbers between 10 ** low and 10 ** high."""
    if high - low < _FEW_DECADES:
        return [math.log10(tick) for tick in _ticks(10**low, 10**high) if tick > 0]
    return [float(power) for power in range(math.ceil(low), math.floor(high) + 1, math.ceil((high - low) / 6))]


_FEW_DECADES = 1.5


def _short(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


_ROW = 26


def pipeline_chart(title: str, ranks: Sequence[RankTime], length: float) -> str:
    """Return rows of forward and backward passes, microbatch numbers inside, over `length` milliseconds."""
    width, left = 900, 70
    scale = (width - left - 8) / (length or 1.0)
    height = _ROW * len(ranks) + 30
    parts = [f'<svg class="wide" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for row, rank in enumerate(ranks):
        y = row * _ROW
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">rank {rank.rank}</text>'
                     f'<rect class="idle" x="{left}" y="{y + 2}" width="{width - left - 8}" '
                     f'height="{_ROW - 4}"/>')  # fmt: skip
        for name, microbatch, chunk, start, end in rank.boxes:
            shown = max((end - start) * scale, 0.5)
            parts.append(f'<rect class="{name} chunk{chunk % 4}" x="{left + start * scale:.1f}" y="{y + 2}" '
                         f'width="{shown:.1f}" height="{_ROW - 4}"><title>rank {rank.rank}, {escape(name)} '
                         f"of microbatch {microbatch}, chunk {chunk}: {start:.2f} to {end:.2f} ms</title></rect>"
                         )  # fmt: skip
            if shown > 7 * len(str(microbatch)) + 3:
                parts.append(f'<text class="inside" x="{left + (start + end) / 2 * scale:.1f}" y="{y + 17}" '
                             f'text-anchor="middle">{microbatch}</text>')  # fmt: skip
    for tick in _ticks(0, length):
        x = left + tick * scale
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{_short(tick)}</text>')
    return "".join([*parts, "</svg>"])


def parts_chart(ranks: Sequence[RankTime]) -> str:
    """Return a bar for each rank: what its mean iteration consists of."""
    width, left = 900, 70
    longest = max(sum(rank.milliseconds.values()) for rank in ranks)
    scale, height = (width - left - 8) / (longest or 1.0), _ROW * len(ranks) + 8
    parts = [f'<svg class="wide" viewBox="0 0 {width} {height}" role="img" aria-label="where the time of a step goes">']
    for row, rank in enumerate(ranks):
        x, y = float(left), row * _ROW
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">rank {rank.rank}</text>')
        for number, name in enumerate(PARTS):
            spent = rank.milliseconds[name]
            shown = spent * scale
            parts.append(f'<rect class="part{number}" x="{x:.1f}" y="{y + 2}" width="{shown:.1f}" height="{_ROW - 4}">'
                         f"<title>rank {rank.rank}, {name}: {spent:.2f} ms</title></rect>")  # fmt: skip
            x += shown
    return "".join([*parts, "</svg>"])
