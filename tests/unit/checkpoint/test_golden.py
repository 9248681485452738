"""Checkpoints that the real Megatron-LM wrote: read, converted, re-laid-out and written back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import TensorShard, find_checkpoint, load_shards, open_checkpoint, read_tensor
from parallel_core.checkpoint.claim import claimed
from parallel_core.convert.cli import main
from parallel_core.convert.comparison import compare

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "checkpoint"
CHECKPOINTS = sorted(
    str(p.relative_to(GOLDEN)) for p in GOLDEN.glob("*/ckpt_*") if (p.parent / "params_0010.npz").exists()
)


def golden(name):
    return open_checkpoint(find_checkpoint(GOLDEN / name))


def truth(model):
    """Return Megatron's own unsharded weights and moments after iteration 10 of the run on one rank."""
    params, adam = (np.load(GOLDEN / model / f"{what}_0010.npz") for what in ("params", "adam"))
    values = {name: params[name] for name in params.files}
    values.update({name.replace("/", "@"): adam[name] for name in adam.files})
    return values


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_is_megatrons(name):
    source = golden(name)
    expected = truth(name.split("/")[0])
    if "no_optim" in name:
        expected = {key: value for key, value in expected.items() if "@" not in key}
    assert set(source.keys()) == set(expected)
    for key, value in expected.items():
        got = read_tensor(source, key)
        if "tp1pp1" in name:  # the very run the values are from
            np.testing.assert_array_equal(got, value, err_msg=key)
        else:  # another layout's run: its sums are in another order (Megatron's own spread), nothing is misplaced
            np.testing.assert_allclose(got, value, rtol=0, atol=5e-6, err_msg=key)


def test_two_formats_of_one_run_agree_bit_for_bit():
    result = compare(golden("llama/ckpt_torch_dp2distopt"), golden("llama/ckpt_torch_dist_dp2distopt"))
    assert result.same and len(result.equal) == 81 and not result.settings


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_counters_schedule_and_arguments(name):
    common = golden(name).common
    assert common["iteration"] == 10 and common["consumed_train_samples"] == 80
    assert common.get("adam_step") == (None if "no_optim" in name else 10)
    if "no_optim" not in name:
        assert common["opt_param_scheduler"]["num_steps"] == 80
        assert common["opt_param_scheduler"]["lr_decay_style"] == "cosine"
    config = common["model_config"]
    assert (config["num_layers"], config["hidden_size"], config["padded_vocab_size"], config["vocab_size"]) == (
        4,
        64,
        256,
        256,
    )
    assert config["num_query_groups"] == (2 if "llama" in name else 4)
    assert config["swiglu"] is ("llama" in name) and config["add_bias_linear"] is ("gpt2" in name)
    assert common["megatron_args"]["params_dtype"] == "float32"
    assert "no_optim" in name or len(common["rng"]["numpy"][1]) == 624


def _quiet(*arguments):
    return main([*map(str, arguments), "--quiet"])


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(
    "target",
    [
        ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2),
        (
            "--target-pipeline-parallel-size",
            2,
            "--target-virtual-pipeline-parallel-size",
            2,
            "--target-use-distributed-optimizer",
        ),
        (
            "--target-tensor-parallel-size",
            2,
            "--no-target-use-distributed-optimizer",
            "--target-transformer-impl",
            "transformer_engine",
        ),
        ("--target-pipeline-parallel-size", 2, "--target-decoder-first-pipeline-num-layers", 1),
        ("--target-format", "torch_dist"),
        (),
    ],
    ids=["tp2pp2", "pp2vpp2-distopt", "tp2-te", "uneven", "torch_dist", "same"],
)
def test_there_and_back_gives_every_tensor(tmp_path, name, target):
    extra = ("--no-optim",) if "no_optim" in name else ()
    assert _quiet("--load", GOLDEN / name, "--save", tmp_path / "native") == 0
    assert compare(golden(name), open_checkpoint(find_checkpoint(tmp_path / "native"))).same
    save = tmp_path / "megatron"
    assert _quiet("--to", "megatron", "--load", tmp_path / "native", "--save", save, *target, *extra) == 0
    again = open_checkpoint(find_checkpoint(save))
    result = compare(golden(name), again)
    assert result.same, result.text()
    assert not result.settings, result.text()
    assert _quiet("--load", save, "--save", tmp_path / "back") == 0
    assert compare(
        open_checkpoint(find_checkpoint(tmp_path / "native")), open_checkpoint(find_checkpoint(tmp_path / "back"))
    ).same


def test_megatron_loads_directly_into_a_layout():
    """tp2 of a checkpoint written by pp2 x vpp2, gated fc1 and all."""
    source = golden("llama/ckpt_torch_pp2vpp2")
    name = "decoder.layers.3.mlp.linear_fc1.weight"
    full = read_tensor(source, name)
    shard = TensorShard.split(name, full.shape, "float32", 0, 1, 2, parts=2)
    flat = shard.flat_range(100, 9000)
    arrays, _ = load_shards(source, {name: shard, f"{name}@master": flat})
    gates, ups = full[:176], full[176:]
    np.testing.assert_array_equal(arrays[name], np.concatenate([gates[88:], ups[88:]]))
    np.testing.assert_array_equal(arrays[f"{name}@master"], arrays[name].reshape(-1)[100:9000])


def test_several_processes_write_the_same(tmp_path):
    load = GOLDEN / "llama/ckpt_torch_tp2pp1"
    assert _quiet("--load", load, "--save", tmp_path / "n", "--processes", 2) == 0
    assert len(list((tmp_path / "n/iter_0000010").glob("*.safetensors"))) == 2
    assert main(["verify", str(load), str(tmp_path / "n")]) == 0


def test_verify_tells_a_difference(tmp_path, capsys):
    a, b = (GOLDEN / f"llama/ckpt_torch_{name}" for name in ("tp2pp1", "tp1pp2"))
    assert main(["verify", str(a), str(b)]) == 1
    text = capsys.readouterr().out
    assert "different:" in text and "elements, by up to" in text
    assert main(["verify", str(a), str(a)]) == 0
    assert "81 tensors equal bit for bit" in capsys.readouterr().out


def test_inspect_says_what_it_is(capsys):
    assert main(["--inspect", str(GOLDEN / "llama/ckpt_torch_dist_dp2distopt")]) == 0
    text = capsys.readouterr().out
    for part in (
        "megatron torch_dist, optimizer dp_reshardable",
        "tp1 pp1 vpp1 dp2",
        "27 parameters",
        "27 exp_avg_sq",
        "num_query_groups                     2",
        "decoder.layers.3.mlp.linear_fc1.weight",
    ):
        assert part in text


def test_nothing_is_overwritten(tmp_path, capsys):
    load = GOLDEN / "llama/ckpt_torch_tp2pp1"
    assert _quiet("--load", load, "--save", tmp_path) == 0
    assert _quiet("--load", load, "--save", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
    assert _quiet("--load", load, "--save", load) == 2


@pytest.mark.parametrize("form", ["native", "megatron"])
def test_a_conversion_into_the_directory_of_a_run_that_saves_there_is_refused(form, tmp_path, capsys):
    words = ["--load", str(GOLDEN / "llama/ckpt_torch_tp2pp1"), "--save", str(tmp_path / "ck"), "--to", form, "--quiet"]
    with claimed(tmp_path / "ck", pytest.fail):
        (tmp_path / "ck/iter_0000002.tmp-x").mkdir()  # what the run is writing
        assert main(words) == 2
        assert "belongs to a run that is still going" in capsys.readouterr().err
        assert (tmp_path / "ck/iter_0000002.tmp-x").is_dir()
    assert main(words) == 0
