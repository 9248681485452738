"""What a run left behind, for its report: metrics, configuration, timelines, the lines it began with. Pure Python."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel_core.config.yaml_tree import leaves_of_text
from parallel_core.errors import ConfigError
from parallel_core.files import read_regular

_MOST_BYTES = 256 << 20
_MOST_LOG_BYTES = 64 << 20
_LINE = re.compile(r"INFO - Epoch: \d+, Step: (\d+),.* Memory: (\d+) MB")


@dataclass
class RunFiles:
    """One run.

    Attributes:
        name: what the page calls it.
        steps: rows of iterations, in order.
        evaluations: rows of evaluations, in order.
        memory_mb: iteration -> largest resident memory of the process that logs.
        config: field path -> value as text.
        sources: field path -> where it came from, for values that were given or derived.
        began: the lines that the run began with.
        timelines: documents of the ranks' timelines, in rank order.
    """

    name: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    memory_mb: dict[int, float] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    began: list[str] = field(default_factory=list)
    timelines: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return (iteration, value) of a number, where there is one."""
        return [(row["iteration"], float(row[key])) for row in self.steps if is_number(row.get(key))]


def is_number(value: object) -> bool:
    """Whether a value of a row is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(folder: Path, name: str | None = None) -> RunFiles:
    """Return the run whose log directory is `folder`.

    Args:
        folder: holds `metrics.jsonl`, and what else the run wrote there.
        name: what to call it; the folder's name by default.

    Raises:
        ConfigError: it holds no metrics.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl; give the log directory of a run (LOG_DIR, --log-dir)")
    run = RunFiles(name or folder.resolve().name)
    for row in _rows(_text(folder / "metrics.jsonl")):
        if isinstance(row.get("iteration"), int):
            (run.evaluations if "split" in row else run.steps).append(row)
    run.config, run.sources = _configuration(folder / "config.yaml")
    _read_logs(run, folder)
    run.timelines = _timelines(folder, run.config)
    return run


def _text(file: Path) -> str:
    try:
        return read_regular(file, _MOST_BYTES).decode("utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from None


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short by a crash
        if isinstance(row, dict):
            yield row


def _configuration(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    if not file.is_file():
        return {}, {}
    text = _text(file)
    leaves, _ = leaves_of_text(text, file.name, {})
    values = {".".join(leaf.path): str(leaf.value) for leaf in leaves}
    sources = dict(re.findall(r"^# ([\w.]+): (.+)$", text, re.M))
    return values, sources


def _read_logs(run: RunFiles, folder: Path) -> None:
    for file in sorted(folder.glob("worker_*.log")):
        try:
            text = read_regular(file, _MOST_LOG_BYTES).decode("utf-8", errors="replace")
        except OSError:
            continue
        run.memory_mb.update({int(step): float(mb) for step, mb in _LINE.findall(text)})
        if file.name == "worker_0.log":
            begins = re.split(r"INFO - (?:Epoch|Saved checkpoint|Stopping)", text, maxsplit=1)[0].splitlines()
            run.began = [line for line in begins if line.startswith(("INFO - ", "WARNING - ", "  "))][:200]


def _timelines(folder: Path, config: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the timelines beside the logs, or where the configuration says that they are."""
    saved = config.get("training_config.profile.save_path", "")
    checkpoints = config.get("training_config.output_dir", "")
    places = [folder / "profile", *([Path(saved)] if saved else []),
              *([Path(checkpoints) / "profile"] if checkpoints else [])]  # fmt: skip
    for place in places:
        found = []
        for file in sorted(place.glob("timeline_rank_*.json")):
            try:
                document = json.loads(read_regular(file, _MOST_BYTES))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(document, dict) and isinstance(document.get("traceEvents"), list):
                found.append(document)
        if found:
            return sorted(found, key=lambda document: document.get("metadata", {}).get("rank", 0))
    return []
