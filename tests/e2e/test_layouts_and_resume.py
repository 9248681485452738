"""One model in every layout; training that is interrupted goes on to the last bit as if it had not been."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import open_checkpoint
from tests.e2e.runs import SMALL, Run, pretrain_gpt, several, working_directory
from tests.helpers.launching import REPO

# float32, 20 updates: layouts differ in the order of their sums only. One step differs by some 1e-7 relative; Adam
# divides by the root of small second moments and so hands on more of it than its share. A missing all-reduce, a mean
# over the wrong number of ranks or shards that do not start as slices of one model show from 1e-3.
TOLERANCE = 1e-5

SHORTENED = "--train-iters 20 --lr-warmup-iters 5 --log-interval 10 --eval-iters 0 --save none".split()
SHORTENED[-1] = "None"  # takes back the file's: no checkpoint
NO_SP = "--no-sequence-parallel"
LAYOUTS = {
    "tp2": (2, [NO_SP, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"]),
    "tp2sp": (2, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"]),
    "pp2": (2, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2"]),
    "dp2": (2, ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]),
    "tp2pp2": (4, [NO_SP]),
    "tp2pp2sp": (4, []),
}
def shortened(layout_flags: list[str]) -> list[str]:
    """The default run's configuration, 20 iterations of it."""
    return ["--config", str(REPO / "configs/gpt_tiny.yaml"), *SHORTENED, *layout_flags]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return working_directory(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def one_process(workplace: Path, tmp_path_factory) -> Run:
    """The default run's configuration on one process."""
    logs = tmp_path_factory.mktemp("one_process")
    return pretrain_gpt(logs, shortened(LAYOUTS["dp2"][1]), cwd=workplace, NPROC="1")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same_model(layout: str, one_process: Run, workplace: Path, tmp_path):
    ranks, flags = LAYOUTS[layout]
    run = pretrain_gpt(tmp_path / "logs", shortened(flags), cwd=workplace, NPROC=str(ranks))
    assert sorted(run.steps) == list(range(1, 21))
    for key in ("loss", "grad_norm"):
        got, wanted = (np.array(list(r.column(key).values())) for r in (run, one_process))
        assert np.abs(got / wanted - 1).max() < TOLERANCE, (key, got, wanted)
    assert run.column("lr") == one_process.column("lr")
    assert run.steps[20]["loss"] < run.steps[1]["loss"] - 0.3


# ---- resuming -------------------------------------------------------------------------------------------------------
SAME_LAYOUT = {
    "one": (1, []),
    "tp2sp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2vpp2": (2, ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "dp2distopt": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
    "tp2pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}
TIMES = ("elapsed_ms", "tokens_per_s")


def replaced(**values: str) -> list[str]:
    flags = ["--config", "empty.yaml", *SMALL]
    for name, value in values.items():
        flags[flags.index("--" + name.replace("_", "-")) + 1] = value
    return flags


def with_dropout_and_evaluation() -> list[str]:
    flags = replaced(attention_dropout="0.1", hidden_dropout="0.1", eval_iters="2", split="80,20,0")
    return [*flags, "--eval-interval", "5"]


def resume_plan(name: str, ranks: int, layout: list[str], base: list[str], folder: Path) -> dict:
    """Twenty iterations; ten and a checkpoint; ten more from it."""
    whole, half = str(folder / f"{name}_whole"), str(folder / f"{name}_half")
    return {
        f"{name}-whole": {"argv": [*base, *layout, "--save", whole]},
        f"{name}-first": {"argv": [*base, *layout, "--save", half, "--exit-interval", "10"]},
        f"{name}-second": {"argv": [*base, *layout, "--save", half, "--load", half]},
    }


@pytest.fixture(scope="module")
def resumed(workplace: Path, tmp_path_factory):
    """A function ranks -> (folder of checkpoints, runs)."""
    done: dict[int, tuple[Path, dict[str, Run]]] = {}

    def get(ranks: int) -> tuple[Path, dict[str, Run]]:
        if ranks not in done:
            folder = tmp_path_factory.mktemp(f"resumed_{ranks}")
            plan: dict = {}
            for name, (size, layout) in SAME_LAYOUT.items():
                if size == ranks:
                    plan |= resume_plan(name, ranks, layout, with_dropout_and_evaluation(), folder)
            done[ranks] = folder, several(folder / "logs", ranks, plan, cwd=workplace)
        return done[ranks]

    return get


def rows(run: Run) -> list[dict]:
    assert run.status == 0, run.console
    return [{key: value for key, value in row.items() if key not in TIMES} for row in run.rows]


def everything_in(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a checkpoint: weights, masters, Adam's moments."""
    source = open_checkpoint(checkpoint)
    out = {}
    for key in source.keys():  # noqa: SIM118
        info = source.info(key)
        out[key] = np.empty(info.shape, np.float32)
        source.read_into(key, [(0, n) for n in info.shape], out[key])
    return out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "tp2pp2" else []) for name in SAME_LAYOUT]
)
def test_resuming_is_bitwise(name: str, resumed):
    """Dropout on, evaluations between, saving in the middle of the one run and not of the other."""
    folder, runs = resumed(SAME_LAYOUT[name][0])
    whole, first, second = (rows(runs[f"{name}-{part}"]) for part in ("whole", "first", "second"))
    assert [row["iteration"] for row in first if "split" not in row] == list(range(1, 11))
    assert first + second == whole  # every number equal, not almost
    assert [row["iteration"] for row in whole if "split" in row] == [5, 10, 15, 20]
    one, other = (everything_in(folder / f"{name}_{part}" / "iter_0000020") for part in ("whole", "half"))
    assert one.keys() == other.keys()
    assert sum("@exp_avg" in key for key in one) * 3 == 2 * len(one)  # a weight and two moments each
    assert [key for key in one if not np.array_equal(one[key], other[key])] == []
    common = [dict(open_checkpoint(folder / f"{name}_{part}" / "iter_0000020").common) for part in ("whole", "half")]
    for key in ("opt_param_scheduler", "adam_step", "rng", "consumed_train_samples", "consumed_valid_samples"):
        assert common[0][key] == common[1][key], key


def test_another_layout_goes_on_within_rounding(workplace: Path, tmp_path):
    """Saved by two tensor parallel ranks after 10 iterations, continued in five layouts."""
    base, half = replaced(), str(tmp_path / "half")
    saved = {"save": {"argv": [*base, *SAME_LAYOUT["tp2sp"][1], "--save", half, "--exit-interval", "10"]}}
    go_on = {
        ranks: {
            name: {"argv": [*base, *layout, "--load", half]}
            for name, (size, layout) in SAME_LAYOUT.items() if size == ranks
        }
        for ranks in (1, 2)
    }  # fmt: skip
    two = several(tmp_path / "two", 2, {**saved, **go_on[2]}, cwd=workplace)
    one = several(tmp_path / "one", 1, {"straight": {"argv": base}, **go_on[1]}, cwd=workplace)
    straight = one["straight"].steps
    for name in ("one", "tp2sp", "pp2vpp2", "cp2", "dp2distopt"):
        run = {**two, **one}[name]
        assert run.status == 0, run.console
        assert sorted(run.steps) == list(range(11, 21))
        for iteration, row in run.steps.items():
            for key in ("loss", "grad_norm"):
                assert abs(row[key] / straight[iteration][key] - 1) < TOLERANCE, (name, iteration, key)
