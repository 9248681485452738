"""Experts in Megatron's checkpoints: three specifications of the same weights, and the ranks that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.checkpoint.megatron.experts import ExpertGrid, is_buffer, is_expert
from parallel_core.checkpoint.megatron.names import canonical_name, num_stacked_parts, tensor_parallel_dim
from parallel_core.checkpoint.source import Blob
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


def test_megatrons_experts_there_and_back(tmp_path, capsys):
    """From two ranks of experts to this project's format, to `torch_dist`, and back; `torch` is refused by name."""
    native, dist = tmp_path / "native", tmp_path / "dist"
    assert main(["--load", str(GOLDEN), "--save", str(native), "--quiet"]) == 0
    to_megatron = ["--to", "megatron", "--load", str(native), "--quiet"]
    assert main([*to_megatron, "--save", str(dist), "--target-format", "torch_dist"]) == 0
    golden, again = (open_checkpoint(find_checkpoint(path)) for path in (GOLDEN, dist))
    result = compare(golden, again)
    assert result.same and not result.settings, result.text()
    assert main([*to_megatron, "--save", str(tmp_path / "torch")]) != 0
    assert "not written in Megatron's torch format; use torch_dist" in capsys.readouterr().err
