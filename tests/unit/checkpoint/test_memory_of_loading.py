"""Memory stays bounded by a tensor or a shard, never by the model."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, TensorShard, load_shards, open_checkpoint
from parallel_core.checkpoint.megatron.export import Target
from parallel_core.convert.convert import to_megatron, to_native

ROWS, COLUMNS, LAYERS = 512, 256, 8
TENSOR = ROWS * COLUMNS * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with optimizer state, more than twenty times as big as its largest tensor of half a megabyte."""
    root = tmp_path_factory.mktemp("big")
    tensors = {"embedding.word_embeddings.weight": (ROWS, COLUMNS), "decoder.final_layernorm.weight": (COLUMNS,)}
    tensors["output_layer.weight"] = (ROWS, COLUMNS)
    for i in range(LAYERS):
        tensors[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = (ROWS, COLUMNS)
        tensors[f"decoder.layers.{i}.mlp.linear_fc2.weight"] = (COLUMNS, ROWS // 2)
    shards = {}
    for name, shape in tensors.items():
        for kind in ("", "@exp_avg", "@exp_avg_sq"):
            shards[name + kind] = (TensorShard.full(name, shape, "float32"), np.zeros(shape, np.float32))
    writer = CheckpointWriter(root, 1, 0, 1)
    writer.begin()
    config = {"num_layers": LAYERS, "num_attention_heads": 4, "swiglu": True}
    return writer.commit([writer.write_rank_file(shards)], {"model_config": config})


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_load_holds_its_shard_and_little_more(checkpoint):
    source = open_checkpoint(checkpoint)
    wanted = {}
    for key in source.keys():  # noqa: SIM118
        info = source.info(key)
        shard = TensorShard.full(key.split("@")[0], info.shape, "float32")
        wanted[key] = shard.flat_range(7, np.prod(info.shape).item() // 3)
    size = sum(shard.local_shape[0] * 4 for shard in wanted.values())
    assert peak_of(lambda: load_shards(source, wanted)) < 1.2 * size


@pytest.mark.parametrize("target_format", ["torch", "torch_dist", "native"])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_conversion_holds_one_tensor(checkpoint, tmp_path, target_format, distributed):
    source = open_checkpoint(checkpoint)
    total = sum(file.stat().st_size for file in checkpoint.iterdir())
    target = Target(tensor_parallel=2, distributed_optimizer=distributed)

    def run():
        if target_format == "native":
            to_native(source, tmp_path / "x", quiet=True)
        else:
            to_megatron(source, tmp_path / "x", target, target_format=target_format, quiet=True)

    assert total > 20 * TENSOR
    assert peak_of(run) < 4 * TENSOR
