"""Where the time of a step goes on every rank, from its timeline; and what the schedule's clock says. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from parallel_core.errors import ConfigError
from parallel_core.layout.stages import Placement
from parallel_core.pipeline.schedule import Action, Op, make_schedule
from parallel_core.report.simulate import simulate

PARTS = ("compute", "weight gradient", "waiting", "communication", "reading batches", "optimizer", "Python and other")
_OPS = {"forward-compute": Op.FORWARD, "backward-compute": Op.BACKWARD}


@dataclass(frozen=True)
class RankTime:
    """The mean iteration of one rank.

    Attributes:
        rank: global rank.
        place: its position on the axes.
        milliseconds: by part; together the iteration.
        boxes: (operation, microbatch, chunk, start, end) of the median iteration, in ms from its start.
        length: of that iteration, in ms.
    """

    rank: int
    place: Mapping[str, int]
    milliseconds: dict[str, float]
    boxes: list[tuple[str, int, int, float, float]]
    length: float


def rank_times(documents: Sequence[Mapping[str, Any]]) -> list[RankTime]:
    """Return the mean iteration of every rank's timeline; those that hold none are left out."""
    chosen: int | None = None
    found = []
    for document in documents:
        events = [event for event in document["traceEvents"] if _is_span(event)]
        iterations = [event for event in events if event["name"] == "iteration"]
        if not iterations:
            continue
        if chosen is None:
            usual = median(event["dur"] for event in iterations)
            chosen = min(range(len(iterations)), key=lambda i: abs(iterations[i]["dur"] - usual))
        one = iterations[min(chosen, len(iterations) - 1)]
        about = document.get("metadata", {})
        place = {axis: about[axis] for axis in ("tp", "pp", "dp", "cp") if isinstance(about.get(axis), int)}
        found.append(RankTime(
            int(about.get("rank", 0)), place, _parts(events, iterations), _boxes(events, one), one["dur"] / 1e3,
        ))  # fmt: skip
    return found


def _is_span(event: object) -> bool:
    return isinstance(event, dict) and event.get("ph") == "X" and {"name", "ts", "dur", "cat"} <= event.keys()


def _parts(events: list[dict[str, Any]], iterations: list[dict[str, Any]]) -> dict[str, float]:
    within = [(event["ts"], event["ts"] + event["dur"]) for event in iterations]
    sums = dict.fromkeys(PARTS, 0.0)
    computing = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] in _OPS]
    updating = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "optimizer"]
    total = sum(end - start for start, end in within)
    for event in events:
        span = (event["ts"], event["ts"] + event["dur"])
        if not _inside(span, within):
            continue
        name, length = event["name"], event["dur"]
        if event["cat"] == "waiting":
            sums["waiting"] += length
            sums["communication"] -= length
        elif event["cat"] == "communication":
            sums["communication"] += length
            if _inside(span, computing):
                sums["compute"] -= length
            elif _inside(span, updating):
                sums["optimizer"] -= length
        elif name in _OPS:
            sums["compute"] += length
        elif name == "weight-gradient":
            sums["weight gradient"] += length
            sums["compute"] -= length
        elif name == "batch-generator":
            sums["reading batches"] += length
            sums["compute"] -= length
        elif name == "optimizer":
            sums["optimizer"] += length
    sums["Python and other"] = total - sum(sums.values())
    return {name: max(value, 0.0) / 1e3 / len(iterations) for name, value in sums.items()}


def _inside(span: tuple[float, float], spans: Sequence[tuple[float, float]]) -> bool:
    return any(start <= span[0] and span[1] <= end + 1e-3 for start, end in spans)


def _boxes(events: list[dict[str, Any]], iteration: dict[str, Any]) -> list[tuple[str, int, int, float, float]]:
    start, end = iteration["ts"], iteration["ts"] + iteration["dur"]
    return [(event["name"].removesuffix("-compute"), int(event["args"].get("microbatch", 0)),
             int(event["args"].get("chunk", 0)), (event["ts"] - start) / 1e3,
             (event["ts"] + event["dur"] - start) / 1e3)
            for event in events if event["name"] in _OPS and start <= event["ts"] < end]  # fmt: skip


def simulated(ranks: Sequence[RankTime], group_size: int = 0, wait_late: bool = True) -> list[RankTime]:
    """Return a pipeline's ranks as the schedule's clock has them, with each rank's own mean times; empty if it cannot.

    Args:
        ranks: the measured ranks of one pipeline, in stage order.
        group_size: as for `make_schedule`.
        wait_late: as for `run_steps`.
    """
    chunks = 1 + max((box[2] for rank in ranks for box in rank.boxes), default=0)
    microbatches = 1 + max((box[1] for rank in ranks for box in rank.boxes), default=-1)
    if microbatches < 1:
        return []
    names = {Op.FORWARD: "forward", Op.BACKWARD: "backward"}
    means: dict[tuple[int, str, int], float] = {}
    for number, rank in enumerate(ranks):
        for name in names.values():
            for chunk in range(chunks):
                lengths = [box[4] - box[3] for box in rank.boxes if box[0] == name and box[2] == chunk]
                means[number, name, chunk] = sum(lengths) / len(lengths) if lengths else 0.0

    def duration(rank: int, action: Action) -> float:
        return means[rank, names.get(action.op, "backward"), action.chunk]

    try:
        steps = make_schedule(len(ranks), chunks, microbatches, group_size=group_size)
        clock = simulate(steps, duration, wait_late=wait_late, placement=Placement.in_turn(len(ranks), chunks))
    except ConfigError:
        return []
    return [
        RankTime(rank.rank, rank.place, {}, [
            (names.get(span.action.op, "backward"), span.action.microbatch, span.action.chunk, span.start, span.end)
            for span in spans
        ], clock.end)
        for rank, spans in zip(ranks, clock.spans)
    ]  # fmt: skip
