"""Whole runs on Ascend's double: a checkpoint is the CPU's, and goes on where it stopped."""

from __future__ import annotations

import json

import pytest

from parallel_core.environment import LOG_DIR_VARIABLE
from parallel_core.training.pretrain import pretrain
from tests.helpers.ascend_double import on_ascend_double
from tests.unit.config.effect_probes import provider, words_of

RUN = ("--fp16", "--loss-scale", "64", "--kv-channels", "16", "--mock-data", "--hidden-dropout", "0.1",
       "--vocab-size", "31", "--tokenizer-type", "NullTokenizer", "--lr-decay-iters", "4",
       "--override-opt_param-scheduler")  # fmt: skip


def losses(folder, monkeypatch, *words: str) -> list[float]:
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv(LOG_DIR_VARIABLE, str(folder))
    pretrain(None, provider, argv=words_of(*RUN, *words))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "split" not in row]


@pytest.mark.slow
def test_a_run_saves_and_goes_on(tmp_path, monkeypatch, capsys):
    saved = str(tmp_path / "saved")
    with on_ascend_double():
        whole = losses(tmp_path / "whole", monkeypatch, "--train-iters", "4")
        first = losses(tmp_path / "first", monkeypatch, "--train-iters", "2", "--save", saved)
        rest = losses(tmp_path / "rest", monkeypatch, "--train-iters", "4", "--load", saved)
    assert first == whole[:2] and rest == pytest.approx(whole[2:], rel=1e-6)
    assert "Kernels: Ascend operators for" in capsys.readouterr().out
    # Without dropout, whose masks differ, the CPU goes on as the device does.
    with on_ascend_double():
        device = losses(tmp_path / "d", monkeypatch, "--train-iters", "4", "--load", saved, "--hidden-dropout", "0")
    on_cpu = losses(tmp_path / "c", monkeypatch, "--train-iters", "4", "--load", saved, "--hidden-dropout", "0")
    assert on_cpu == pytest.approx(device, rel=5e-3)
