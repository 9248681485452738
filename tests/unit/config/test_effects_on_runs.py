"""Mapped arguments whose effect is seen in a whole run: what it prints, writes, keeps and goes on from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import effect_probes as see
import mindspore as ms
import pytest
import yaml

from parallel_core.config import load_config
from parallel_core.errors import CheckpointError, ParallelCoreError
from parallel_core.training import runtime

Check = Callable[[Path], None]
RUNS: dict[str, Check] = {}


def shows(*names: str) -> Callable[[Check], Check]:
    """Register a check as the one that shows the effect of the arguments `names`."""

    def register(check: Check) -> Check:
        RUNS.update(dict.fromkeys(names, check))
        return check

    return register


def run(folder: Path, words: str = "", name: str = "run"):
    return see.run(tuple(words.replace("FOLDER", str(folder)).split()), folder / name)


_KEPT: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory):
    """A run that saved after iterations 2 and 4, with dropout."""
    folder = tmp_path_factory.mktemp("saved")
    see.run(tuple(f"--save {folder}/ck --save-interval 2 --hidden-dropout 0.5".split()), folder / "run")
    _KEPT["ck"] = folder / "ck"


def resumed(folder: Path, words: str = "", name: str = "resumed"):
    fixed = f"--load {_KEPT['ck']} --train-iters 6 --hidden-dropout 0.5 --override-opt_param-scheduler"
    return run(folder, f"{fixed} {words}", name)


# ---- length, log lines, evaluations ---------------------------------------------------------------------------------
@shows("log_interval", "log_throughput", "log_dir", "print_schedule", "time_startup")
def logging(folder):
    seen = run(folder, "--log-interval 3 --log-throughput --log-dir here --print-schedule --time-startup")
    (startup,) = [line for line in seen.lines if "Start-up: " in line]
    assert re.search(r" s from the command to the first step \(.*groups .*, data ", startup)
    assert seen.shown == [3, 4] and all("TFLOP/s per device: " in x for x in seen.lines if "Step: " in x)
    assert {"here/metrics.jsonl", "here/config.yaml"} <= seen.files
    assert seen.metrics[0]["tflops_per_device"] > 0 and seen.metrics[0]["share_of_peak"] > 0
    plain = run(folder, name="plain")
    assert not any("TFLOP" in line or "Start-up" in line for line in plain.lines)
    assert "tflops_per_device" not in plain.metrics[0]
    assert len(seen.lines) > len(plain.lines) - 2


@shows("eval_interval", "eval_iters")
def evaluations(folder):
    assert run(folder, "--eval-iters 1 --eval-interval 3").evaluations == [
        (3, "validation"), (4, "validation"), (4, "test")]
    assert run(folder, "--eval-iters 0 --eval-interval 3", "none").evaluations == []
    with pytest.raises(ParallelCoreError, match="nothing to train on"):
        run(folder, "--split 0,50,50", "untrained")


@shows("exit_interval", "exit_duration_in_mins", "skip_train")
def endings(folder):
    assert run(folder, "--exit-interval 3").iterations == [1, 2, 3]
    assert run(folder, "--exit-duration-in-mins 1e-9", "soon").iterations == [1]
    skipped = run(folder, "--skip-train --eval-iters 1", "skipped")
    assert skipped.iterations == [] and skipped.evaluations


@shows("kernels")
def kernels(folder):
    def said(seen):
        return next(line for line in seen.lines if "Kernels: " in line)

    assert "local was asked for" in said(run(folder, "--kernels local"))
    assert "local was asked for" not in said(run(folder, "--kernels auto --transformer-impl local", "fused"))


@shows("fp32_matmul_precision")
def products(folder):
    def said(words):
        return next(line for line in run(folder / words[-5:], f"--kernels auto {words}").lines if "Kernels: " in line)

    assert "bfloat16" in said("--fp32-matmul-precision high") and "bfloat16" not in said("--kernels auto")


@shows("deterministic_mode")
def determinism(folder):
    with mock.patch.object(ms, "set_deterministic") as asked, mock.patch.object(ms, "get_context", _off):
        run(folder, "--train-iters 1")
        assert not asked.called
        run(folder, "--train-iters 1 --deterministic-mode", "asked")
        asked.assert_called_once_with(True)


_get_context = ms.get_context


def _off(key):
    return "OFF" if key == "deterministic" else _get_context(key)


@shows("max_device_memory")
def device_memory(folder):
    """On the CPU nothing is limited, which is told; an NPU is told the size, once."""
    said = run(folder, "--train-iters 1 --max-device-memory 58GB").lines
    assert any("max_device_memory=58GB: the memory of a CPU has no such limit" in line for line in said)
    with mock.patch.object(ms, "get_context", lambda key: "Ascend"), \
            mock.patch.object(ms.runtime, "set_memory") as asked:
        for _ in range(2):
            assert runtime.limit_device_memory("5.5GB") is None
        asked.assert_called_once_with(max_size="5.5GB")
        assert runtime.limit_device_memory("") is None


@shows("check_for_nan_in_loss_and_grad")
def not_finite(folder):
    words = "--lr 1e38 --clip-grad 0 --optimizer sgd --init-method-std 20"
    with pytest.raises(ParallelCoreError, match="gradient norm is"):
        run(folder, words)
    seen = run(folder, f"{words} --no-check-for-nan-in-loss-and-grad", "skips")
    assert seen.metrics[-1]["skipped"]


# ---- what a run tells of itself -------------------------------------------------------------------------------------
@shows("log_params_norm", "log_num_zeros_in_grad", "timing_log_level", "timing_log_option", "barrier_with_L1_time")
def numbers_and_timers(folder):
    seen = run(folder, "--log-params-norm --log-num-zeros-in-grad --timing-log-level 2 --timing-log-option all")
    assert all(row["params_norm"] > 0 and row["num_zeros_in_grad"] >= 0 for row in seen.metrics)
    lines = [line for line in seen.lines if "Step: " in line]
    assert all("Params norm: " in line and "Zeros in grad: " in line for line in lines)
    titles = [line for line in seen.lines if "times across ranks (ms):" in line]
    timed = {line.split()[0] for line in seen.lines if "....: " in line}
    assert len(titles) == 4 and {"forward-backward", "optimizer", "forward-compute", "batch-generator"} <= timed
    less = run(folder, "--timing-log-level 1 --timing-log-option max", "less")
    timed = {line.split()[0] for line in less.lines if "....: " in line}
    assert timed == {"forward-backward", "all-grads-sync", "optimizer"} and "params_norm" not in less.metrics[0]
    assert any("max time across ranks (ms):" in line for line in less.lines)
    met = mock.Mock(size=2)
    from parallel_core.training.timers import Timers

    for barrier in (True, False):
        Timers(1, met, barrier).begin("optimizer", 1, {})
        assert met.barrier.call_count == 1


TOLD = """
    tensorboard_dir tensorboard_log_interval tensorboard_queue_size log_timers_to_tensorboard
    log_loss_scale_to_tensorboard log_learning_rate_to_tensorboard log_validation_ppl_to_tensorboard
    log_memory_to_tensorboard log_world_size_to_tensorboard
"""


@shows(*TOLD.split())
def tensorboard(folder):
    pytest.importorskip("tensorboardX")
    from tracking_events import values_by_tag

    words = "--eval-iters 1 --eval-interval 2 --tensorboard-dir FOLDER/"
    run(folder, f"{words}plain", "plain")
    plain = values_by_tag(folder / "plain")
    assert [step for step, _ in plain["lm loss"]] == [1, 2, 3, 4] and {"learning-rate", "loss-scale"} <= plain.keys()
    extra = "--log-timers-to-tensorboard --timing-log-level 1 --log-validation-ppl-to-tensorboard"
    extra += " --log-memory-to-tensorboard --log-world-size-to-tensorboard --no-log-learnig-rate-to-tensorboard"
    extra += " --no-log-loss-scale-to-tensorboard --tensorboard-log-interval 2 --tensorboard-queue-size 1"
    from tensorboardX import SummaryWriter

    with mock.patch.object(SummaryWriter, "__init__", autospec=True, side_effect=SummaryWriter.__init__) as made:
        run(folder, f"{words}more {extra}", "more")
    assert made.call_args.kwargs["max_queue"] == 1
    more = values_by_tag(folder / "more")
    assert [step for step, _ in more["lm loss"]] == [2, 4]
    assert set(more) - set(plain) == {
        "forward-backward-time", "all-grads-sync-time", "optimizer-time", "iteration-time", "world-size",
        "lm loss validation ppl", "lm loss validation ppl vs samples", "lm loss test ppl",
        "lm loss test ppl vs samples", "mem-reserved-bytes", "mem-allocated-bytes", "mem-max-allocated-bytes",
        "world-size vs samples",
    }  # fmt: skip
    assert set(plain) - set(more) == {
        "learning-rate", "learning-rate vs samples", "loss-scale", "loss-scale vs samples"}


@shows("wandb_project", "wandb_exp_name", "wandb_save_dir", "wandb_entity", "mlflow_experiment", "mlflow_run_name",
       "mlflow_tracking_uri")  # fmt: skip
def other_trackers(folder):
    """What the two services' packages are asked; the packages themselves are not needed."""
    wandb, mlflow = mock.Mock(), mock.Mock()
    modules = {"wandb": wandb, "mlflow": mlflow}
    words = "--wandb-project p --wandb-exp-name n --wandb-entity e --wandb-save-dir FOLDER/w"
    words += " --mlflow-experiment x --mlflow-run-name y --mlflow-tracking-uri FOLDER/m"
    from parallel_core.tracking import writers

    with mock.patch.dict("sys.modules", modules), mock.patch.object(writers.importlib.util, "find_spec"):
        run(folder, words)
    made = wandb.init.call_args.kwargs
    assert (made["project"], made["name"], made["entity"], made["dir"]) == ("p", "n", "e", f"{folder}/w")
    assert made["config"]["model_config"]["num_layers"] == 2
    logged = [call for call in wandb.init.return_value.log.call_args_list if "lm loss" in call.args[0]]
    assert [call.kwargs["step"] for call in logged] == [1, 2, 3, 4] and wandb.init.return_value.finish.called
    mlflow.set_tracking_uri.assert_called_once_with(f"{folder}/m")
    mlflow.set_experiment.assert_called_once_with("x")
    mlflow.start_run.assert_called_once_with(run_name="y")
    steps = [call.kwargs["step"] for call in mlflow.log_metric.call_args_list if call.args[0] == "lm loss"]
    assert steps == [1, 2, 3, 4] and mlflow.end_run.called


# ---- checkpoints ----------------------------------------------------------------------------------------------------
@shows("save", "save_interval", "ckpt_format", "ckpt_prefix", "keep_checkpoint_max")
def saving(folder):
    seen = run(folder, "--save ck --save-interval 1 --ckpt-format ckpt --ckpt-prefix mine --keep-checkpoint-max 2")
    weights = sorted(name for name in seen.files if Path(name).name.startswith("mine"))
    assert [Path(name).parent.name for name in weights] == ["iter_0000003", "iter_0000004"]
    assert all(name.endswith(".ckpt") for name in weights) and "ck/config.yaml" in seen.files


@shows("async_save", "no_save_optim", "no_save_rng")
def saving_less(folder):
    seen = run(folder, "--save ck --async-save --no-save-optim --no-save-rng --hidden-dropout 0.5")
    assert any("in the background" in line for line in seen.lines)

    def size(ck):
        return sum(path.stat().st_size for path in ck.glob("iter_0000004/*.safetensors"))

    assert 2 * size(folder / "run" / "ck") < size(_KEPT["ck"])
    less, all_ = ((ck / "iter_0000004" / "checkpoint.json").read_text() for ck in (folder / "run" / "ck", _KEPT["ck"]))
    assert '"rng"' in all_ and '"rng"' not in less


@shows("load", "ckpt_step")
def loading(folder):
    assert resumed(folder).iterations == [5, 6]
    assert resumed(folder, "--ckpt-step 2", "older").iterations == [3, 4, 5, 6]


@shows("exit_on_missing_checkpoint")
def loading_nothing(folder):
    assert run(folder, "--load nowhere").iterations == [1, 2, 3, 4]
    with pytest.raises(CheckpointError, match="there is no such directory"):
        run(folder, "--load nowhere --exit-on-missing-checkpoint", "required")


@shows("finetune", "resume_training", "pretrained_checkpoint")
def weights_alone(folder):
    everything = resumed(folder)
    for number, words in enumerate(("--finetune", "--no-resume-training")):
        seen = resumed(folder, words, f"weights{number}")
        assert seen.iterations == [1, 2, 3, 4, 5, 6] and seen.losses[0] != everything.losses[0]
        assert any("Loaded checkpoint" in line for line in seen.lines)
    fixed = f"--pretrained-checkpoint {_KEPT['ck']} --train-iters 6 --hidden-dropout 0.5"
    assert run(folder, fixed, "pretrained").losses == seen.losses


@shows("no_load_optim", "no_load_rng", "new_dataset")
def loading_less(folder):
    everything = resumed(folder, "--seed 7").losses
    assert resumed(folder, "--seed 7 --no-load-rng", "rng").losses[0] != everything[0]
    fresh = resumed(folder, "--seed 7 --no-load-optim", "optim").losses
    assert fresh[0] == everything[0] and fresh[1] != everything[1]
    with pytest.raises(CheckpointError, match=r"another optimizer \(exp_avg, exp_avg_sq\); add --no-load-optim"):
        resumed(folder, "--optimizer sgd", "sgd")
    afresh = resumed(folder, "--new-dataset", "data")
    assert afresh.metrics[0]["consumed_samples"] == 4 and resumed(folder, "", "a").metrics[0]["consumed_samples"] == 20


@shows("resume_crc_check")
def damage(folder):
    shutil.copytree(_KEPT["ck"], folder / "damaged")
    weights = next((folder / "damaged" / "iter_0000004").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    words = "--load FOLDER/damaged --ckpt-step 4 --train-iters 6 --override-opt_param-scheduler"
    with pytest.raises(ParallelCoreError, match="network-00000"):
        run(folder, words)
    assert run(folder, f"{words} --no-resume-crc-check", "unchecked").iterations == [5, 6]


@shows("use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler")
def schedule_of_a_checkpoint(folder):
    words = f"--load {_KEPT['ck']} --train-iters 6 --lr 1e-3"
    with pytest.raises(ParallelCoreError, match="the schedule differs"):
        run(folder, words)
    mine = run(folder, f"{words} --override-opt_param-scheduler", "mine")
    theirs = run(folder, f"{words} --use-checkpoint-opt_param-scheduler", "theirs")
    assert mine.metrics[0]["lr"] == pytest.approx(1e-3 * 2 / 6) and theirs.metrics[0]["lr"] == pytest.approx(0.0)


# ---- data files -----------------------------------------------------------------------------------------------------
@shows("data_cache_path", "mmap_bin_files")
def reading(folder):
    shutil.copytree(see.DATA, folder / "data")
    data = "--data-path FOLDER/data/corpus_a --padded-vocab-size 2000 --vocab-size 1000 --split 1,0,0"
    words = f"{data} --tokenizer-type NullTokenizer --no-mock-data"
    there = run(folder, f"{words} --data-cache-path cache")
    assert any(name.startswith("cache/") for name in there.files) and not (folder / "data" / "cache").exists()
    from parallel_core.data import indexed_dataset

    with mock.patch.object(indexed_dataset.np, "memmap", wraps=indexed_dataset.np.memmap) as mapped:
        read = run(folder, f"{words} --data-cache-path {folder}/run/cache --no-mmap-bin-files", "read")
    assert read.losses == there.losses
    assert not any(".bin" in str(call) for call in mapped.call_args_list)


# ---- profiles -------------------------------------------------------------------------------------------------------
@shows("profile", "profile_save_path", "profile_step_start", "profile_step_end")
def profiling(folder):
    recorded = []
    from parallel_core.training import profiler

    real = profiler.profiler.profile

    def profile(**options):
        made = real(**options)
        start, stop = made.start, made.stop
        made.start = lambda: (recorded.append("start"), start())
        made.stop = lambda: (recorded.append("stop"), stop())
        return made

    step = see.TrainingStep.train

    def train(self, data, iteration, *rest):
        recorded.append(iteration)
        return step(self, data, iteration, *rest)

    with mock.patch.object(profiler.profiler, "profile", profile), mock.patch.object(see.TrainingStep, "train", train):
        seen = run(folder, "--profile --profile-level level1 --profile-save-path there --profile-step-start 2"
                   " --profile-step-end 3")
    assert recorded == [1, "start", 2, 3, "stop", 4]
    assert any(name.startswith("there/rank_0/") and name.endswith("trace_view.json") for name in seen.files)
    assert "there/timeline_rank_0.json" in seen.files
    recorded.clear()
    with mock.patch.object(profiler.profiler, "profile", profile), mock.patch.object(see.TrainingStep, "train", train):
        words = "--profile --profile-save-path there --profile-step-start 2 --profile-step-end 3"
        plain = run(folder, words, "plain")
    assert recorded == [1, 2, 3, 4]
    assert [name for name in plain.files if name.startswith("there")] == ["there/timeline_rank_0.json"]


# ---- the configuration itself ---------------------------------------------------------------------------------------
def test_the_saved_configuration_gives_the_same_run(tmp_path):
    first = run(tmp_path, "--save ck --log-dir logs --swiglu")
    for folder in ("ck", "logs"):
        file = tmp_path / "run" / folder / "config.yaml"
        assert yaml.safe_load(file.read_text())["model_config"]["hidden_act"] == "swiglu"
        again = load_config(["--config", str(file)]).config
        assert again.model_config.hidden_act == "swiglu" and again.training_config.training_iters == 4
    fed_back = run(tmp_path, f"--config {file} --save null", "again")
    assert fed_back.losses == first.losses


@pytest.mark.slow
@pytest.mark.parametrize("check", dict.fromkeys(RUNS.values()), ids=lambda check: check.__name__)
def test_effect(check, tmp_path):
    check(tmp_path)


# ---- the batch ramp-up ----------------------------------------------------------------------------------------------
RAMP = "--train-iters null --micro-batch-size 1 --global-batch-size 8 --rampup-batch-size 2 2 16"
SIZES = [2, 2, 2, 4, 4, 6, 8, 8]
"""Two more samples each 16 / 3 samples, the whole batch after 16: the iterations begin after 0, 2, 4, 6, 10, 14, 20."""


def batch_sizes(seen) -> list[int]:
    totals = [0, *(row["consumed_samples"] for row in seen.metrics if "split" not in row)]
    return [after - before for before, after in zip(totals, totals[1:])]


def test_a_ramp_up_runs_the_iterations_that_the_configuration_says(tmp_path):
    """18 samples end inside the ramp-up, whose last iteration goes beyond them."""
    for samples, number in ((18, 6), (36, 8), (43, 8)):
        seen = run(tmp_path, f"{RAMP} --train-samples {samples}", f"run{samples}")
        written = yaml.safe_load(next((tmp_path / f"run{samples}").rglob("config.yaml")).read_text())
        assert written["training_config"]["training_iters"] == len(seen.iterations) == number
        assert batch_sizes(seen) == SIZES[:number]


def test_the_printed_schedule_is_that_of_the_whole_batch(tmp_path):
    seen = run(tmp_path, f"{RAMP} --train-samples 2 --print-schedule")
    assert [sum(f"F{number}" in line for line in seen.lines) for number in (0, 7, 8)] == [1, 1, 0]


def test_new_data_do_not_start_the_ramp_up_again(tmp_path):
    first = run(tmp_path, f"{RAMP} --train-samples 36 --exit-interval 4 --save {tmp_path}/ck")
    assert batch_sizes(first) == SIZES[:4]
    words = f"{RAMP} --train-samples 36 --load {tmp_path}/ck --new-dataset"
    second = run(tmp_path, f"{words} --exit-interval 6 --save {tmp_path}/ck2", "second")
    assert batch_sizes(second) == SIZES[4:6]
    third = run(tmp_path, f"{RAMP} --train-samples 36 --load {tmp_path}/ck2", "third")
    assert [row["consumed_samples"] for row in third.metrics] == [sum(SIZES[4:7]), sum(SIZES[4:8])]
