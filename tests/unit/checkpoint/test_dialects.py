"""Every dialect of Megatron's formats that no golden checkpoint has, built by hand from a known model."""

from __future__ import annotations

import math
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, TensorShard, open_checkpoint, read_tensor
from parallel_core.checkpoint.dtypes import convert
from parallel_core.checkpoint.megatron.dist_writer import _metadata_pickle, _properties, _size
from parallel_core.checkpoint.megatron.flat_buffers import flat_layout
from parallel_core.checkpoint.megatron.names import canonical_name, te_fused_name
from parallel_core.checkpoint.megatron.pickle_emitter import GlobalName, Instance, torch_dtype, write_torch_zip
from parallel_core.checkpoint.megatron.placement import stages_of
from parallel_core.checkpoint.safetensors_file import StreamTensor
from parallel_core.convert.cli import main
from parallel_core.convert.comparison import compare
from parallel_core.errors import CheckpointError

H, FFN, HEADS, VOCAB, LAYERS = 8, 12, 4, 32, 4
META = "torch.distributed.checkpoint.metadata"


def model(gated=True, tied=False, bias=False, groups=2):
    """Return shapes by canonical name."""
    shapes = {"embedding.word_embeddings.weight": (VOCAB, H)}
    if bias:
        shapes["embedding.position_embeddings.weight"] = (16, H)
    for i in range(LAYERS):
        layer = {
            "input_layernorm.weight": (H,),
            "self_attention.linear_proj.weight": (H, H),
            "self_attention.linear_qkv.weight": ((HEADS + 2 * groups) * H // HEADS, H),
            "pre_mlp_layernorm.weight": (H,),
            "mlp.linear_fc1.weight": (FFN * (2 if gated else 1), H),
            "mlp.linear_fc2.weight": (H, FFN),
        }
        for name, shape in layer.items():
            shapes[f"decoder.layers.{i}.{name}"] = shape
            if bias:
                shapes[f"decoder.layers.{i}.{name[:-6]}bias"] = shape[:1]
    shapes["decoder.final_layernorm.weight"] = (H,)
    if not tied:
        shapes["output_layer.weight"] = (VOCAB, H)
    return shapes


ARGS = {
    "num_layers": LAYERS, "hidden_size": H, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
    "group_query_attention": True, "num_query_groups": 2, "padded_vocab_size": VOCAB, "swiglu": True,
    "untie_embeddings_and_output_weights": True, "normalization": "RMSNorm", "add_bias_linear": False,
    "position_embedding_type": "rope", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "use_distributed_optimizer": True, "consumed_train_samples": 7, "data_parallel_size": 2,
}  # fmt: skip


def full_state(shapes, dtype="bfloat16"):
    """Return weights, masters and moments, all different; bf16 weights are the rounded masters."""
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in shapes.items():
        master, m, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
        state[name] = convert(master, "float32", dtype)
        if dtype != "float32":
            state[f"{name}@master"] = master
        state[f"{name}@exp_avg"], state[f"{name}@exp_avg_sq"] = m, v
    return state


def save_native(root, state, dtype, config):
    shards = {key: (TensorShard.full(key.split("@")[0], value.shape, "float32" if "@" in key else dtype), value)
              for key, value in state.items()}  # fmt: skip
    writer = CheckpointWriter(root, 3, 0, 1)
    writer.begin()
    common = {"model_config": config, "adam_step": 5, "consumed_train_samples": 7,
              "opt_param_scheduler": {"num_steps": 7}, "loss_scaler": {"scale": 64.0, "growth_tracker": 3}}  # fmt: skip
    return writer.commit([writer.write_rank_file(shards)], common)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("gated", "tied", "bias"), [(True, False, False), (False, True, True)])
@pytest.mark.parametrize(
    "target",
    [
        "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-use-distributed-optimizer",
        "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-virtual-pipeline-parallel-size 2",
        "--target-pipeline-parallel-size 4 --target-use-distributed-optimizer --target-transformer-impl local",
        "--target-tensor-parallel-size 2 --target-format torch_dist",
    ],
)
def test_models_born_here_go_to_megatron_and_back(tmp_path, dtype, gated, tied, bias, target):
    shapes = model(gated, tied, bias)
    config = {"num_layers": LAYERS, "num_attention_heads": HEADS, "num_query_groups": 2, "hidden_size": H,
              "swiglu": gated, "add_bias_linear": bias, "padded_vocab_size": VOCAB,
              "position_embedding_type": "learned_absolute" if bias else "rope"}  # fmt: skip
    path = save_native(tmp_path / "n", full_state(shapes, dtype), dtype, config)
    arguments = ["--to", "megatron", "--load", str(tmp_path / "n"), "--save", str(tmp_path / "m"), *target.split()]
    assert main([*arguments, "--quiet"]) == 0
    back = open_checkpoint(tmp_path / "m" / "iter_0000003")
    result = compare(open_checkpoint(path), back)
    assert result.same and not result.settings, result.text()
    assert back.common["adam_step"] == 5 and back.common["consumed_train_samples"] == 7
    if dtype == "float16" and "torch_dist" not in target:
        assert back.common["loss_scaler"] == {"scale": 64.0, "growth_tracker": 3}


def write_dcp(path, tensors, objects, common, mcore_data=None):
    """Write a distributed checkpoint by hand: tensors = {key: (shape, tag, [(offsets, array), ...])}."""
    path.mkdir(parents=True)
    entries, records = {}, []
    with (path / "__0_0.distcp").open("wb") as handle:

        def put(key, offset, value):
            position = handle.tell()
            records.append((key, offset, "__0_0.distcp", position, write_torch_zip(handle, value)))

        for key, (shape, tag, chunks) in tensors.items():
            listed = [Instance(GlobalName(META, "ChunkStorageMetadata"),
                               {"offsets": _size(at), "sizes": _size(a.shape)}) for at, a in chunks]  # fmt: skip
            state = {"properties": _properties(tag), "size": _size(shape), "chunks": listed}
            entries[key] = Instance(GlobalName(META, "TensorStorageMetadata"), state)
            for at, array in chunks:
                put(key, at, StreamTensor.of(array, tag))
        for key, value in objects.items():
            entries[key] = Instance(GlobalName(META, "BytesStorageMetadata"), {})
            put(key, None, [value])
    data = _metadata_pickle(entries, records)
    if mcore_data:  # inject the extra attribute Megatron adds, by rebuilding the outer state
        import parallel_core.checkpoint.megatron.pickle_emitter as emitter

        extra = emitter.PickleEmitter()
        extra._emit("mcore_data")
        extra._emit(mcore_data)
        data = data[:-3] + bytes(extra._out[2:]) + data[-3:]
    (path / ".metadata").write_bytes(data)
    with (path / "common.pt").open("wb") as handle:
        write_torch_zip(handle, common)


def stacked(state, tag):
    """Return the model part of a torch_dist checkpoint: layers stacked, norms under their fused names."""
    tensors = {}
    for name, value in state.items():
        if "@" in name:
            continue
        key, shape, at, array = te_fused_name(name), value.shape, (0,) * value.ndim, value
        if key.startswith("decoder.layers."):
            _, _, layer, rest = key.split(".", 3)
            key, shape, at, array = f"decoder.layers.{rest}", (LAYERS, *shape), (int(layer), *at), value[None]
        tensors.setdefault(key, (shape, tag, []))[2].append((at, array))
    return tensors


def common_of(args, **more):
    return {"args": SimpleNamespace(**args), "checkpoint_version": 3.0, "iteration": 3, **more}


def check(path, state):
    source = open_checkpoint(path)
    assert set(source.keys()) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(read_tensor(source, key), value, err_msg=key)
    return source


def test_flattened_optimizer_of_releases_up_to_0_14(tmp_path):
    """Blocks of TP2, each cut at odd places over data parallel ranks; gated fc1 in the order g0 g1 u0 u1."""
    shapes = model()
    state = full_state(shapes)
    tensors = stacked(state, "bfloat16")
    mcore = {}
    for name in shapes:
        for kind, stored in (("master", "fp32_param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            value = state[f"{name}@{kind}"]
            grid = [1] * value.ndim
            if "linear_fc1" in name:
                grid[0] = 4
            elif "proj" in name or "fc2" in name:
                grid[1] = 2
            elif value.ndim == 2:
                grid[0] = 2
            key, lead, whole = te_fused_name(name), (), value.shape
            if key.startswith("decoder.layers."):
                _, _, layer, rest = key.split(".", 3)
                key, lead, whole = f"decoder.layers.{rest}", (int(layer),), (LAYERS, *value.shape)
            key = f"optimizer.state.{stored}.{key}"
            mcore[key] = {"nd_reformulated_orig_global_shape": tuple(whole)}
            block = tuple(n // g for n, g in zip(value.shape, grid))
            numel = math.prod(block)
            shape = (*((LAYERS,) if lead else ()), *grid, numel)
            chunks = tensors.setdefault(key, (shape, "float32", []))[2]
            for index in np.ndindex(*grid):
                region = tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, block))
                flat, cut = value[region].reshape(-1), numel // 3
                for a, b in ((0, cut), (cut, numel)):
                    if a < b:
                        part = flat[a:b].reshape((1,) * (len(shape) - 1) + (-1,))
                        chunks.append(((*lead, *index, a), np.ascontiguousarray(part)))
    optimizer = {"optimizer": {"param_groups": [{"step": 9}]}, "param_state_sharding_type": "fully_sharded_model_space"}
    write_dcp(
        tmp_path / "c", tensors, {}, common_of({**ARGS, "tensor_model_parallel_size": 2}, optimizer=optimizer), mcore
    )
    source = check(tmp_path / "c", state)
    assert source.common["adam_step"] == 9 and source.optimizer_dialect == "fully_sharded_model_space"


def local(name, value, tp, rank, gated=True):
    """Return a tensor parallel rank's part, written out by hand."""
    if "fc1" in name and gated:
        return np.concatenate([np.split(half, tp)[rank] for half in np.split(value, 2)])
    if value.ndim == 2 and ("proj" in name or "fc2" in name):
        return np.split(value, tp, 1)[rank]
    if "qkv" in name or "fc1" in name or name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return np.split(value, tp)[rank]
    return value


def flat_buffer(state, names, kind, tp, rank, fill):
    """Return a distributed optimizer's flat buffer: reverse order, every parameter at a multiple of 64."""
    parts, position = [], 0
    for name in reversed(names):
        start = -(-position // 64) * 64
        value = local(name, state[f"{name}@{kind}"], tp, rank).reshape(-1)
        parts += [np.full(start - position, fill, np.float32), value]
        position = start + value.size
    return np.concatenate(parts)


def registered(shapes, layers, first, last):
    names = list(shapes)[:1] if first else []
    per_layer = ("input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv", "pre_mlp_layernorm",
                 "mlp.linear_fc1", "mlp.linear_fc2")  # fmt: skip
    names += [f"decoder.layers.{i}.{module}.weight" for i in layers for module in per_layer]
    return names + (["decoder.final_layernorm.weight", "output_layer.weight"] if last else [])


def test_buckets_of_dp_reshardable_skip_uninitialised_gaps(tmp_path):
    state, tensors, objects = full_state(model()), None, {}
    tensors = stacked(state, "bfloat16")
    for pp in range(2):
        names = registered(model(), range(2 * pp, 2 * pp + 2), pp == 0, pp == 1)
        for tp in range(2):
            for kind, stored in (("master", "param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                flat = flat_buffer(state, names, kind, 2, tp, np.nan)
                key = (f"optimizer.distributed.dp_group_idx_{pp * 2 + tp}.gbuf_idx_0.dtype_(torch.bfloat16, "
                       f"torch.float32).bucket_idx_0.{stored}")  # fmt: skip
                cuts = [0, 100, 101, 333, flat.size]
                tensors[key] = (flat.shape, "float32", [((a,), flat[a:b]) for a, b in zip(cuts, cuts[1:])])
            objects[f"optimizer.distributed.dp_group_idx_{pp * 2 + tp}.optimizer/shard_0_1"] = {
                "param_groups": [{"step": 4}]}  # fmt: skip
    args = {**ARGS, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    write_dcp(tmp_path / "c", tensors, objects, common_of(args, optimizer={}))
    source = check(tmp_path / "c", state)
    assert source.common["adam_step"] == 4
    short = {k: ((333,), v[1], v[2][:3]) if "bucket" in k else v for k, v in tensors.items()}
    write_dcp(tmp_path / "d", short, objects, common_of(args, optimizer={}))
    with pytest.raises(CheckpointError, match=r"has shape \[333\]; by the checkpoint's arguments"):
        open_checkpoint(tmp_path / "d")


def test_gathered_state_of_releases_up_to_0_14(tmp_path):
    state = full_state(model())
    names = registered(model(), range(LAYERS), True, True)
    buffers = {}
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        flat = StreamTensor.of(flat_buffer(state, names, kind, 1, 0, 0), "float32")
        buffers["param" if kind == "master" else kind] = flat
    content = {0: {(torch_dtype("bfloat16"), torch_dtype("float32")): buffers}, "buckets_coalesced": True}
    objects = {"optimizer.distributed.dp_group_idx_0.param_state/shard_0_1": content}
    optimizer = {"optimizer": {"param_groups": [{"step": 2}]}}
    write_dcp(tmp_path / "c", stacked(state, "bfloat16"), objects, common_of(ARGS, optimizer=optimizer))
    check(tmp_path / "c", state)


def test_common_state_inside_the_distcp_files(tmp_path):
    state = {k: v for k, v in full_state(model()).items() if "@" not in k}
    write_dcp(tmp_path / "c", stacked(state, "bfloat16"), {"common_state/shard_0_1": common_of(ARGS)}, {})
    (tmp_path / "c" / "common.pt").unlink()
    assert check(tmp_path / "c", state).common["consumed_train_samples"] == 7


def test_layers_that_are_not_stacked(tmp_path):
    state = {k: v for k, v in full_state(model(), "float32").items() if "@" not in k}
    tensors = {te_fused_name(k): (v.shape, "float32", [((0,) * v.ndim, v)]) for k, v in state.items()}
    write_dcp(tmp_path / "c", tensors, {}, common_of(ARGS))
    check(tmp_path / "c", state)


LEGACY = {
    "self_attention.linear_qkv": "self_attention.query_key_value", "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h",
}  # fmt: skip


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("old", [True, False], ids=["layernorm-names", "norm-names"])
def test_legacy_names_and_old_query_key_value_orders(tmp_path, version, old):
    """tp2, pp2, tied, with the head's copy on the last stage; rows of q, k, v in the order each version had."""
    tp, size = 2, H // HEADS
    shapes = model(gated=False, tied=True, bias=True, groups=HEADS)
    state = {k: v for k, v in full_state(shapes, "float32").items() if "@" not in k}
    norms = {"input_layernorm": "input_layernorm" if old else "input_norm",
             "pre_mlp_layernorm": "post_attention_layernorm" if old else "post_attention_norm"}  # fmt: skip
    for pp in range(2):
        for rank in range(tp):
            encoder = OrderedDict()
            for name, value in state.items():
                part = local(name, value, tp, rank, gated=False)
                if not name.startswith("decoder.layers."):
                    continue
                _, _, layer, rest = name.split(".", 3)
                if int(layer) // 2 != pp:
                    continue
                module, kind = rest.rsplit(".", 1)
                if "linear_qkv" in module and version < 2:
                    heads = part.reshape(HEADS // tp, 3, size, -1)
                    order = (1, 0, 2, 3) if version == 0 else (0, 2, 1, 3)
                    part = np.ascontiguousarray(heads.transpose(order)).reshape(part.shape)
                module = {**LEGACY, **norms}[module]
                encoder[f"layers.{int(layer) % 2}.{module}.{kind}"] = StreamTensor.of(part, "float32")
            language = OrderedDict()
            words = state["embedding.word_embeddings.weight"]
            copy = StreamTensor.of(np.split(words, tp)[rank], "float32")
            if pp == 0:
                positions = StreamTensor.of(state["embedding.position_embeddings.weight"], "float32")
                language["embedding"] = {
                    "word_embeddings": {"weight": copy},
                    "position_embeddings": {"weight": positions},
                }
            else:
                final = f"final_{'layernorm' if old else 'norm'}.weight"
                encoder[final] = StreamTensor.of(state["decoder.final_layernorm.weight"], "float32")
            language["transformer" if old else "encoder"] = encoder
            model_state = {"language_model": language}
            if pp == 1:
                model_state["word_embeddings_for_head"] = {"weight": copy}
            directory = tmp_path / f"mp_rank_{rank:02d}_{pp:03d}"
            directory.mkdir()
            args = {**ARGS, "swiglu": False, "untie_embeddings_and_output_weights": False, "num_query_groups": None,
                    "group_query_attention": False, "tensor_model_parallel_size": 2,
                    "pipeline_model_parallel_size": 2}  # fmt: skip
            content = {"args": SimpleNamespace(**args), "model": model_state, "total_iters": 3,
                       "lr_scheduler": {"start_lr": 0.1, "num_iters": 5}}  # fmt: skip
            if version:
                content["checkpoint_version"] = version
            with (directory / "model_optim_rng.pt").open("wb") as handle:
                write_torch_zip(handle, content, "model_optim_rng")
    source = check(tmp_path, state)
    assert source.common["opt_param_scheduler"] == {"max_lr": 0.1, "num_steps": 5}
    assert source.common["iteration"] == 3


def test_flat_layout_is_megatrons():
    """The verified example of the distributed optimizer: offsets read from a file of Megatron core 0.12."""
    sizes = [("e", 1024)]
    for i in range(4):
        sizes += [(f"{i}.in", 32), (f"{i}.proj", 512), (f"{i}.qkv", 1024), (f"{i}.pre", 32), (f"{i}.fc1", 2048),
                  (f"{i}.fc2", 1024)]  # fmt: skip
    sizes += [("final", 32)]
    layout = flat_layout(sizes, None)
    places = {p.name: p.file_start for p in layout.parameters}
    assert layout.numel == 20032
    expected = {"final": 0, "3.fc2": 64, "3.fc1": 1088, "3.pre": 3136, "3.qkv": 3200, "3.proj": 4224, "3.in": 4736,
                "2.fc2": 4800, "e": 19008}  # fmt: skip
    assert {name: places[name] for name in expected} == expected


def test_bucket_cuts_drop_the_gap_between_buckets():
    layout = flat_layout([("a", 100), ("b", 100), ("c", 100)], 150, frozenset({"a"}))
    # c at 0, b at 128 reaches 150: bucket 0 ends at 228 and is padded to 256 in memory; a is alone.
    assert layout.bucket_numel == (228, 100)
    assert [(p.name, p.bucket, p.start, p.file_start) for p in layout.parameters] == [
        ("c", 0, 0, 0), ("b", 0, 128, 128), ("a", 1, 0, 228)]  # fmt: skip
    closed_early = flat_layout([("a", 100), ("b", 100)], None, frozenset({"a"}))
    assert closed_early.bucket_numel == (128, 100)  # the bucket before a lone parameter ends at the rounded position


def test_stages():
    base = {"num_layers": 8, "pipeline_model_parallel_size": 2}

    def lists(**more):
        rows = stages_of({**base, **more}).layers
        return {(c, p): list(layers) for p, row in enumerate(rows) for c, layers in enumerate(row)}

    assert lists() == {(0, 0): [0, 1, 2, 3], (0, 1): [4, 5, 6, 7]}
    assert lists(virtual_pipeline_model_parallel_size=2) == {
        (0, 0): [0, 1], (0, 1): [2, 3], (1, 0): [4, 5], (1, 1): [6, 7]}  # fmt: skip
    assert lists(decoder_first_pipeline_num_layers=2) == {(0, 0): [0, 1], (0, 1): [2, 3, 4, 5, 6, 7]}
    assert lists(decoder_last_pipeline_num_layers=2, virtual_pipeline_model_parallel_size=2) == {
        (0, 0): [0, 1, 2], (0, 1): [3], (1, 0): [4, 5, 6], (1, 1): [7]}  # fmt: skip
    six = {"num_layers": 6, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    assert lists(**six) == {(0, 0): [0, 1, 2], (0, 1): [3, 4, 5]}
    assert lists(num_layers=7, account_for_embedding_in_pipeline_split=True) == {
        (0, 0): [0, 1, 2], (0, 1): [3, 4, 5, 6]}  # fmt: skip
    assert lists(pipeline_model_parallel_layout="Et*3|(tt|)*2,tL") == {
        (0, 0): [0, 1, 2], (0, 1): [3, 4], (1, 0): [5, 6], (1, 1): [7]}  # fmt: skip
    with pytest.raises(CheckpointError, match="num_layers=7 cannot be split"):
        lists(num_layers=7)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("language_model.encoder.layers.3.self_attention.query_key_value.bias",
         "decoder.layers.3.self_attention.linear_qkv.bias"),
        ("language_model.transformer.layers.0.attention.dense.bias",
         "decoder.layers.0.self_attention.linear_proj.bias"),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.1.pre_mlp_layernorm.weight"),
        ("module.decoder.layers.1.self_attention.linear_qkv.layer_norm_bias", "decoder.layers.1.input_layernorm.bias"),
        ("decoder.layers.0.mlp.gate.weight", None),
        ("decoder.layers.0.post_attention_layernorm.weight", None),
    ],
)  # fmt: skip
def test_names(stored, expected):
    assert canonical_name(stored) == expected


def test_what_megatron_has_no_place_for_is_refused(tmp_path, capsys):
    state = full_state(model(), "float32")
    state = {k: v for k, v in state.items() if "@" not in k}
    state["decoder.layers.0.post_mlp_layernorm.weight"] = np.zeros(H, np.float32)
    assert state["output_layer.weight"].dtype.name == "float32"
    config = {"num_layers": LAYERS, "num_attention_heads": HEADS}
    save_native(tmp_path / "n", state, "float32", config)
    assert main(["--to", "megatron", "--load", str(tmp_path / "n"), "--save", str(tmp_path / "m")]) == 2
    assert "decoder.layers.0.post_mlp_layernorm.weight" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_layout_is_refused_for_files_that_have_none(tmp_path, capsys, to):
    flags = ["--target-tensor-parallel-size", "2", "--no-target-moe-grouped-gemm"]
    assert main(["--to", to, "--load", str(tmp_path), "--save", str(tmp_path / "m"), *flags]) == 2
    named = "--target-tensor-parallel-size, --target-moe-grouped-gemm belong to --to megatron; "
    assert f"{named}with --to {to} any layout loads the result" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--target-expert-model-parallel-size 2", "--target-moe-grouped-gemm"])
def test_how_experts_are_shared_out_is_refused_where_there_are_none(tmp_path, capsys, words):
    state = {k: v for k, v in full_state(model(), "float32").items() if "@" not in k}
    save_native(tmp_path / "n", state, "float32", {"num_layers": LAYERS, "num_attention_heads": HEADS})
    load = ["--load", str(tmp_path / "n"), "--save", str(tmp_path / "m")]
    assert main(["--to", "megatron", *load, *words.split()]) == 2
    assert "of the target: this model has no experts; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    assert main(["--to", "megatron", *load, "--no-target-moe-grouped-gemm"]) == 0
