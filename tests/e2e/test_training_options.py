"""Precision, lengths, early ends, checkpoints and data sources of a run: one process, one start for all of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import open_checkpoint
from tests.e2e.runs import SMALL, Run, several, working_directory

TIMES = ("elapsed_ms", "tokens_per_s")


def flags(*more: str, without: str = "", **changes: str) -> list[str]:
    out = list(SMALL)
    changes = {"micro_batch_size": "4", **changes}  # fewer, larger microbatches: faster
    for name in without.split():
        place = out.index("--" + name.replace("_", "-"))
        del out[place : place + 2]
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if flag in out:
            out[out.index(flag) + 1] = value
        else:
            out += [flag, value]
    return ["--config", "empty.yaml", *out, *more]


# Ten doublings from the first overflow: 2^32 is far too much for float16 gradients, so the first updates are skipped.
FP16 = ["--fp16", "--loss-scale-window", "6", "--hysteresis", "1", "--initial-loss-scale", str(2**26)]
SAMPLES = "train_iters lr_warmup_iters"


def plan(folder: Path) -> dict[str, list[str]]:
    def at(name: str) -> str:
        return str(folder / name)

    return {
        "fp32": flags(save=at("fp32"), save_interval="10"),
        "fp16": flags(*FP16, save=at("fp16")),
        "fp16-first": flags(*FP16, save=at("fp16_half"), exit_interval="14"),
        "fp16-second": flags(*FP16, save=at("fp16_half"), load=at("fp16_half")),
        "bf16": flags("--bf16", save=at("bf16")),
        "bf16-first": flags("--bf16", save=at("bf16_half"), exit_interval="10"),
        "bf16-second": flags("--bf16", save=at("bf16_half"), load=at("bf16_half")),
        "rampup": [
            *flags(without=SAMPLES, train_samples="120", lr_warmup_samples="40", micro_batch_size="2"),
            "--rampup-batch-size", "2", "2", "40",
        ],
        "samples": flags(without=SAMPLES, train_samples="100", lr_warmup_samples="40"),
        "exit_interval": flags(save=at("exit_interval"), exit_interval="7"),
        "exit_duration": flags(save=at("exit_duration"), exit_duration_in_mins="0.0000001"),
        "finetune": flags("--finetune", load=at("fp32"), exit_interval="3"),
        "no_load_optim": flags("--no-load-optim", load=at("fp32"), ckpt_step="10", exit_interval="12"),
        "no_save_optim": flags("--no-save-optim", "--no-save-rng", save=at("no_save_optim"), exit_interval="2"),
        "async_save": flags("--async-save", save=at("async_save"), save_interval="10"),
        "keep": flags(save=at("keep"), save_interval="2", exit_interval="10", keep_checkpoint_max="2"),
        "mock": flags("--mock-data", without="data_path", exit_interval="3"),
        "cyclic": flags(dataloader_type="cyclic", save=at("cyclic")),
        "cyclic-first": flags(dataloader_type="cyclic", save=at("cyclic_half"), exit_interval="10"),
        "cyclic-second": flags(dataloader_type="cyclic", save=at("cyclic_half"), load=at("cyclic_half")),
        "skip_train": flags("--skip-train", load=at("fp32"), split="50,50,0", eval_iters="2"),
        "no_length": flags(train_iters="0"),
        "other_model": flags(load=at("fp32"), hidden_size="64"),
        "no_optim_there": flags(load=at("no_save_optim")),
        "already_done": flags(load=at("fp32")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return working_directory(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Run]:
    return several(folder / "logs", 1, {name: {"argv": argv} for name, argv in plan(folder).items()}, cwd=folder)


def good(run: Run) -> Run:
    assert run.status == 0, run.console
    return run


def rows(run: Run) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in good(run).rows]


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    source = open_checkpoint(checkpoint)
    out = {}
    for key in source.keys():  # noqa: SIM118
        info = source.info(key)
        dtype = {"bfloat16": np.uint16, "float16": np.float16}.get(info.dtype, np.float32)
        out[key] = np.empty(info.shape, dtype)
        source.read_into(key, [(0, n) for n in info.shape], out[key])
    return out


def assert_equal(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [key for key in a if not np.array_equal(a[key], b[key])] == []


@pytest.mark.parametrize("name", ["fp16", "bf16", "cyclic"])
def test_resuming_is_bitwise_in_16_bits_and_with_cyclic_data(name: str, runs, folder):
    assert rows(runs[f"{name}-first"]) + rows(runs[f"{name}-second"]) == rows(runs[name])
    assert_equal(folder / name / "iter_0000020", folder / f"{name}_half" / "iter_0000020")


def test_float16_skips_what_overflows_and_scales_on(runs, folder):
    steps = good(runs["fp16"]).steps
    skipped = [i for i, row in steps.items() if row["skipped"]]
    assert skipped and skipped[0] == 1 and steps[1]["loss_scale"] == 2**26
    lr = iter([0.0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])  # warm-up over five updates: a skipped one does not count
    before = None
    for i, row in steps.items():
        if before is not None and steps[before]["skipped"]:
            assert row["loss_scale"] == steps[before]["loss_scale"] / 2
            assert row["lr"] == steps[before]["lr"]
        if not row["skipped"]:
            wanted = next(lr, None)
            assert wanted is None or row["lr"] == pytest.approx(wanted, rel=1e-12)
        before = i
    assert any(steps[i + 1]["loss_scale"] == 2 * steps[i]["loss_scale"] for i in range(1, 20))  # after six good ones
    (last,) = [line for line in runs["fp16"].console.splitlines() if "Step: 20," in line and "Epoch" in line]
    assert f"Skipped: {len(skipped)}," in last
    saved = tensors(folder / "fp16" / "iter_0000020")
    assert {key.partition("@")[2] for key in saved} == {"", "master", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_16_bits_train_like_float32(name: str, runs):
    """The first loss is that of the same weights rounded to 8 (bf16) or 11 (fp16) bits; then updates differ a little.

    float16 has skipped some updates, so it is compared where both have the weights they started with.
    """
    steps, fp32 = good(runs[name]).steps, good(runs["fp32"]).steps
    assert abs(steps[1]["loss"] / fp32[1]["loss"] - 1) < 2e-3
    assert steps[1]["loss"] != fp32[1]["loss"]
    assert steps[20]["loss"] < steps[1]["loss"] - 0.2
    if name == "bf16":
        assert all(abs(steps[i]["loss"] / fp32[i]["loss"] - 1) < 1e-2 for i in steps)


def test_bfloat16_on_the_cpu_says_what_it_does(runs, folder):
    said = [line for line in runs["bf16"].console.splitlines() if "compute_dtype" in line]
    assert said == [
        "WARNING - compute_dtype=bfloat16: the CPU has no kernels for activations of that type; they are float32 "
        "instead, parameters stay bfloat16"
    ]
    info = open_checkpoint(folder / "bf16" / "iter_0000020").info("decoder.layers.0.mlp.linear_fc1.weight")
    assert info.dtype == "bfloat16"


def test_batch_size_ramps_up(runs):
    consumed, sizes, before = list(good(runs["rampup"]).column("consumed_samples").values()), [], 0
    for total in consumed:
        sizes.append(total - before)
        before = total
    # From 2 to 8 in three steps over 40 samples: +2 each 13.3 samples; a whole batch of 8 after that, up to 120.
    wanted, seen = [], 0
    while True:
        size = min(8, 2 + 2 * int(seen / (40 / 3))) if seen <= 40 else 8
        if seen + size > 120:
            break
        wanted.append(size)
        seen += size
    assert sizes == wanted and sizes[0] == 2 and sizes[-1] == 8 and {2, 4, 6, 8} == set(sizes)


def test_a_run_counted_in_samples(runs):
    steps = good(runs["samples"]).steps
    assert sorted(steps) == list(range(1, 13))  # 100 samples are 12 batches of 8; the rest is left out
    for i in range(1, 6):  # warm-up over 40 samples, by the samples before the update
        assert steps[i]["lr"] == pytest.approx(1e-3 * 8 * (i - 1) / 40, rel=1e-12)
    done = 8 * 11 - 40  # of the 60 samples from the end of the warm-up to the end of the decay
    assert steps[12]["lr"] == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * done / 60)), rel=1e-9)


def test_exit_interval_and_duration(runs, folder):
    assert sorted(good(runs["exit_interval"]).steps) == list(range(1, 8))
    assert (folder / "exit_interval/latest_checkpointed_iteration.txt").read_text().strip() == "7"
    assert sorted(good(runs["exit_duration"]).steps) == [1]
    assert (folder / "exit_duration/latest_checkpointed_iteration.txt").read_text().strip() == "1"
    assert "Stopped after iteration 7 of 20" in runs["exit_interval"].console


def test_finetune_starts_afresh_from_the_weights(runs):
    steps, fp32 = good(runs["finetune"]).steps, good(runs["fp32"]).steps
    assert sorted(steps) == [1, 2, 3] and steps[1]["lr"] == 0.0 and steps[1]["consumed_samples"] == 8
    assert steps[1]["loss"] < fp32[1]["loss"] - 0.2  # the same samples, trained weights


def test_no_load_optim_keeps_the_place_and_drops_the_state(runs):
    steps, fp32 = good(runs["no_load_optim"]).steps, good(runs["fp32"]).steps
    assert sorted(steps) == [11, 12]
    for key in ("loss", "grad_norm", "lr"):
        assert steps[11][key] == fp32[11][key]  # weights, data and schedule are those of iteration 11
    assert steps[12]["loss"] != fp32[12]["loss"]  # the update was made with fresh moments


def test_no_save_optim(runs, folder):
    good(runs["no_save_optim"])
    source = open_checkpoint(folder / "no_save_optim/iter_0000002")
    assert not [key for key in source.keys() if "@" in key]  # noqa: SIM118
    assert "rng" not in source.common
    refused = runs["no_optim_there"]
    assert refused.status == 1 and "holds weights but no optimizer state; add --no-load-optim" in refused.console


def test_saving_in_the_background_writes_the_same(runs, folder):
    good(runs["async_save"])
    for iteration in ("iter_0000010", "iter_0000020"):
        assert_equal(folder / "async_save" / iteration, folder / "fp32" / iteration)
    assert rows(runs["async_save"]) == rows(runs["fp32"])


def test_only_the_last_checkpoints_are_kept(runs, folder):
    good(runs["keep"])
    assert sorted(path.name for path in (folder / "keep").glob("iter_*")) == ["iter_0000008", "iter_0000010"]


def test_mock_data_and_cyclic_order(runs):
    mock, cyclic, fp32 = (good(runs[name]).steps for name in ("mock", "cyclic", "fp32"))
    assert sorted(mock) == [1, 2, 3] and mock[1]["loss"] != fp32[1]["loss"]
    assert cyclic[1]["loss"] != fp32[1]["loss"]  # other samples
    assert abs(cyclic[1]["loss"] / fp32[1]["loss"] - 1) < 0.05  # of the same text, by the same weights


def test_evaluation_without_training(runs):
    run = good(runs["skip_train"])
    assert not run.steps
    (row,) = run.evaluations
    assert (row["split"], row["iteration"]) == ("validation", 20)
    assert row["loss"] < good(runs["fp32"]).steps[1]["loss"] - 0.2


def test_what_cannot_go_on_says_so(runs, folder):
    assert runs["no_length"].status == 1
    assert "the run has no length: give --train-iters or --train-samples" in runs["no_length"].console
    other = runs["other_model"]
    assert other.status == 1 and other.rows == []
    assert f"{folder}/fp32/iter_0000020 holds another model:" in other.console
    assert "hidden_size: saved 32, asked 64" in other.console
    assert rows(runs["already_done"]) == []  # twenty of twenty iterations: nothing is left, and that is no error
