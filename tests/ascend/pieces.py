"""The pieces of tests/ascend/run.sh: `python -m tests.ascend.pieces NAME` prints what it finds; wrong ones fail.

DEVICE_TARGET is the device. On the CPU the same code runs with the CPU's kernels, so that it is known to be right where
the first NPU meets it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
LOSSES = Path(__file__).with_name("losses.json")
"""Of configs/gpt_tiny.yaml, and of it with experts, on one CPU rank; `python -m tests.ascend.pieces write-losses`."""
EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2", "--disable-bias-linear"]
LAYOUTS = {
    "tp1": (1, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]),
    "dp2": (2, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]),
    "dp2 distributed optimizer": (2, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1",
                                      "--use-distributed-optimizer", "--overlap-grad-reduce"]),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"]),
    "tp2 sequence parallel": (2, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1",
                                  "--sequence-parallel"]),
    "pp2": (2, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"]),
    "cp2": (2, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1",
                "--context-parallel-size", "2"]),
    "experts ep2": (2, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1",
                        "--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "alltoall", *EXPERTS]),
    "tp2 pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "tp2 pp2 dp2": (8, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}  # fmt: skip
_MODEL = ["--config", str(REPO / "configs" / "gpt_tiny.yaml"), "--log-interval", "1", "--eval-iters", "0"]
_ITERATIONS, _LONG = 3, 20
_FAILURES: list[str] = []


def on_cpu() -> bool:
    """Return whether the pieces run on the CPU."""
    return os.environ.get("DEVICE_TARGET") == "CPU"


def devices() -> int:
    """Return how many ranks fit here."""
    return os.cpu_count() or 1 if on_cpu() else len(list(Path("/dev").glob("davinci[0-9]*")))


def check(what: str, holds: bool, found: object = "") -> None:
    """Print one line, and remember what is wrong."""
    print(f"{'ok  ' if holds else 'BAD '} {what}{f': {found}' if str(found) else ''}", flush=True)
    if not holds:
        _FAILURES.append(what)


def _speed(tflops: float) -> str:
    """Return operations a second, and with PEAK_TFLOPS their share of what a device reaches at most."""
    peak = os.environ.get("PEAK_TFLOPS")
    return f"{tflops:.4g} TFLOP/s" + (f" (MFU {tflops / float(peak):.1%} of {peak})" if peak else "")


# ---- machine, memory -------------------------------------------------------------------------------------------------
def machine() -> None:
    """The doctor's findings and the versions."""
    subprocess.run([sys.executable, "-m", "parallel_core.doctor", "--quick"], check=False)
    if shutil.which("npu-smi"):
        subprocess.run(["npu-smi", "info"], check=False)


def memory() -> None:
    """A parameter lives in a flat buffer: what either writes, the other sees."""
    from mindspore import Parameter, Tensor

    from parallel_core.ops.shared import put
    from parallel_core.optimizer import flat
    from parallel_core.training.runtime import start_runtime

    start_runtime()
    buffer = flat.zeros(16, "float32")
    parameter = Parameter(Tensor(np.arange(6, dtype=np.float32).reshape(2, 3)))
    part = buffer.part(4, 10)
    part.bind(parameter)
    check("the buffer has the parameter's values", np.array_equal(buffer.numpy()[4:10], np.arange(6)), buffer.numpy())
    part.scale_(2.0)
    check("the parameter sees the buffer", np.array_equal(parameter.asnumpy().ravel(), 2.0 * np.arange(6)))
    buffer.part(4, 7).load(np.full(3, 9.0, np.float32))
    check("a part of a part is the same memory", np.array_equal(parameter.asnumpy()[0], [9, 9, 9]), parameter.asnumpy())
    part.add_(Tensor(np.ones((2, 3), np.float32)))
    check("what is added in place is there", np.array_equal(buffer.numpy()[4:7], [10, 10, 10]), buffer.numpy())
    shaped = part.memory((2, 3))
    put(shaped, Tensor(np.ones((2, 3), np.float32)), True)
    check("what is added to it in the parameter's shape is there", np.array_equal(buffer.numpy()[4:7], [11, 11, 11]))
    squares = float(part.sum_of_squares()), float((parameter.asnumpy() ** 2).sum())
    check("squares are summed", bool(np.isclose(*squares)), squares)
    m, v, g = (flat.zeros(6, "float32") for _ in range(3))
    g.load(np.arange(6, dtype=np.float32) - 2)
    constants = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
    want = [x.numpy().astype(np.float32).copy() for x in (part, g, m, v)]
    from parallel_core.ops import reference

    for step in (1, 2):
        part.adam_(g, m, v, step=step, **constants)
        reference.adam_(*want, step=step, **constants)  # type: ignore[arg-type]
        error = np.abs(part.numpy() - want[0]).max()
        check(f"update {step} by Adam", bool(error < 1e-5), f"largest error {error:.1e}")


# ---- kernels ---------------------------------------------------------------------------------------------------------
def kernels() -> None:
    """Every kernel that is selected here against its reference, forward and backward, with the time of both."""
    import mindspore as ms

    from parallel_core.training.runtime import start_runtime
    from tests.ascend.kernels import Sizes

    start_runtime()
    if on_cpu():
        compare_kernels(ms.float32, 1e-4, Sizes(128, 2, 4, 2, 16))
    else:
        compare_kernels(ms.bfloat16, 2e-2, Sizes(2048, 2, 16, 4, 128))


def compare_kernels(dtype: Any, tolerance: float, sizes: Any) -> None:
    """Compare the kernels with inputs of a type and of these sizes, a `Sizes`."""
    from parallel_core import ops
    from tests.ascend import kernels

    print(ops.use_kernels())
    make = kernels.Maker(dtype)
    for case in (*kernels.differentiable(sizes, make), *kernels.raw(sizes, make)):
        try:
            errors, seconds = kernels.compare(case)
            what = "value, gradients" if case.differentiable else "results"
            speed = f", {_speed(case.flops / seconds[0] / 1e12)}" if case.flops else ""
            check(case.name, max(errors) < tolerance,
                  f"largest errors {', '.join(f'{e:.1e}' for e in errors)} ({what}); "
                  f"{1e3 * seconds[0]:.2f} ms{speed}, plain operators {1e3 * seconds[1]:.2f} ms")  # fmt: skip
        except Exception as error:  # noqa: BLE001 - the next kernel is asked all the same
            check(case.name, False, f"{type(error).__name__}: {error}")
    for name, draw in kernels.draws(sizes, make):
        try:
            one, again, other = (kernels._wide(draw(seed)) for seed in ((3, 5), (3, 5), (5, 3)))
            same, differs = np.array_equal(one, again), not np.array_equal(one, other)
            share = f"; zeros {np.mean(one == 0):.3f} of 0.25" if name == "dropout" else ""
            right = not share or abs(np.mean(one == 0) - 0.25) < 0.02
            check(name, same and differs and right, f"equal seeds {same}, other seeds differ {differs}{share}")
        except Exception as error:  # noqa: BLE001
            check(name, False, f"{type(error).__name__}: {error}")


# ---- ranks -----------------------------------------------------------------------------------------------------------
def _launch(folder: Path, ranks: int, words: list[str], program: list[str] | None = None) -> tuple[int, str]:
    command = program or ["bash", str(REPO / "pretrain_gpt.sh")]
    environment = {**os.environ, "NPROC": str(ranks), "LOG_DIR": str(folder), "PYTHON": sys.executable}
    run = subprocess.run([*command, *words], env=environment, text=True, capture_output=True, cwd=REPO, timeout=900)
    return run.returncode, run.stdout + run.stderr


def _losses(folder: Path, ranks: int, words: list[str]) -> list[float]:
    """Train and return the loss of each iteration.

    Raises:
        RuntimeError: if the run fails; with its last lines.
    """
    schedule = ["--lr-decay-iters", str(_LONG), "--lr-warmup-iters", "4", "--save", str(folder / "saved")]
    status, text = _launch(folder, ranks, [*_MODEL, *schedule, *words])
    if status:
        raise RuntimeError("\n".join(text.splitlines()[-15:]))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row and "split" not in row]


def collectives() -> None:
    """Every operation of a group against NumPy, on two ranks, or as many as there are."""
    ranks = min(4, max(2, devices()))
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, "-m", "parallel_core.launch", "--plain", str(Path(__file__).with_name("rank.py"))]
        status, text = _launch(Path(folder), ranks, [], script)
    print("\n".join(line for line in text.splitlines() if " (rank " in line))
    check(f"collectives on {ranks} ranks", status == 0 and "BAD" not in text,
          "" if status == 0 else text[-2000:])  # fmt: skip


def layouts() -> None:
    """A few steps of each layout against the losses of one CPU rank."""
    golden = json.loads(LOSSES.read_text())
    for name, (ranks, words) in LAYOUTS.items():
        if ranks > max(2, devices()):
            print(f"--   {name}: needs {ranks} devices")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                losses = _losses(Path(folder), ranks, ["--train-iters", str(_ITERATIONS), *words])
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                check(name, False, error)
                continue
        _compare(name, losses, golden["experts" if "experts" in name else "losses"][:_ITERATIONS])


def _compare(name: str, losses: list[float], golden: list[float]) -> None:
    error = max((abs(a - b) / b for a, b in zip(losses, golden)), default=1.0)
    allowed = 1e-4 if on_cpu() else 5e-3
    check(name, len(losses) == len(golden) and error < allowed, f"losses {losses}, of the CPU {golden}")


def default() -> None:
    """The run without any argument, shortened."""
    golden = json.loads(LOSSES.read_text())["losses"]
    with tempfile.TemporaryDirectory() as folder:
        losses = _losses(Path(folder), 4 if devices() >= 4 or on_cpu() else 1, _short(devices()))
    _compare("the default run", losses[-1:], golden[-1:])


def _short(count: int) -> list[str]:
    one = [] if count >= 4 or on_cpu() else LAYOUTS["tp1"][1]
    return ["--train-iters", str(_LONG), *one]


def moved() -> None:
    """A checkpoint of one layout goes on in another."""
    golden = json.loads(LOSSES.read_text())["losses"]
    first, second = ("tp2", "pp2") if devices() >= 2 or on_cpu() else ("tp1", "tp1")
    with tempfile.TemporaryDirectory() as folder:
        saved, short = str(Path(folder) / "saved"), ["--train-iters", str(_ITERATIONS)]
        (ranks, before), (other, after) = LAYOUTS[first], LAYOUTS[second]
        _losses(Path(folder) / "a", ranks, [*before, *short, "--save", saved])
        goes_on = ["--train-iters", str(2 * _ITERATIONS), "--load", saved, "--override-opt_param-scheduler"]
        losses = _losses(Path(folder) / "b", other, [*after, *goes_on])
    _compare(f"a checkpoint of {first} goes on as {second}", losses, golden[_ITERATIONS : 2 * _ITERATIONS])


def speed() -> None:
    """Tokens and model FLOPs a second of a bfloat16 run on one device; with PEAK_TFLOPS the MFU, its share of that."""
    model = ["--num-layers", "2", "--hidden-size", "128", "--seq-length", "128"] if on_cpu() else [
        "--num-layers", "24", "--hidden-size", "2048", "--num-attention-heads", "16", "--seq-length", "4096",
        "--max-position-embeddings", "4096", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear",
        "--position-embedding-type", "rope", "--micro-batch-size", "1", "--global-batch-size", "8"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = ["--save", str(Path(folder) / "saved"), "--bf16", "--train-iters", "10", "--log-throughput",
               "--lr-warmup-iters", "2"]  # fmt: skip
        words = [*LAYOUTS["tp1"][1], *model, *run]
        status, text = _launch(Path(folder), 1, [*_MODEL, *words])
        rows = [] if status else (Path(folder) / "metrics.jsonl").read_text().splitlines()
    steps = sorted((row for row in map(json.loads, rows) if "tokens_per_s" in row), key=lambda row: row["tokens_per_s"])
    found = text[-1500:]
    if steps:
        median = steps[len(steps) // 2]
        found = f"{median['tokens_per_s']:.0f} tokens/s, {_speed(median['tflops_per_device'])}"
    check("a bfloat16 run", status == 0 and bool(steps), found)


def write_losses() -> None:
    """Train on one CPU rank and keep the losses."""
    with tempfile.TemporaryDirectory() as folder:
        losses = _losses(Path(folder) / "a", 1, ["--train-iters", str(_LONG), *LAYOUTS["tp1"][1]])
        short = ["--train-iters", str(_ITERATIONS), *LAYOUTS["tp1"][1], *EXPERTS]
        experts = _losses(Path(folder) / "b", 1, short)
    LOSSES.write_text(json.dumps({"losses": losses, "experts": experts}) + "\n")


PIECES = {f.__name__: f for f in (machine, memory, kernels, collectives, layouts, default, moved, speed)}

if __name__ == "__main__":
    os.environ.setdefault("DEVICE_TARGET", "Ascend")
    {**PIECES, "write-losses": write_losses}[sys.argv[1]]()
    sys.exit(1 if _FAILURES else 0)
