"""Experts in Megatron's checkpoints: three specifications of the same weights, and the ranks that hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.checkpoint.megatron.experts import GROUPED, SEQUENTIAL, TE_GROUPED, ExpertGrid, is_buffer, is_expert
from parallel_core.checkpoint.megatron.names import canonical_name, num_stacked_parts, tensor_parallel_dim
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.checkpoint.source import Blob, TensorInfo
from parallel_core.convert.cli import main
from parallel_core.convert.comparison import compare
from parallel_core.errors import CheckpointError

E, H, F = 4, 6, 8
PREFIX = "decoder.layers.3.mlp.experts"
ARGS = {"num_experts": E, "hidden_size": H, "swiglu": True, "tensor_model_parallel_size": 2}


def blob(path: Path, values: np.ndarray) -> Blob:
    """Return an array in a file of its own."""
    file = path / f"{len(list(path.iterdir()))}.bin"
    file.write_bytes(np.ascontiguousarray(values, np.float32).tobytes())
    return Blob.contiguous(file, 0, "float32", values.shape)


def stored(spec: str, fc1: np.ndarray, fc2: np.ndarray, path: Path) -> dict[str, Blob]:
    """Return one rank's experts by the names of a specification; fc1 [own, rows, H], fc2 [own, H, columns]."""
    own = len(fc1)
    if spec == "GroupedMLP":
        first, second = fc1.transpose(0, 2, 1), fc2.transpose(0, 2, 1)
        return {
            f"{PREFIX}.weight1": blob(path, np.ascontiguousarray(first).reshape(H, -1)),
            f"{PREFIX}.weight2": blob(path, np.ascontiguousarray(second).reshape(-1, H)),
        }
    name = f"{PREFIX}.local_experts.{{0}}.linear_fc{{1}}.weight"
    if spec == "TEGroupedMLP":
        name = f"{PREFIX}.linear_fc{{1}}.weight{{0}}"
    both = [(name.format(i, k), value[i]) for i in range(own) for k, value in ((1, fc1), (2, fc2))]
    return {key: blob(path, value) for key, value in both}


@pytest.mark.parametrize("spec", ["SequentialMLP", "TEGroupedMLP", "GroupedMLP"])
@pytest.mark.parametrize(("ep", "etp"), [(1, 2), (2, 2), (2, 1), (4, 1)])
def test_every_specification_gives_the_same_tensors(spec, ep, etp, tmp_path):
    rng = np.random.default_rng(0)
    whole = {
        "linear_fc1.weight": rng.standard_normal((E, 2 * F, H)).astype(np.float32),
        "linear_fc2.weight": rng.standard_normal((E, H, F)).astype(np.float32),
    }
    grid = ExpertGrid.of({**ARGS, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}, "here")
    got = {name: np.full(value.shape, np.nan, np.float32) for name, value in whole.items()}
    own, part = E // ep, F // etp
    for ep_rank in range(ep):
        for rank in range(etp):
            mine, columns = slice(ep_rank * own, (ep_rank + 1) * own), slice(rank * part, (rank + 1) * part)
            gates, ups = np.split(whole["linear_fc1.weight"][mine], 2, 1)
            fc1 = np.concatenate([gates[:, columns], ups[:, columns]], 1)
            for name, array in stored(spec, fc1, whole["linear_fc2.weight"][mine][:, :, columns], tmp_path).items():
                assert is_expert(name) and canonical_name(name) == name
                for key, number, matrix in grid.parts(name, array, ep_rank):
                    short = key.removeprefix(f"{PREFIX}.experts.")
                    info, pieces = grid.place(key, matrix, number, rank)
                    assert info.shape == whole[short].shape
                    for piece in pieces:
                        out = np.empty(piece.shape, np.float32)
                        piece.blob.read_into(out)
                        there = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape))
                        assert np.isnan(got[short][there]).all()
                        got[short][there] = out
    for name, value in whole.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("module", [SEQUENTIAL, TE_GROUPED, GROUPED])
@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 2), (4, 1)])
def test_parts_of_flat_buffers_find_their_experts(module, ep, etp, tmp_path):
    """Whatever a rank stores, cut anywhere: each element belongs where the rank's part of all experts has it."""
    rng = np.random.default_rng(ep)
    args = {**ARGS, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    grid = replace(ExpertGrid.of(args, "here"), module=module)
    names = [f"{PREFIX}.experts.linear_fc{which}.weight" for which in (1, 2)]
    shapes = (E, 2 * F, H), (E, H, F)
    whole = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, shapes)}
    infos = {name: TensorInfo(value.shape, "float32") for name, value in whole.items()}
    got = {name: np.full(value.shape, np.nan, np.float32) for name, value in whole.items()}
    for ep_rank in range(ep):
        for rank in range(etp):
            for tensor in grid.stored(infos, names):
                info = infos[tensor.canonical]
                part = grid.shard(tensor, info, ep_rank, rank, "float32").take(whole[tensor.canonical])
                flat = grid.arranged(tensor, part).reshape(-1)
                cuts = sorted({0, flat.size, *rng.integers(0, flat.size, 3).tolist()})
                for first, stop in zip(cuts, cuts[1:]):
                    stored = blob(tmp_path, flat[first:stop])
                    for piece in grid.flat_pieces(tensor, info, ep_rank, rank, stored, first):
                        out = np.empty(piece.shape, np.float32)
                        piece.blob.read_into(out)
                        target = got[tensor.canonical][tuple(slice(*span) for span in piece.globe)]
                        assert np.isnan(target).all()
                        target[...] = out
    for name, value in whole.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_an_optimizer_of_experts_in_flat_buckets_is_what_it_is_by_parameter():
    """Four ranks of Megatron's own (tensor, expert and data parallel size 2) saved one state in both forms."""
    path = Path(__file__).resolve().parents[2] / "golden" / "checkpoint" / "experts"
    buckets = open_checkpoint(find_checkpoint(path / "ckpt_torch_dist_tp2ep2distopt"))
    by_parameter = open_checkpoint(find_checkpoint(path / "by_parameter"))
    assert buckets.optimizer_dialect == "dp_reshardable"
    moments = [key for key in by_parameter.keys() if ".experts.experts." in key and "@exp_avg" in key]  # noqa: SIM118
    result = compare(buckets, by_parameter)
    assert len(moments) == 4 and result.same, result.text()


def test_which_ranks_there_are():
    """With tensor and expert parallel size 2 and whole experts on two ranks, each is one of both."""
    grid = ExpertGrid.of({**ARGS, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, "here")
    assert [grid.etp_rank(tp, ep) for tp, ep in ((0, 0), (0, 1), (1, 0), (1, 1))] == [0, None, None, 0]
    four = ExpertGrid.of({**ARGS, "expert_model_parallel_size": 2}, "here")
    assert [four.etp_rank(tp, ep) for tp, ep in ((0, 0), (0, 1), (1, 0), (1, 1))] == [0, 0, 1, 1]


def test_names_of_routers_and_shared_experts():
    routers = ("router.weight", "router.expert_bias")
    for rest in (*routers, "shared_experts.linear_fc1.weight", "shared_experts.gate_weight"):
        assert canonical_name(f"module.decoder.layers.0.mlp.{rest}") == f"decoder.layers.0.mlp.{rest}"
    assert is_buffer("decoder.layers.0.mlp.router.expert_bias") and not is_expert("decoder.layers.0.mlp.router.weight")
    shared = "decoder.layers.0.mlp.shared_experts.linear_fc{}.weight"
    assert tensor_parallel_dim(shared.format(1)) == 0 and tensor_parallel_dim(shared.format(2)) == 1
    assert num_stacked_parts(shared.format(1), gated=True) == 2
    assert tensor_parallel_dim("decoder.layers.0.mlp.router.weight") is None
    assert canonical_name("decoder.layers.0.mlp.experts.weight3") is None


def test_what_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match="4 experts cannot be shared out to 3 ranks"):
        ExpertGrid.of({**ARGS, "expert_model_parallel_size": 3}, "here")
    grid = ExpertGrid.of(ARGS, "here")
    with pytest.raises(CheckpointError, match="no 4 experts of width 6"):
        list(grid.parts(f"{PREFIX}.weight1", blob(tmp_path, np.zeros((5, 8))), 0))
    matrix = blob(tmp_path, np.zeros((F, H)))
    with pytest.raises(CheckpointError, match="expert 4 of 4"):
        grid.place(f"{PREFIX}.experts.linear_fc1.weight", matrix, 4, 0)


GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "parity" / "moe_mixtral" / "ckpt_torch_ep2"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("native")
    assert main(["--load", str(GOLDEN), "--save", str(path), "--quiet"]) == 0
    return path


def written(native: Path, path: Path, words: str) -> Path:
    assert main(["--to", "megatron", "--load", str(native), "--save", str(path), "--quiet", *words.split()]) == 0
    return path / "iter_0000010"


DISTRIBUTED, STAGES = "--target-use-distributed-optimizer", "--target-pipeline-parallel-size 2"


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ("--target-format torch_dist", ""),
        ("--target-expert-model-parallel-size 2", "00_000 00_001"),
        (f"--target-tensor-parallel-size 2 {STAGES} --target-expert-model-parallel-size 1 {DISTRIBUTED}",
         "00_000 00_001 01_000 01_001"),
        (f"--target-expert-model-parallel-size 2 --target-tensor-parallel-size 2 {DISTRIBUTED}",
         "00_000 00_001 01_000 01_001"),
        ("--target-expert-model-parallel-size 4 --target-tensor-parallel-size 2 --target-expert-tensor-parallel-size 1 "
         f"--target-moe-grouped-gemm {DISTRIBUTED}", "00_000 00_002 01_001 01_003"),
        ("--target-tensor-parallel-size 2 --target-expert-model-parallel-size 2 --target-moe-grouped-gemm "
         "--target-transformer-impl transformer_engine", "00_000 00_001 01_000 01_001"),
        (f"{STAGES} --target-expert-model-parallel-size 2 --target-virtual-pipeline-parallel-size 2 "
         f"--target-moe-grouped-gemm --target-moe-use-legacy-grouped-gemm {DISTRIBUTED}",
         "00_000_000 00_000_001 00_001_000 00_001_001"),
    ],
)  # fmt: skip
def test_megatrons_experts_there_and_back(native: Path, tmp_path: Path, words: str, files: str):
    """From two ranks of experts to this project's format, and on to a layout and a specification of Megatron's."""
    path = written(native, tmp_path / "megatron", words)
    assert " ".join(sorted(p.name.removeprefix("mp_rank_") for p in path.glob("mp_rank_*"))) == files
    result = compare(open_checkpoint(find_checkpoint(GOLDEN)), open_checkpoint(path))
    padding = [line for line in result.settings if line.startswith("padded_vocab_size")]
    assert result.same and result.settings == padding, result.text()


def test_a_file_is_as_megatron_writes_it(native: Path, tmp_path: Path):
    """Names in Megatron's order, and two optimizers whose parameters have Megatron's numbers."""
    path = written(native, tmp_path, "--target-expert-model-parallel-size 2")
    for rank in ("mp_rank_00_000", "mp_rank_00_001"):
        theirs, ours = (load_torch_zip(p / rank / "model_optim_rng.pt") for p in (find_checkpoint(GOLDEN), path))
        assert list(ours["model"]) == list(theirs["model"])
        for mine, megatrons in zip(ours["optimizer"], theirs["optimizer"], strict=True):
            groups = [[(g["is_expert_parallel"], g["wd_mult"], list(g["params"])) for g in optimizer["param_groups"]]
                      for optimizer in (mine, megatrons)]  # fmt: skip
            assert groups[0] == groups[1] and mine["state"].keys() == megatrons["state"].keys()
            for number, state in megatrons["state"].items():
                moment = mine["state"][number]["exp_avg"].blob.read()
                np.testing.assert_array_equal(moment, state["exp_avg"].blob.read(), err_msg=str(number))


def test_the_experts_buffers_are_as_long_as_megatrons(native: Path, tmp_path: Path):
    """Lengths from a run of Megatron's own with two data parallel ranks of experts, one buffer of everything else."""
    path = written(native, tmp_path, f"--target-expert-model-parallel-size 2 {DISTRIBUTED}")
    first, second = (load_torch_zip(path / f"mp_rank_00_00{ep}" / "distrib_optim.pt") for ep in (0, 1))
    assert [next(iter(part[0].values()))["numel_unpadded"] for part in first] == [83520, 147456]
    assert second[0] is None and next(iter(second[1][0].values()))["numel_unpadded"] == 147456


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--target-expert-model-parallel-size 3", "4 experts cannot be shared out to 3 ranks"),
        ("--target-expert-tensor-parallel-size 2 --target-expert-model-parallel-size 2",
         "ranks with different parts of an expert have the same file"),
    ],
)  # fmt: skip
def test_layouts_that_hold_no_experts_are_refused(native: Path, tmp_path: Path, capsys, words: str, told: str):
    assert main(["--to", "megatron", "--load", str(native), "--save", str(tmp_path / "x"), *words.split()]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "x").exists()
