"""One rank of benchmarks/train.py: pretrain_gpt.py with a clock on every step, kernel and transfer.

The result of rank R goes to $BENCH_OUT/ours_R.json. With BENCH_PROFILE=1 rank 0 also profiles the steps after the
second and lists the ten functions (operators among them) that take longest.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import mindspore as ms  # noqa: E402

import pretrain_gpt  # noqa: E402
from parallel_core import ops  # noqa: E402
from parallel_core.comm import shm  # noqa: E402
from parallel_core.expert_parallel import dispatch, functions  # noqa: E402
from parallel_core.launch.entry import run_as_rank  # noqa: E402
from parallel_core.ops import build, library  # noqa: E402
from parallel_core.ops.training_layer import PRODUCT_STEPS  # noqa: E402
from parallel_core.pipeline.executor import run_steps  # noqa: E402
from parallel_core.training import step as training_step  # noqa: E402
from parallel_core.training.step import TrainingStep  # noqa: E402
from parallel_core.transformer.moe import router  # noqa: E402

EXPERTS = ("pc_grouped_linear", "pc_grouped_linear_grad_input", "pc_grouped_linear_grad_weight")
MATMULS = ("pc_linear", "pc_linear_grad_input", "pc_linear_grad_weight", *EXPERTS)
ROUTING = {
    dispatch: ("permute", "for_ranks", "by_expert"),
    functions._TakeRows: ("forward", "backward"),
    functions._PutBack: ("forward", "backward"),
    functions._Reorder: ("forward", "backward"),
    router._Route: ("forward", "backward"),
}
"""What a mixture of experts does beside its products and its exchange: choosing experts, and putting rows in order."""
RINGS = ("pc_ring_attention", "pc_ring_attention_grad")
"""Kernels that communicate: what they send and receive counts as theirs, what they wait for does not."""
WARM_UP = 2


class Clocked:
    """A library whose functions add their seconds to `seconds`, but for those in which `RINGS` have `waited`."""

    def __init__(self, loaded: Any, seconds: Counter[str], waited: Callable[[], float] = lambda: 0.0) -> None:
        self._loaded, self._seconds, self._waited = loaded, seconds, waited

    def __getattr__(self, name: str) -> Any:
        function, seconds, waited = getattr(self._loaded, name), self._seconds, self._waited

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            seconds[name] += time.perf_counter() - start
            return result

        def call_steps(layer: Any, first: int, last: int) -> None:
            for step in range(first, last):
                start = time.perf_counter()
                function(layer, step, step + 1)
                seconds["pc_linear" if step in products else name] += time.perf_counter() - start

        def call_and_wait(*arguments: Any) -> Any:
            before = waited()
            result = call(*arguments)
            seconds[name] -= waited() - before
            return result

        products = PRODUCT_STEPS.get(name, ())
        made: Any = call_steps if products else call_and_wait if name in RINGS else call
        setattr(self, name, made)
        return made


class ClockedStage:
    """A pipeline stage that appends (FORWARD or BACKWARD, microbatch, chunk, seconds) to `actions`."""

    def __init__(self, stage: Any, chunk: int, actions: list[tuple[str, int, int, float]]) -> None:
        self._stage, self._chunk, self._actions = stage, chunk, actions

    def forward(self, microbatch: int, activation: Any) -> Any:
        """Run and note the forward pass."""
        start = time.perf_counter()
        result = self._stage.forward(microbatch, activation)
        self._actions.append(("FORWARD", microbatch, self._chunk, time.perf_counter() - start))
        return result

    def backward(self, microbatch: int, grad_output: Any, is_last: bool) -> Any:
        """Run and note the backward pass."""
        start = time.perf_counter()
        result = self._stage.backward(microbatch, grad_output, is_last)
        self._actions.append(("BACKWARD", microbatch, self._chunk, time.perf_counter() - start))
        return result

    def __getattr__(self, name: str) -> Any:
        """Return the halves of a split backward pass, without a clock."""
        return getattr(self._stage, name)


class Recorder:
    """Times the steps of this rank and says what they were spent on."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.groups: list[shm.ShmGroup] = []
        self.rows: list[dict[str, Any]] = []
        self.pipeline: dict[str, Any] = {}
        self.profile = cProfile.Profile() if os.environ.get("BENCH_PROFILE") else None
        self.rank = int(os.environ.get("RANK_ID", "0"))

    def install(self) -> None:
        """Put clocks on the kernels, the collectives and the step."""
        try:
            ops.use_kernels()  # imports the modules that declare the functions of `library.lib`
            library.load()
            kernels = Clocked(SimpleNamespace(**vars(library.lib)), self.seconds, self._waited)
            vars(library.lib).update({name: getattr(kernels, name) for name in vars(library.lib)})
            shm._library = Clocked(shm.library(), self.seconds)  # type: ignore[assignment]
        except build.BuildError as error:
            print(f"no compiled kernels: {error}", file=sys.stderr)
        create, train, recorder = shm.ShmGroup.__init__, TrainingStep.train, self

        def creating(group: shm.ShmGroup, *arguments: Any, **options: Any) -> None:
            create(group, *arguments, **options)
            recorder.groups.append(group)

        def training(step: TrainingStep, *arguments: Any) -> Any:
            return recorder.step(lambda: train(step, *arguments))

        shm.ShmGroup.__init__, TrainingStep.train = creating, training  # type: ignore[method-assign]
        for owner, names in ROUTING.items():
            for name in names:
                clocked = self._clocked(getattr(owner, name))
                setattr(owner, name, staticmethod(clocked) if isinstance(owner, type) else clocked)
        training_step.run_steps = self.run_pipeline  # type: ignore[assignment]

    def _clocked(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds["routing"] += time.perf_counter() - start
            return result

        return call

    def run_pipeline(self, steps: Any, stages: Any, *options: Any) -> None:
        """Run the pipeline with a clock on every forward and backward pass."""
        actions: list[tuple[str, int, int, float]] = []
        clocked = [ClockedStage(stage, chunk, actions) for chunk, stage in enumerate(stages)]
        start = time.perf_counter()
        run_steps(steps, clocked, *options)
        self.pipeline = {"pipeline start": start, "pipeline end": time.perf_counter(), "actions": actions}

    def step(self, run: Any) -> Any:
        """Run one step."""
        before, waited = self.seconds.copy(), self._waited()
        if self.profile is not None and len(self.rows) >= WARM_UP:
            self.profile.enable()
        start, cpu = time.perf_counter(), time.process_time()
        result = run()
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
        if self.profile is not None:
            self.profile.disable()
        spent = self.seconds - before
        matmul = sum(spent[name] for name in MATMULS)
        transfer = sum(s for name, s in spent.items() if name.startswith("pcs_") and name != "pcs_waited")
        idle = self._waited() - waited
        kernels = sum(s for name, s in spent.items() if name.startswith("pc_")) - matmul
        row = {"step": total, "cpu": cpu, "matmul": matmul, "other kernels": kernels}
        row |= {"communication": max(0.0, transfer - idle), "idle": idle}
        row["python and MindSpore"] = total - matmul - kernels - max(transfer, idle)
        row |= {"routing": spent["routing"], "experts": sum(spent[name] for name in EXPERTS)}
        self.rows.append(row | self.pipeline)
        return result

    def _waited(self) -> float:
        return sum(group.waited_s for group in self.groups)

    def write(self, folder: str) -> None:
        """Write what was recorded."""
        top: list[dict[str, Any]] = []
        if self.profile is not None:
            stats = pstats.Stats(self.profile).stats  # type: ignore[attr-defined]
            by_time = sorted(stats.items(), key=lambda item: -item[1][2])[:10]
            steps = max(1, len(self.rows) - WARM_UP)
            for (file, line, name), (_, calls, own, _, _) in by_time:
                where = name if file == "~" else f"{Path(file).name}:{line} {name}"
                top.append({"operator": where, "calls per step": calls / steps, "ms per step": own / steps * 1e3})
        result = {"rank": self.rank, "steps": self.rows, "kernels": ops.use_kernels(), "top": top}
        Path(folder, f"ours_{self.rank}.json").write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    recorder = Recorder()
    recorder.install()
    ops.use_kernels()
    pretrain_gpt.main()
    recorder.write(os.environ["BENCH_OUT"])


if __name__ == "__main__":
    run_as_rank(main)
