"""Whole runs on Ascend's double: a checkpoint is the CPU's, and goes on where it stopped."""

from __future__ import annotations

import json

import pytest

from parallel_core.environment import LOG_DIR_VARIABLE
from parallel_core.training.pretrain import pretrain
from tests.helpers import ascend_double
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


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["", "--recompute-granularity full --recompute-method uniform "
                                           "--recompute-num-layers 1"], ids=["", "recomputed"])
@pytest.mark.parametrize(
    ("words", "mode", "layout"),
    [("--reset-attention-mask --reset-position-ids", 2, "TND"), ("--window-size 3 0", 4, "SBH"),
     ("--reset-attention-mask --window-size 3 0", 1, "SBH")],
    ids=["documents", "window", "both"],
)  # fmt: skip
def test_what_is_seen_is_told_by_numbers(words, mode, layout, recompute, tmp_path, monkeypatch):
    """Documents are sequences of their own and a window is a band, in layers that are computed again too."""
    given = (*words.split(), *recompute.split(), "--hidden-dropout", "0", "--train-iters", "2",
             "--position-embedding-type", "rope")  # fmt: skip
    on_cpu = losses(tmp_path / "c", monkeypatch, *given)
    operator, asked = ascend_double.flash_attention_score, set()

    def noted(*args, **options):
        asked.add((options["sparse_mode"], options["input_layout"]))
        return operator(*args, **options)

    monkeypatch.setattr(ascend_double, "flash_attention_score", noted)
    with on_ascend_double():
        device = losses(tmp_path / "d", monkeypatch, *given)
    assert device == pytest.approx(on_cpu, rel=5e-3) and asked == {(mode, layout)}
