"""A schedule for people: its key figures and table as text, its timeline as SVG. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from parallel_core.pipeline.figures import bubble_share, format_steps, peak_in_flight
from parallel_core.pipeline.schedule import COMPLETES_GRADIENTS, Op, Step
from parallel_core.report.simulate import Span, Timeline

_FORWARD = ("#cfe2f9", "#9fc5f0", "#6fa6e4", "#4488d3", "#2a6ab5", "#184d8c")
_BACKWARD = ("#d9efd3", "#b3dfaa", "#88ca7e", "#5cb056", "#3b9139", "#237023")
_LATE = ("#fbe3cf", "#f6c9a3", "#f0ab73", "#e78d48", "#cf6f26", "#9c5119")
_SHADES = {Op.FORWARD: _FORWARD, Op.BACKWARD: _BACKWARD, Op.INPUT_GRAD: _BACKWARD, Op.WEIGHT_GRAD: _LATE}
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BOTTOM = 1400.0, 64.0, 150.0, 64.0, 30.0, 56.0
_MIN_UNIT = 2.0
"""Points of the shortest action; pictures of long schedules grow wider instead of denser."""


def describe_schedule(
    steps: Sequence[Sequence[Step]],
    timeline: Timeline,
    num_chunks: int,
    num_microbatches: int,
    *,
    with_exchanges: bool = False,
) -> str:
    """Return the schedule as text: bubble, what every rank holds and idles, and the tick (row) by rank table.

    Args:
        steps: the steps of every rank.
        timeline: their times.
        num_chunks: model chunks per rank V.
        num_microbatches: microbatches per iteration M.
        with_exchanges: list the transfers of every tick, too.
    """
    lines = [
        heading(steps, num_chunks, num_microbatches),
        f"bubble: {_percent(timeline.bubble_share)} of {timeline.end:g} time units simulated, "
        f"{_percent(_ideal(steps, timeline, num_chunks, num_microbatches))} ideal ({_formula(steps)})",
        "",
        " rank | peak in flight | idle",
    ]
    lines += [
        f"{rank:5d} | {held:14d} | {_percent(timeline.idle_share(rank))}" for rank, held in enumerate(_held(steps))
    ]
    return "\n".join([*lines, "", format_steps(steps, with_exchanges)])


def heading(steps: Sequence[Sequence[Step]], num_chunks: int, num_microbatches: int) -> str:
    """Return what is scheduled, in one line."""
    kind = "zero bubble" if _is_split(steps) else "1F1B" if num_chunks == 1 else "interleaved 1F1B"
    if not has_backward(steps):
        kind += ", forward only"
    return (
        f"{kind}: {len(steps)} pipeline rank{_s(len(steps))} x {num_chunks} chunk{_s(num_chunks)}, "
        f"{num_microbatches} microbatch{'es' if num_microbatches > 1 else ''}"
    )


def has_backward(steps: Sequence[Sequence[Step]]) -> bool:
    """Whether any backward pass is scheduled; without one nothing is kept."""
    return _has(steps, *COMPLETES_GRADIENTS)


def _is_split(steps: Sequence[Sequence[Step]]) -> bool:
    return _has(steps, Op.INPUT_GRAD)


def _has(steps: Sequence[Sequence[Step]], *ops: Op) -> bool:
    return any(step.compute is not None and step.compute.op in ops for rank in steps for step in rank)


def _formula(steps: Sequence[Sequence[Step]]) -> str:
    if _is_split(steps):
        return "(P - 1) * (F + I - W) / (V * M * (F + I + W) + (P - 1) * (F + I - W))"
    return "(P - 1) / (V * M + P - 1)"


def _ideal(steps: Sequence[Sequence[Step]], timeline: Timeline, num_chunks: int, num_microbatches: int) -> float:
    """Return the ideal bubble of the schedule at the timeline's mean durations."""
    if not _is_split(steps):
        return bubble_share(len(steps), num_chunks, num_microbatches)
    lengths: dict[Op, list[float]] = {}
    for span in (span for rank in timeline.spans for span in rank):
        lengths.setdefault(span.action.op, []).append(span.end - span.start)
    forward, input_grad, weight_grad = (
        sum(lengths[op]) / len(lengths[op]) for op in (Op.FORWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD)
    )
    return bubble_share(
        len(steps),
        num_chunks,
        num_microbatches,
        "zero-bubble",
        forward_time=forward,
        input_grad_time=input_grad,
        weight_grad_time=weight_grad,
    )


def svg_timeline(
    steps: Sequence[Sequence[Step]], timeline: Timeline, num_chunks: int, num_microbatches: int
) -> str:
    """Return the timeline as an SVG picture: a row per rank, a box per action, microbatch numbers inside.

    Forward passes are blue, backward ones green, the weights' part of split ones orange, later chunks darker; beside
    each row the peak number of microbatches in flight and the idle share. Arguments as for `describe_schedule`.
    """
    lengths = [span.end - span.start for rank in timeline.spans for span in rank]
    shortest = min(filter(None, lengths), default=1.0)
    scale = max((_WIDTH - _LEFT - _RIGHT) / (timeline.end or 1.0), _MIN_UNIT / shortest)
    right = _LEFT + timeline.end * scale
    bottom = _TOP + _ROW * len(steps)
    width, height = right + _RIGHT, bottom + _BOTTOM
    ideal = _ideal(steps, timeline, num_chunks, num_microbatches)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.2f} {height:.2f}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width:.2f}" height="{height:.2f}" fill="white"/>',
        _text(_LEFT, 22, heading(steps, num_chunks, num_microbatches), size=15, weight="bold"),
        _text(
            _LEFT,
            42,
            f"bubble {_percent(timeline.bubble_share)} of {timeline.end:g} time units; ideal {_percent(ideal)}",
        ),
        _text(right + 10, _TOP - 6, "in flight | idle", fill="#555"),
    ]
    for rank, (spans, held) in enumerate(zip(timeline.spans, _held(steps))):
        y = _TOP + rank * _ROW
        parts.append(_text(_LEFT - 8, y + 19, f"rank {rank}", anchor="end"))
        parts.append(f'<rect x="{_LEFT}" y="{y + 2}" width="{right - _LEFT:.2f}" height="{_ROW - 4}" fill="#f1f1f1"/>')
        parts += [_box(span, y, scale, num_chunks) for span in spans]
        parts.append(_text(right + 10, y + 19, f"{held} | {_percent(timeline.idle_share(rank))}"))
    parts += [*_axis(right, bottom, timeline.end, scale), *_legend(bottom, num_chunks, steps), "</svg>"]
    return "\n".join(parts) + "\n"


def _held(steps: Sequence[Sequence[Step]]) -> list[int]:
    """Return the microbatch activations that each rank holds at most."""
    return [peak_in_flight(rank) if has_backward(steps) else 0 for rank in steps]


def _box(span: Span, y: float, scale: float, num_chunks: int) -> str:
    op, microbatch, chunk = span.action
    x, width = _LEFT + span.start * scale, (span.end - span.start) * scale
    fill, ink = _colours(op, chunk, num_chunks)
    title = f"{span.action}: {span.start:g} to {span.end:g}"
    box = (
        f'<rect x="{x:.2f}" y="{y + 2}" width="{width:.2f}" height="{_ROW - 4}" fill="{fill}" stroke="white" '
        f'stroke-width="{0.8 if width > 4 else 0.2}"><title>{escape(title)}</title></rect>'
    )
    label = str(microbatch)
    if width < 6.0 * len(label) + 2:
        return box
    return box + _text(x + width / 2, y + 19, label, anchor="middle", size=11, fill=ink)


def _colours(op: Op, chunk: int, num_chunks: int) -> tuple[str, str]:
    """Return fill and text colour: lighter chunks first."""
    shades = _SHADES[op]
    step = 1 if num_chunks == 1 else round(chunk * (len(shades) - 1) / (num_chunks - 1))
    return shades[step], "black" if step < 3 else "white"


def _axis(right: float, bottom: float, end: float, scale: float) -> list[str]:
    """Return the time axis: at most about 20 ticks at round numbers."""
    step = next((m * 10.0**e for e in range(-6, 12) for m in (1, 2, 5) if m * 10.0**e * 20 >= end), end or 1.0)
    parts = [f'<line x1="{_LEFT}" y1="{bottom + 2}" x2="{right:.2f}" y2="{bottom + 2}" stroke="#888"/>']
    for i in range(int(end / step + 1e-9) + 1):
        x = _LEFT + i * step * scale
        parts.append(f'<line x1="{x:.2f}" y1="{bottom + 2}" x2="{x:.2f}" y2="{bottom + 6}" stroke="#888"/>')
        parts.append(_text(x, bottom + 18, f"{i * step:g}", anchor="middle", size=10, fill="#555"))
    return parts


def _legend(bottom: float, num_chunks: int, steps: Sequence[Sequence[Step]]) -> list[str]:
    names = {Op.FORWARD: "forward", Op.BACKWARD: "backward" if has_backward(steps) else ""}
    if _is_split(steps):
        names[Op.WEIGHT_GRAD] = "gradients of weights"
    parts, x, y = [], _LEFT, bottom + 30
    for op, name in ((op, name) for op, name in names.items() if name):
        for chunk in sorted({0, num_chunks - 1}):
            label = name if num_chunks == 1 else f"{name} of chunk {chunk}"
            parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{_colours(op, chunk, num_chunks)[0]}"/>')
            parts.append(_text(x + 20, y + 11, label))
            x += 34 + 7.0 * len(label)
    parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="#f1f1f1"/>')
    parts.append(_text(x + 20, y + 11, "idle"))
    return parts


def _text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
    fill: str = "black",
) -> str:
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}">{escape(words)}</text>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
