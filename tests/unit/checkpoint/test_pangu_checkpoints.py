"""PanGu-alpha's own checkpoints, written with MindSpore's protobuf classes: whole, in slices, in older spellings."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import mindspore
import numpy as np
import pytest
from mindspore.train.checkpoint_pb2 import Checkpoint
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
from safetensors.numpy import load_file, save_file

from parallel_core.checkpoint import find_checkpoint, open_checkpoint, read_tensor
from parallel_core.checkpoint.mindspore.files import read_ckpt, tensor_message
from parallel_core.checkpoint.mindspore.writer import write_pangu
from parallel_core.config.model_keys import model_of_settings
from parallel_core.convert.cli import main
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import shard_of
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import PanguAlphaModel
from tests.helpers.mindformers_models import write
from tests.unit.transformer.test_pangu_alpha import det, golden_values

H, LAYERS, S, V, F = 8, 3, 6, 11, 32
TABLES = {
    "embedding.word_embedding.embedding_table": det("word", (V, H), 0.3),
    "embedding.position_embedding.embedding_table": det("pos", (S, H), 0.2),
    "top_query_embedding.embedding_table": det("query", (S, H), 0.25),
}


def published() -> dict[str, np.ndarray]:
    """Return the golden model's weights under the names and in the orientation of MindSpore's checkpoints."""
    p = {"layernorm.gamma": 1 + det("g", (H,), 0.1), "layernorm.beta": det("b", (H,), 0.1), **TABLES}
    for layer in ("blocks.0", "blocks.1", "top_query_layer"):
        pre = f"backbone.{layer}"
        for n in "12":
            p[f"{layer}.layernorm{n}.gamma"] = 1 + det(f"{pre}{n}g", (H,), 0.1)
            p[f"{layer}.layernorm{n}.beta"] = det(f"{pre}{n}b", (H,), 0.1)
        for d in ("dense1", "dense2", "dense3", "projection"):
            p[f"{layer}.attention.{d}.weight"] = det(pre + d, (H, H), 0.3)
            p[f"{layer}.attention.{d}.bias"] = det(f"{pre}{d}b", (H,), 0.05)
        p[f"{layer}.output.mapping.weight"] = det(f"{pre}m", (H, F), 0.3)
        p[f"{layer}.output.mapping.bias"] = det(f"{pre}mb", (F,), 0.05)
        p[f"{layer}.output.projection.weight"] = det(f"{pre}p", (F, H), 0.3)
        p[f"{layer}.output.projection.bias"] = det(f"{pre}pb", (H,), 0.05)
    return {f"backbone.{name}": value.astype(np.float32) for name, value in p.items()}


def settings(folder: Path, **more: object) -> None:
    (folder / "pangu.json").write_text(json.dumps({"num_attention_heads": 2, **more}))


def assert_golden(folder: Path) -> None:
    source = open_checkpoint(find_checkpoint(folder))
    values = golden_values()
    assert sorted(source.keys()) == sorted(values)
    for name, value in values.items():
        np.testing.assert_array_equal(read_tensor(source, name), value.astype(np.float32), err_msg=name)
    model = source.common["model_config"]
    assert (model["num_layers"], model["hidden_size"], model["hidden_act"]) == (LAYERS, H, "fast_gelu")


# ---- whole files ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("parts", "checksum"), [(1, False), (3, True)])
def test_a_merged_file_is_the_model(parts, checksum, tmp_path):
    extra = {
        "adam_m.backbone.layernorm.gamma": np.zeros(H, np.float32), "global_step": np.array([7], np.int32),
        "backbone.blocks.0.attention.key_past": np.zeros((1, 2, 4, 6), np.float16),
    }  # fmt: skip
    write(tmp_path / "pangu.ckpt", {**published(), **extra}, parts, checksum)
    settings(tmp_path)
    assert_golden(tmp_path)


def test_tables_may_come_as_npy_files_and_stand_over_those_in_the_file(tmp_path):
    weights = published()
    kept = {name: value for name, value in weights.items() if name.removeprefix("backbone.") not in TABLES}
    write(tmp_path / "pangu.ckpt", {**kept, "backbone.word_embedding_table": np.zeros((V, H), np.float32)})
    for name in TABLES:
        np.save(tmp_path / f"{name.split('.')[-2]}.npy", weights[f"backbone.{name}"])
    settings(tmp_path)
    assert_golden(tmp_path)
    (tmp_path / "position_embedding.npy").unlink()
    with pytest.raises(CheckpointError, match=r"is in no file, nor is position_embedding.npy"):
        open_checkpoint(tmp_path)


def test_the_first_implementations_names_are_read(tmp_path):
    """It calls the query layer a block like the others and matrices `mapping_weight`."""
    renamed = {}
    for name, value in published().items():
        name = name.replace("top_query_layer", f"blocks.{LAYERS - 1}")
        for module in (".projection.", ".mapping."):
            name = name.replace(f"{module}weight", f"{module}mapping_weight").replace(
                f"{module}bias", f"{module}mapping_bias"
            )
        renamed[name] = value
    assert any("mapping_weight" in name for name in renamed)
    write(tmp_path / "pangu.ckpt", renamed)
    settings(tmp_path)
    assert_golden(tmp_path)


# ---- slices ---------------------------------------------------------------------------------------------------------
def cut(
    weights: dict[str, np.ndarray], stages: int, dp: int, mp: int, shard: int
) -> tuple[list[dict[str, np.ndarray]], ParallelStrategyMap]:
    """Cut a model as a static-graph run of stages x dp x mp ranks with optimizer shards over dp does.

    Args:
        weights: whole tensors.
        stages: pipeline stages.
        dp: data parallel ranks.
        mp: model parallel ranks.
        shard: optimizer shards of each slice, 1 for none; -1: over all of dp, as the strategy says "as many as fit".
    """
    count, strategy = dp * mp, ParallelStrategyMap(current_stage=0)
    files: list[dict[str, np.ndarray]] = [{} for _ in range(stages * count)]
    for name, value in weights.items():
        layer = name.removeprefix("backbone.").split(".")
        number = int(layer[1]) if layer[0] == "blocks" else LAYERS - 1
        stage = min(number * stages // LAYERS, stages - 1)
        dims = [-1] * value.ndim
        if ".dense" in name or name.endswith("mapping.bias"):
            dims[0] = 0  # rows over mp
        elif name.endswith(("attention.projection.weight", "output.projection.weight")):
            dims[0] = 0
        elif name.endswith("mapping.weight"):
            dims[1] = 0
        rows = value.shape[0] // (mp if dims[0] == 0 else 1)
        shards = dp if shard == -1 else shard
        step = mp if shards > 1 and rows % shards == 0 else 0
        if layer[0] in ("embedding", "top_query_embedding"):
            step = 0
        item = strategy.parallel_layout_item.add()
        item.param_name = name
        layouts = item.parallel_layouts
        layouts.dev_matrix.add().dim.extend([dp, mp])
        layouts.tensor_map.add().dim.extend(dims)
        layouts.field = 0
        layouts.opt_weight_shard_step = step
        layouts.opt_weight_shard_size = (shard if shard > 0 else -1) if step else 0
        for r in range(count):
            d, m = divmod(r, mp)
            part = value
            for dim, device in enumerate(dims):
                if device == 0:
                    part = np.split(part, mp, dim)[m]
            if step:
                part = np.split(part, shards)[d % shards]
            files[stage * count + r][name] = np.ascontiguousarray(part)
    return files, strategy


SHAPES = [
    (1, 1, 1, 1), (1, 1, 2, 1), (1, 2, 2, 2), (1, 4, 2, 2), (1, 4, 2, -1), (3, 1, 2, 1), (2, 2, 1, -1), (3, 2, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "dp", "mp", "shard"), SHAPES)
def test_slices_are_merged_as_the_strategy_says(stages, dp, mp, shard, tmp_path):
    files, strategy = cut(published(), stages, dp, mp, shard)
    for rank, tensors in enumerate(files):
        write(tmp_path / f"filerted_{rank}.ckpt", tensors)
    (tmp_path / "strategy.ckpt").write_bytes(strategy.SerializeToString())
    settings(tmp_path)
    assert_golden(tmp_path)


@pytest.mark.parametrize("name", ["filerted", "filtered", "filitered"])
def test_slices_are_read_whichever_way_filtered_is_spelled(name, tmp_path):
    files, strategy = cut(published(), 1, 1, 2, 1)
    for rank, tensors in enumerate(files):
        write(tmp_path / f"{name}_{rank}.ckpt", tensors)
    (tmp_path / "strategy.ckpt").write_bytes(strategy.SerializeToString())
    settings(tmp_path)
    assert_golden(tmp_path)


def test_slices_may_lie_in_a_folder_for_each_rank(tmp_path):
    files, strategy = cut(published(), 1, 2, 2, 2)
    for rank, tensors in enumerate(files):
        write(tmp_path / f"rank_{rank}" / f"pangu{rank}-1_2.ckpt", tensors)
    (tmp_path / "strategy.ckpt").write_bytes(strategy.SerializeToString())
    settings(tmp_path)
    assert_golden(tmp_path)
    (tmp_path / "rank_3" / "pangu3-1_4.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="are both rank 3's; leave one"):
        open_checkpoint(tmp_path)


def test_a_missing_slice_is_named_with_what_needs_it(tmp_path):
    files, strategy = cut(published(), 1, 2, 2, 2)
    for rank, tensors in enumerate(files):
        write(tmp_path / f"filerted_{rank}.ckpt", tensors)
    (tmp_path / "strategy.ckpt").write_bytes(strategy.SerializeToString())
    settings(tmp_path)
    (tmp_path / "filerted_3.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"backbone\.blocks\.\S+ needs the slice of rank 3, which is in no file"):
        open_checkpoint(tmp_path)
    write(tmp_path / "filerted_3.ckpt", {name: value.astype(np.float16) for name, value in files[3].items()})
    with pytest.raises(CheckpointError, match=r"has a slice of shape \[\d+.*\] \(float16\) at rank 3"):
        open_checkpoint(tmp_path)
    (tmp_path / "strategy.ckpt").unlink()
    with pytest.raises(CheckpointError, match="slices of 4 ranks and no strategy.ckpt"):
        open_checkpoint(tmp_path)


def test_a_wrong_model_in_slices_is_named(tmp_path):
    weights = published()
    del weights["backbone.blocks.1.attention.dense2.bias"]
    write(tmp_path / "pangu.ckpt", weights)
    settings(tmp_path)
    with pytest.raises(CheckpointError, match=r"backbone\.blocks\.1\.attention\.dense2\.bias is in no file"):
        open_checkpoint(tmp_path)
    write(tmp_path / "pangu.ckpt", {**published(), "backbone.blocks.1.output.router.dense.weight": weights[
        "backbone.embedding.position_embedding.embedding_table"]})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"blocks.1.output.ffn.mapping.weight is in no file"):
        open_checkpoint(tmp_path)
    strange = {"backbone.blocks.1.attention.rotary": weights["backbone.layernorm.beta"]}
    write(tmp_path / "pangu.ckpt", {**published(), **strange})
    with pytest.raises(CheckpointError, match="blocks.1.attention.rotary"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("dp", "mp"), [(1, 1), (2, 1), (2, 2)])
def test_experts_are_read_whole_and_in_slices(dp, mp, tmp_path):
    """Cut over experts and over their width; the query layer has an MLP."""
    weights, draws, E, W = published(), np.random.default_rng(0), 4, 6
    ours = {}
    for layer in (0, 1):
        there, here = f"backbone.blocks.{layer}.output", f"decoder.layers.{layer}.mlp"
        for module in ("mapping", "projection"):
            for kind in ("weight", "bias"):
                del weights[f"{there}.{module}.{kind}"]
        for theirs, name, shape in (("mapping", "linear_fc1", (H, W)), ("projection", "linear_fc2", (W, H))):
            matrix = draws.standard_normal((E, *shape)).astype(np.float32)
            bias = draws.standard_normal((1, E, 1, shape[1])).astype(np.float32)
            weights |= {f"{there}.ffn.{theirs}.weight": matrix, f"{there}.ffn.{theirs}.bias": bias}
            ours |= {f"{here}.experts.experts.{name}.weight": matrix.transpose(0, 2, 1),
                     f"{here}.experts.experts.{name}.bias": bias.reshape(E, shape[1])}  # fmt: skip
        ours[f"{here}.router.weight"] = draws.standard_normal((E, H)).astype(np.float32)
        weights[f"{there}.router.dense.weight"] = ours[f"{here}.router.weight"]
    cuts = {"ffn.mapping.weight": [1, -1, 0], "ffn.mapping.bias": [-1, 1, -1, 0], "ffn.projection.weight": [1, 0, -1],
            "ffn.projection.bias": [-1, 1, -1, -1]}  # fmt: skip
    strategy, files = ParallelStrategyMap(current_stage=0), [{} for _ in range(dp * mp)]
    for name, value in weights.items():
        dims = next((cut for end, cut in cuts.items() if name.endswith(end)), [-1] * value.ndim)
        item = strategy.parallel_layout_item.add(param_name=name)
        item.parallel_layouts.dev_matrix.add().dim.extend([dp, mp])
        item.parallel_layouts.tensor_map.add().dim.extend(dims)
        item.parallel_layouts.field = item.parallel_layouts.opt_weight_shard_step = 0
        item.parallel_layouts.opt_weight_shard_size = 0
        for rank in range(dp * mp):
            part = value
            for dim, device in enumerate(dims):
                if device >= 0:
                    part = np.split(part, (mp, dp)[device], dim)[(rank % mp, rank // mp)[device]]
            files[rank][name] = np.ascontiguousarray(part)
    for rank, tensors in enumerate(files):
        write(tmp_path / f"pangu_{rank}.ckpt", tensors)
    (tmp_path / "strategy.ckpt").write_bytes(strategy.SerializeToString())
    settings(tmp_path, num_experts_chosen=2)
    source = open_checkpoint(tmp_path)
    for name, value in ours.items():
        np.testing.assert_array_equal(read_tensor(source, name), value, err_msg=name)
    model = model_of_settings(source.common["model_config"])
    moe = model.moe
    assert (moe.num_experts, moe.moe_layer_freq, moe.moe_ffn_hidden_size) == (E, (1, 1, 0), W)
    assert moe.moe_router_rounds and moe.moe_router_topk == 2
    names = {shard_of(p).name for p in PanguAlphaModel(ModelStage(model)).trainable_params()}
    assert names == set(source.keys())
    assert main(["--load", str(tmp_path), "--save", str(tmp_path / "m"), "--to", "mindspore", "--quiet"]) == 0
    loaded = mindspore.load_checkpoint(str(tmp_path / "m/pangu.ckpt"))
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(loaded[name].asnumpy(), value, err_msg=name)
    assert main(["verify", str(tmp_path), str(tmp_path / "m")]) == 0
    source.common["model_config"]["moe_router_rounds"] = False
    with pytest.raises(CheckpointError, match="moe_router_rounds=False, True there"):
        write_pangu(source, tmp_path, lambda count: None)


def test_heads_that_no_file_tells_are_asked_for(tmp_path):
    write(tmp_path / "pangu.ckpt", published())
    with pytest.raises(CheckpointError, match=r"of hidden size 8 the files do not say how many heads"):
        open_checkpoint(tmp_path)
    settings(tmp_path, top_query_layer="norm_after", hidden_act="gelu_tanh")
    model = open_checkpoint(tmp_path).common["model_config"]
    assert (model["top_query_layer"], model["hidden_act"]) == ("norm_after", "gelu_tanh")
    settings(tmp_path, hidden_act="relu")
    with pytest.raises(CheckpointError, match="hidden_act"):
        open_checkpoint(tmp_path)


# ---- damage ---------------------------------------------------------------------------------------------------------
def test_every_flipped_bit_of_a_file_with_a_checksum_is_found(tmp_path):
    file = tmp_path / "pangu.ckpt"
    write(file, published(), checksum=True)
    settings(tmp_path)
    good = file.read_bytes()
    draws = random.Random(0)
    for _ in range(60):
        bad = bytearray(good)
        bad[draws.randrange(len(bad) - 17)] ^= 1 << draws.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_cut_and_foreign_bytes_are_named_errors(tmp_path):
    file = tmp_path / "pangu.ckpt"
    write(file, published())
    settings(tmp_path)
    good, draws = file.read_bytes(), random.Random(1)
    for _ in range(150):
        bad = bytearray(good[: draws.randrange(len(good))] if draws.random() < 0.3 else good)
        for _ in range(draws.randrange(1, 4)):
            if bad:
                bad[draws.randrange(len(bad))] = draws.randrange(256)
        file.write_bytes(bad)
        try:
            source = open_checkpoint(tmp_path)
        except CheckpointError as error:
            assert str(error).isprintable() or "\n" in str(error)
        else:  # a number inside a tensor: such a file has nothing to compare with
            assert math.prod(source.info("decoder.final_layernorm.bias").shape) == H
    for strange in (b"", b"\x08", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", bytes(200)):
        file.write_bytes(strange)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_uneven_cuts_are_refused_by_name(tmp_path):
    files, strategy = cut(published(), 1, 1, 2, 1)
    for rank, tensors in enumerate(files):
        write(tmp_path / f"filerted_{rank}.ckpt", tensors)
    settings(tmp_path)
    strategy.parallel_layout_item[3].parallel_layouts.field = 2
    (tmp_path / "strategy.ckpt").write_bytes(strategy.SerializeToString())
    with pytest.raises(CheckpointError, match="is cut unevenly"):
        open_checkpoint(tmp_path)


# ---- there and back -------------------------------------------------------------------------------------------------
def test_it_converts_to_native_by_the_command(tmp_path, capsys):
    files, strategy = cut(published(), 1, 2, 2, 2)
    for rank, tensors in enumerate(files):
        write(tmp_path / "slices" / f"filerted_{rank}.ckpt", tensors)
    (tmp_path / "slices/strategy.ckpt").write_bytes(strategy.SerializeToString())
    settings(tmp_path / "slices")
    assert main(["--load", str(tmp_path / "slices"), "--save", str(tmp_path / "native"), "--quiet"]) == 0
    assert_golden(tmp_path / "native")
    assert main(["verify", str(tmp_path / "slices"), str(tmp_path / "native")]) == 0
    assert main(["--load", str(tmp_path / "native"), "--save", str(tmp_path / "m"), "--to", "megatron", "--quiet"]) == 2
    assert "5 tensors Megatron does not have" in capsys.readouterr().err


def test_a_model_goes_back_into_the_file_that_mindspore_loads(tmp_path, capsys):
    """Names, orientation, types and bytes are the released ones, for MindSpore's own reader too."""
    weights = published()
    weights["backbone.layernorm.beta"] = weights["backbone.layernorm.beta"].astype(np.float16)
    write(tmp_path / "ms/pangu.ckpt", weights)
    settings(tmp_path / "ms", top_query_layer="norm_after", layernorm_epsilon=1e-6)
    (tmp_path / "ms/vocab.model").write_bytes(b"pieces")
    assert main(["--load", str(tmp_path / "ms"), "--save", str(tmp_path / "native"), "--quiet"]) == 0
    back = ["--to", "mindspore", "--quiet"]
    for source, result in (("native", "back"), ("ms", "same")):
        assert main(["--load", str(tmp_path / source), "--save", str(tmp_path / result), *back]) == 0
        message = Checkpoint.FromString((tmp_path / result / "pangu.ckpt").read_bytes())
        assert {value.tag for value in message.value} == weights.keys()
        loaded = mindspore.load_checkpoint(str(tmp_path / result / "pangu.ckpt"))
        for name, value in weights.items():
            np.testing.assert_array_equal(loaded[name].asnumpy(), value, err_msg=name)
            assert loaded[name].asnumpy().dtype == value.dtype
    assert main(["verify", str(tmp_path / "ms"), str(tmp_path / "same")]) == 0
    models = [open_checkpoint(tmp_path / name).common["model_config"] for name in ("ms", "same")]
    assert models[0] == models[1] and models[0]["top_query_layer"] == "norm_after"
    assert (tmp_path / "same/vocab.model").read_bytes() == b"pieces"
    capsys.readouterr()


def test_large_tensors_go_into_parts_as_mindspores_do(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    data = values.reshape(-1).view(np.uint8).data
    parts = list(tensor_message("w", (4, 6), "float32", data, part_bytes=40))
    assert len(parts) == 3
    (tmp_path / "a.ckpt").write_bytes(b"".join(head + bytes(part) for head, part in parts))
    np.testing.assert_array_equal(mindspore.load_checkpoint(str(tmp_path / "a.ckpt"))["w"].asnumpy(), values)
    out = np.empty((4, 6), np.float32)
    read_ckpt(tmp_path / "a.ckpt")["w"].blob().read_into(out)
    np.testing.assert_array_equal(out, values)


def test_what_the_form_cannot_hold_is_named(tmp_path):
    write(tmp_path / "ms/pangu.ckpt", published())
    settings(tmp_path / "ms")
    for name, value, said in (
        ("hidden_act", "relu", "hidden_act='relu', 'fast_gelu' there"),
        ("softmax_scale", 0.5, "softmax_scale=0.5, 0.0 there"),
        ("top_query_layer", "none", "the model has no query layer"),
    ):
        source = open_checkpoint(tmp_path / "ms")
        source.common["model_config"][name] = value
        with pytest.raises(CheckpointError, match=said):
            write_pangu(source, tmp_path, lambda count: None)


def hugging_face_form() -> dict[str, np.ndarray]:
    """Return the golden model under the port's names; it keeps every matrix [out, in], the query layer as the last."""
    found = {"transformer.ln_f.weight": "layernorm.gamma", "transformer.ln_f.bias": "layernorm.beta"}
    tables = ("embedding.word_embedding", "embedding.position_embedding", "top_query_embedding")
    for short, long in zip(("wte", "wpe", "wqe"), tables):
        found[f"transformer.{short}.weight"] = f"{long}.embedding_table"
    for i, layer in enumerate(("blocks.0", "blocks.1", "top_query_layer")):
        here = f"transformer.h.{i}"
        for n in "12":
            for theirs, ours in (("weight", "gamma"), ("bias", "beta")):
                found[f"{here}.ln_{n}.{theirs}"] = f"{layer}.layernorm{n}.{ours}"
        for theirs, ours in (("attn.q_proj", "attention.dense1"), ("attn.k_proj", "attention.dense2"),
                             ("attn.v_proj", "attention.dense3"), ("attn.c_proj", "attention.projection"),
                             ("mlp.c_fc", "output.mapping"), ("mlp.c_proj", "output.projection")):  # fmt: skip
            found |= {f"{here}.{theirs}.{kind}": f"{layer}.{ours}.{kind}" for kind in ("weight", "bias")}
    weights = published()
    values = {name: weights[f"backbone.{theirs}"] for name, theirs in found.items()}
    turned = ("c_proj.weight", "c_fc.weight")
    return {name: value.T if name.endswith(turned) else value for name, value in values.items()}


def test_the_hugging_face_port_is_read_and_written(tmp_path):
    write(tmp_path / "ms/pangu.ckpt", published())
    settings(tmp_path / "ms")
    (tmp_path / "ms/vocab.model").write_bytes(b"pieces")
    assert main(["--load", str(tmp_path / "ms"), "--save", str(tmp_path / "hf"), "--to", "hf", "--quiet"]) == 0
    stored, want = load_file(tmp_path / "hf/model.safetensors"), hugging_face_form()
    assert stored.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(stored[name], value, err_msg=name)
    told = json.loads((tmp_path / "hf/config.json").read_text())
    assert (told["model_type"], told["activation_function"]) == ("gpt_pangu", "quick_gelu")
    assert (told["num_layers"], told["num_heads"], told["architectures"]) == (LAYERS, 2, ["GPTPanguForCausalLM"])
    assert (tmp_path / "hf/vocab.model").read_bytes() == b"pieces"
    assert_golden(tmp_path / "hf")
    assert main(["verify", str(tmp_path / "ms"), str(tmp_path / "hf")]) == 0


def test_the_ports_own_files_are_read_with_its_defaults_and_buffers(tmp_path):
    sizes = {"vocab_size": V, "hidden_size": H, "num_layers": LAYERS, "num_heads": 2, "max_position_embeddings": S}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_pangu", **sizes}))
    buffers = {"transformer.h.0.attn.bias": np.ones((1, 1, S, S), np.uint8), "lm_head.weight": TABLES[
        "embedding.word_embedding.embedding_table"].astype(np.float32)}  # fmt: skip
    save_file({name: np.ascontiguousarray(v) for name, v in {**hugging_face_form(), **buffers}.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    model = open_checkpoint(tmp_path).common["model_config"]
    assert (model["hidden_act"], model["top_query_layer"], model["num_layers"]) == ("gelu", "norm_before", LAYERS)
    np.testing.assert_array_equal(
        read_tensor(open_checkpoint(tmp_path), "decoder.layers.2.self_attention.linear_kv.weight"),
        golden_values()["decoder.layers.2.self_attention.linear_kv.weight"].astype(np.float32),
    )


def test_a_norm_after_the_query_layer_has_no_place_in_the_port(tmp_path, capsys):
    write(tmp_path / "ms/pangu.ckpt", published())
    settings(tmp_path / "ms", top_query_layer="norm_after")
    assert main(["--load", str(tmp_path / "ms"), "--save", str(tmp_path / "hf"), "--to", "hf", "--quiet"]) == 2
    assert "top_query_layer='norm_after'" in capsys.readouterr().err


def test_shards_of_ranks_with_other_slices_are_refused():
    from parallel_core.checkpoint.mindspore.files import Layout, StoredTensor
    from parallel_core.checkpoint.mindspore.slices import whole_parameters

    tensor = StoredTensor(Path("x"), (2, 4), "float32", ((0, 32),))
    files = {rank: {"w": tensor} for rank in range(4)}
    layout = Layout((2, 2), (1, -1), shard_step=1, shard_size=4)
    with pytest.raises(CheckpointError, match="optimizer shards of w are on ranks that hold other slices"):
        whole_parameters(files, {"w": layout}, "here")


def test_drawn_cuts_put_every_element_in_its_place(tmp_path):
    """Any device matrix and tensor map: what a rank's coordinates say it has is where it is put."""
    from parallel_core.checkpoint.mindspore.files import Layout, read_ckpt
    from parallel_core.checkpoint.mindspore.slices import whole_parameters

    draws = random.Random(2)
    for case in range(25):
        matrix = tuple(draws.choice((1, 2, 3)) for _ in range(draws.randrange(1, 4)))
        free = draws.sample(range(len(matrix)), k=min(len(matrix), draws.randrange(0, 3)))
        tensor_map = tuple((*free, -1, -1)[:2])
        parts = [1 if m < 0 else matrix[len(matrix) - 1 - m] for m in tensor_map]
        whole = np.arange(math.prod(parts) * 6, dtype=np.float32).reshape(parts[0] * 2, parts[1] * 3)
        files = {}
        for rank, coordinates in enumerate(itertools.product(*map(range, matrix))):
            part = whole
            for dim, m in enumerate(tensor_map):
                if m >= 0:
                    part = np.split(part, parts[dim], dim)[coordinates[len(matrix) - 1 - m]]
            file = tmp_path / f"{case}_{rank}.ckpt"
            write(file, {"w": np.ascontiguousarray(part)})
            files[rank] = read_ckpt(file)
        found = whole_parameters(files, {"w": Layout(matrix, tensor_map)}, "here")["w"]
        got = np.zeros_like(whole)
        for piece in found.pieces:
            piece.blob.read_into(got[tuple(slice(a, b) for a, b in piece.globe)])
        np.testing.assert_array_equal(got, whole)
