"""`pretrain()` in this process, on a tiny model: what it says, what it writes, and what state it leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from parallel_core.launch.report import LOG_DIR_VARIABLE
from parallel_core.training import pretrain
from parallel_core.training.forward_step import forward_step
from pretrain_gpt import model_provider_func

TINY = """
    --num-layers 1 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8
    --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --lr-warmup-iters 0 --eval-iters 0
    --log-interval 1 --num-workers 0 --make-vocab-size-divisible-by 32 --hidden-dropout 0 --attention-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 31 --kernels local --log-dir log
"""


class Samples:
    """A dataset of so many samples; `mask(i)` is the loss mask of sample i."""

    def __init__(self, number: int, mask: Any = lambda index: 1.0, length: int = 8) -> None:
        self.number, self.mask, self.length = number, mask, length

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = np.random.default_rng([5, index]).integers(0, 31, self.length + 1).astype(np.int32)
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": np.full(self.length, self.mask(index), np.float32),
            "position_ids": np.arange(self.length, dtype=np.int32),
        }


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, without a launcher, and leave NumPy's generator as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    before, state = Path.cwd(), np.random.get_state()
    with mock.patch.dict(os.environ):
        os.environ.pop(LOG_DIR_VARIABLE, None)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            np.random.set_state(state)


def run(folder: Path, words: str = "", *, datasets: Sequence[Any] | None = None, **arguments: Any) -> SimpleNamespace:
    """Run in `folder`, and return `lines` of the console and `rows` of the metrics.

    Args:
        folder: the working directory; `--log-dir log` and `--save ck` lie in it.
        words: arguments after `TINY`.
        datasets: train, valid and test in place of the mock data.
        arguments: of `pretrain`.
    """
    console = io.StringIO()
    provider = None if datasets is None else lambda sizes: tuple(datasets)
    arguments = {"forward_step_func": forward_step, **arguments}
    with inside(folder), contextlib.redirect_stdout(console):
        pretrain(provider, arguments.pop("provider", model_provider_func), argv=[*TINY.split(), *words.split()],
                 **arguments)  # fmt: skip
    return SimpleNamespace(lines=console.getvalue().splitlines(), rows=rows(folder))


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a folder, read as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    path = folder / "log/metrics.jsonl"
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()] if path.exists() else []


def iterations(seen: SimpleNamespace) -> list[int]:
    """Return the iterations in the metrics."""
    return [row["iteration"] for row in seen.rows if "split" not in row]


def evaluations(seen: SimpleNamespace) -> list[tuple[int, str, Any]]:
    """Return iteration, split and loss of each evaluation."""
    return [(row["iteration"], row["split"], row["loss"]) for row in seen.rows if "split" in row]
