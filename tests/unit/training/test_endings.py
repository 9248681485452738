"""How a run ends early, goes on, and evaluates: nothing trained is lost, and the process is left as it was."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, find_checkpoint, open_checkpoint
from parallel_core.checkpoint.claim import claimed
from parallel_core.data.samplers import MegatronPretrainingSampler
from parallel_core.environment import promise_to_stop
from parallel_core.errors import CheckpointError, ConfigError, DataError, ParallelCoreError
from parallel_core.training.checkpointing import Checkpointer
from parallel_core.training.forward_step import forward_step
from parallel_core.training.metrics_file import MetricsFile, up_to
from parallel_core.training.signals import StopRequests
from tests.helpers.one_process import Samples, evaluations, iterations, rows, run


def signalling(at: int, number: signal.Signals = signal.SIGTERM):
    """A forward step that sends this process a signal at its `at`-th call; two calls are an iteration or a batch."""
    calls = [0]

    def step(data_iterator, model):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), number)
        return forward_step(data_iterator, model)

    return step, calls


def saved(folder: Path) -> int:
    return int(find_checkpoint(folder / "ck").name.removeprefix("iter_"))


# ---- requests to stop -----------------------------------------------------------------------------------------------
def test_a_signal_in_an_iteration_acts_after_that_iteration(tmp_path):
    step, _ = signalling(3)
    seen = run(tmp_path, "--save ck", forward_step_func=step)
    assert iterations(seen) == [1, 2] and saved(tmp_path) == 2
    assert "INFO - Stopped after iteration 2 of 4" in seen.lines


def test_a_signal_in_the_last_iteration_saves_and_leaves_out_the_final_evaluation(tmp_path):
    step, _ = signalling(8)
    seen = run(tmp_path, "--save ck --eval-iters 1", forward_step_func=step)
    assert iterations(seen) == [1, 2, 3, 4] and saved(tmp_path) == 4 and evaluations(seen) == []


def test_a_signal_in_an_evaluation_breaks_it_off_and_saves(tmp_path):
    step, calls = signalling(5)  # two iterations, then the first batch of 50
    seen = run(tmp_path, "--save ck --eval-iters 50 --eval-interval 2", forward_step_func=step)
    assert calls == [6] and iterations(seen) == [1, 2] and evaluations(seen) == [] and saved(tmp_path) == 2
    assert "INFO - The validation evaluation at iteration 2 is broken off, its losses not reported" in seen.lines
    assert open_checkpoint(find_checkpoint(tmp_path / "ck")).common["consumed_valid_samples"] == 200


def test_a_signal_in_an_evaluation_without_training_ends_it(tmp_path):
    step, calls = signalling(3)
    seen = run(tmp_path, "--skip-train --eval-iters 50", forward_step_func=step)
    assert calls == [4] and seen.rows == [] and "INFO - Stopped after iteration 0 of 4" in seen.lines


def test_a_signal_in_the_final_evaluation_finds_the_run_saved(tmp_path):
    step, calls = signalling(9)
    seen = run(tmp_path, "--save ck --eval-iters 50", forward_step_func=step)
    assert calls == [10] and saved(tmp_path) == 4 and evaluations(seen) == []


def test_a_signal_while_a_checkpoint_is_written_acts_after_it(tmp_path, monkeypatch):
    original = Checkpointer.save

    def save(self, progress):
        original(self, progress)
        if progress.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpointer, "save", save)
    seen = run(tmp_path, "--save ck --save-interval 2")
    assert iterations(seen) == [1, 2] and "INFO - Stopped after iteration 2 of 4" in seen.lines


def test_an_evaluation_that_fails_finds_the_run_saved(tmp_path):
    def broken(data_iterator, model):
        if not model.training:
            raise DataError("no such file")
        return forward_step(data_iterator, model)

    with pytest.raises(DataError, match="no such file"):
        run(tmp_path, "--save ck --eval-iters 1", forward_step_func=broken)
    assert saved(tmp_path) == 4


def test_a_run_after_one_whose_forward_pass_raised_trains_as_if_alone(tmp_path):
    def broken(data_iterator, model):
        forward_step(data_iterator, model)
        raise DataError("no such file")

    usual = run(tmp_path / "before", "--eval-iters 1").rows
    with pytest.raises(DataError):
        run(tmp_path / "broken", forward_step_func=broken)
    again = run(tmp_path / "after", "--eval-iters 1").rows
    assert [row["loss"] for row in again] == [row["loss"] for row in usual]


def test_signal_handlers_are_as_they_were_after_a_run_and_after_a_failed_one(tmp_path):
    def mine(number, frame):
        raise AssertionError("not called")

    before = {number: signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(tmp_path)
        assert {signal.getsignal(number) for number in before} == {mine}
        with pytest.raises(ParallelCoreError):
            run(tmp_path, "--lr 1e38 --clip-grad 0 --optimizer sgd --init-method-std 20")
        assert {signal.getsignal(number) for number in before} == {mine}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_ends_at_once_and_an_ignored_one_stays_ignored():
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` ignores it from the start
    try:
        _second_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, was)


def _second_ctrl_c():
    with pytest.raises(KeyboardInterrupt), StopRequests() as stops:
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.wanted()
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequests() as stops:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stops.wanted()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stops.wanted()
    finally:
        signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_a_run_trains_the_same(tmp_path):
    found: list = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=lambda: found.append(run(tmp_path / "thread", "--save ck")))
    thread.start()
    thread.join()
    (seen,) = found
    here = run(tmp_path / "here")
    assert [row["loss"] for row in seen.rows] == [row["loss"] for row in here.rows] and len(seen.rows) == 4
    assert saved(tmp_path / "thread") == 4
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_a_rank_promises_the_launcher_to_stop_only_while_it_would(tmp_path, monkeypatch):
    for name, value in (("PARALLEL_CORE_RUN_DIR", str(tmp_path)), ("RANK_ID", "3"), ("MS_ROLE", "MS_WORKER")):
        monkeypatch.setenv(name, value)
    with StopRequests():
        assert [path.name for path in tmp_path.iterdir()] == ["stops_itself_rank_3"]
    assert not list(tmp_path.iterdir())
    thread = threading.Thread(target=lambda: StopRequests().__enter__())
    thread.start()
    thread.join()
    assert not list(tmp_path.iterdir())  # no handler, no promise
    monkeypatch.setenv("PARALLEL_CORE_RUN_DIR", str(tmp_path / "gone"))
    with promise_to_stop():
        pass


# ---- validation data ------------------------------------------------------------------------------------------------
def test_validation_data_that_runs_out_begins_again(tmp_path):
    words = "--eval-iters 1 --eval-interval 1 --lr 0 --min-lr 0 --train-iters 6"
    seen = run(tmp_path, words, datasets=(Samples(24), Samples(9), None))
    losses = [loss for _, _, loss in evaluations(seen)]
    assert losses == [losses[0], losses[1]] * 3 and losses[0] != losses[1]  # two batches of four; the ninth is left out


def test_a_run_that_has_seen_more_validation_samples_than_there_are_now_resumes(tmp_path):
    often = "--save ck --eval-iters 3 --eval-interval 1 --train-iters 4"
    run(tmp_path, often, datasets=(Samples(24), Samples(40), None))
    assert open_checkpoint(tmp_path / "ck/iter_0000004").common["consumed_valid_samples"] == 36
    words = "--load ck --override-opt-param-scheduler --train-iters 5 --eval-iters 1"
    seen = run(tmp_path, words, datasets=(Samples(24), Samples(8), None))
    assert [(iteration, split) for iteration, split, _ in evaluations(seen)][-1] == (5, "validation")


def test_a_sampler_that_wraps_gives_every_rank_whole_rounds():
    """Random sizes: the ranks together walk through the whole groups, round after round, wherever they start."""
    rng = random.Random(3)
    for _ in range(200):
        micro, ranks = rng.randint(1, 3), rng.randint(1, 3)
        group, total = micro * ranks, rng.randint(1, 40)
        consumed = group * rng.randint(0, 50)
        if total < group:
            with pytest.raises(DataError, match="samples are fewer than"):
                MegatronPretrainingSampler(total, consumed, micro, 0, ranks, wraps=True)
            continue
        place = (total, consumed, micro)
        samplers = [iter(MegatronPretrainingSampler(*place, rank, ranks, wraps=True)) for rank in range(ranks)]
        usable = total // group * group
        got = [index for batches in itertools.islice(zip(*samplers), 30) for batch in batches for index in batch]
        assert got == [(consumed + i) % usable for i in range(len(got))]


def test_evaluating_alone_takes_the_first_samples_whatever_was_seen_and_no_schedule(tmp_path):
    data = (Samples(32), Samples(32), None)
    often = "--save ck --save-interval 2 --eval-iters 1 --eval-interval 1 --lr 0 --min-lr 0 --weight-decay 0"
    trained = run(tmp_path, often, datasets=data)
    _, _, first = evaluations(trained)[0]
    for step in (2, 4):
        seen = run(tmp_path / f"at{step}", f"--skip-train --load {tmp_path}/ck --ckpt-step {step} --eval-iters 1 "
                   "--lr 5 --lr-decay-style cosine --train-iters 100 --eval-interval 3", datasets=data)  # fmt: skip
        assert evaluations(seen) == [(step, "validation", first)]  # the weights never changed, so nor may this


def test_evaluating_alone_needs_no_length_no_optimizer_and_writes_no_checkpoint(tmp_path):
    run(tmp_path, "--save ck --no-save-optim")
    before = sorted(path.name for path in (tmp_path / "ck").rglob("*"))
    words = "--skip-train --train-iters 0 --load ck --save ck --eval-iters 1"
    assert [row["iteration"] for row in run(tmp_path, words).rows if "split" in row] == [4, 4]
    assert sorted(path.name for path in (tmp_path / "ck").rglob("*")) == before


# ---- checkpoints and metrics ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("there", ["no directory", "an empty directory", "what a run writes before its first save"])
def test_a_first_run_may_name_the_checkpoints_it_will_write(there, tmp_path):
    if there != "no directory":
        (tmp_path / "ck").mkdir(parents=True)
    if there.startswith("what"):
        for name in ("config.yaml", "notes.txt"):
            (tmp_path / "ck" / name).write_text("{}")
        (tmp_path / "ck/iter_0000002.tmp-x").mkdir()
    seen = run(tmp_path, "--save ck --load ck --save-interval 2 --exit-interval 2")
    (said,) = [line for line in seen.lines if "no checkpoint yet" in line]
    assert said.startswith("WARNING - --load ck: there is no checkpoint yet; the run starts from random weights")
    again = run(tmp_path, "--save ck --load ck --save-interval 2")
    assert iterations(again) == [1, 2, 3, 4] and not any("no checkpoint yet" in line for line in again.lines)


def test_a_first_run_takes_the_given_arguments_where_it_will_take_the_checkpoints(tmp_path):
    words = "--save ck --load ck --use-checkpoint-args --exit-interval 2"
    first = run(tmp_path, words)
    assert iterations(first) == [1, 2] and sum("no checkpoint yet to take arguments" in line for line in first.lines)
    again = run(tmp_path, f"{words} --num-layers 3")  # the checkpoint's one layer stands over it, as in Megatron-LM
    assert iterations(again) == [1, 2, 3, 4] and any("num_layers=1" in line for line in again.lines)


@pytest.mark.parametrize("words", ["--exit-on-missing-checkpoint", "--finetune", "--ckpt-step 3", "--skip-train"])
@pytest.mark.parametrize("asking", ["", " --use-checkpoint-args"])
def test_a_checkpoint_that_must_be_there_and_is_not_is_an_error(words, asking, tmp_path):
    with pytest.raises(ParallelCoreError, match="--load ck"):
        run(tmp_path, f"--load ck {words}{asking}")


@pytest.mark.parametrize("file", ["latest_checkpointed_iteration.txt", "pytorch_model.bin"])
def test_what_may_be_meant_as_a_checkpoint_is_not_passed_over(file, tmp_path):
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / file).write_text("7")
    with pytest.raises(CheckpointError):
        run(tmp_path, "--load ck")


def test_metrics_go_on_after_a_resume_and_lose_what_lies_past_it(tmp_path):
    whole = run(tmp_path / "whole", "--eval-iters 1 --eval-interval 2")
    run(tmp_path / "parts", "--eval-iters 1 --eval-interval 2 --save ck --save-interval 2 --exit-interval 3")
    (tmp_path / "parts/log/metrics.jsonl").open("a").write('{"iteration": 99')  # cut short by a crash
    parts = run(tmp_path / "parts", "--eval-iters 1 --eval-interval 2 --load ck --ckpt-step 2")
    one, other = ([[row.get(key) for key in ("iteration", "split", "loss", "lr")] for row in seen.rows]
                  for seen in (parts, whole))  # fmt: skip
    assert one == other
    assert iterations(run(tmp_path / "parts", "--exit-interval 1")) == [1]  # a new run begins a new file


def test_an_evaluation_alone_adds_to_the_metrics_and_drops_nothing(tmp_path):
    before = run(tmp_path, "--save ck --save-interval 2").rows
    after = run(tmp_path, "--skip-train --load ck --ckpt-step 2 --eval-iters 1").rows
    assert after[: len(before)] == before and [row["split"] for row in after[len(before) :]] == ["validation", "test"]


def test_rows_of_an_older_file_are_written_as_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": NaN}\n{"iteration": 2, "loss": 3.0}\n{"iteration": 3}\nnothing\n[1]\n')
    MetricsFile(path, up_to(2)).close()
    assert path.read_text() == '{"iteration": 1, "loss": null}\n{"iteration": 2, "loss": 3.0}\n'
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="the metrics cannot be written to"):
        MetricsFile(path, up_to(2))


def test_skipped_iterations_are_counted_over_a_resume(tmp_path):
    data = Samples(16, lambda index: float(index // 4 != 0))
    run(tmp_path, "--save ck --exit-interval 2", datasets=(data, None, None))
    seen = run(tmp_path, "--load ck", datasets=(data, None, None))
    assert [line.split("Skipped: ")[1][0] for line in seen.lines if "Skipped: " in line] == ["1", "1"]


SCALES = "--save ck --exit-interval 2 --fp16 --initial-loss-scale 1024 --loss-scale-window 1"


@pytest.mark.parametrize(
    ("words", "scale"), [("--fp16 --loss-scale 8", 8.0), ("--bf16", 1.0), ("", 1.0), (SCALES, 4096.0)]
)
def test_the_loss_scale_after_a_resume_is_the_configurations_or_the_dynamic_ones(words, scale, tmp_path):
    run(tmp_path, SCALES)
    (row, *_) = run(tmp_path, f"{words} --load ck --log-dir log2 --log-dir log").rows[2:]
    assert (row["iteration"], row["loss_scale"]) == (3, scale)


def test_float16_that_can_make_no_update_at_the_smallest_scale_stops(tmp_path):
    words = "--fp16 --initial-loss-scale 1048576 --min-loss-scale 1048576 --train-iters 20"
    with pytest.raises(ParallelCoreError, match="overflow float16 2 times in a row at loss scale 1.04858e.06"):
        run(tmp_path, f"{words} --init-method-std 3 --lr 1")
    assert all(row["skipped"] for row in rows(tmp_path))


def test_a_short_run_in_which_every_update_is_skipped_says_so(tmp_path):
    words = "--fp16 --initial-loss-scale 1048576 --train-iters 2 --init-method-std 3 --save ck"
    (said,) = [line for line in run(tmp_path, words).lines if "the model is as it was" in line]
    assert said.startswith("WARNING - the model is as it was: all 2 iterations were skipped")
    assert not [line for line in run(tmp_path, "--train-iters 2").lines if "as it was" in line]


def batches_of_ones_own(number):
    return [
        {name: np.stack([value, value]) for name, value in Samples(number)[index].items()} for index in range(number)
    ]


def test_validation_batches_of_ones_own_begin_again_where_they_can(tmp_path):
    words = "--dataloader-type external --eval-iters 2 --eval-interval 1 --train-iters 3"
    datasets = [iter(batches_of_ones_own(6)), batches_of_ones_own(3), batches_of_ones_own(1)]
    seen = evaluations(run(tmp_path, words, datasets=datasets))
    assert len(seen) == 4  # of 2 x 2 batches each, from 3
    with pytest.raises(DataError, match="give what can be iterated again"):
        run(tmp_path, words, datasets=[iter(batches_of_ones_own(6)), iter(batches_of_ones_own(3)), None])


def test_two_runs_with_one_directory_for_checkpoints_are_refused(tmp_path):
    with claimed(tmp_path / "ck", pytest.fail), pytest.raises(ConfigError) as error:
        run(tmp_path, "--save ck")
    assert f"--save ck belongs to a run that is still going (process {os.getpid()} on " in str(error.value)
    assert not (tmp_path / "ck/config.yaml").exists()  # nor is the other run's configuration replaced
    assert saved_after(tmp_path) == 4


def saved_after(folder: Path) -> int:
    run(folder, "--save ck")
    return saved(folder)


def test_a_run_that_fails_lets_go_of_its_directory(tmp_path):
    with pytest.raises(ParallelCoreError):
        run(tmp_path, "--save ck --lr 1e38 --clip-grad 0 --optimizer sgd --init-method-std 20")
    assert saved_after(tmp_path) == 4


def test_a_file_system_without_locks_is_said_and_a_link_is_refused(tmp_path, monkeypatch):
    def no_locks(handle, how):
        raise OSError(37, "No locks available")

    said: list[str] = []
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claimed(tmp_path / "a", said.append):
        pass
    assert len(said) == 1 and "cannot be locked (No locks available)" in said[0]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/.in_use").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be written"), claimed(tmp_path / "b", pytest.fail):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_an_error_waits_for_the_checkpoint_in_the_background(tmp_path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    original = CheckpointWriter.write_rank_file

    def slow(self, shards):
        begun.set()
        go_on.wait(30)
        return original(self, shards)

    def step(data_iterator, model):
        if begun.is_set():
            threading.Timer(0.2, go_on.set).start()
            raise DataError("the data ends")
        return forward_step(data_iterator, model)

    monkeypatch.setattr(CheckpointWriter, "write_rank_file", slow)
    with pytest.raises(DataError, match="the data ends"):
        run(tmp_path, "--save ck --save-interval 1 --async-save", forward_step_func=step)
    assert saved(tmp_path) == 1
    assert json.loads((tmp_path / "ck/iter_0000001/checkpoint.json").read_text())["iteration"] == 1
