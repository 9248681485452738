"""Checkpoints of multi-token prediction in Megatron's names, there and back, and where its ranks have what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from own_models import LLAMA, config_of
from own_models import parameters as trained

from parallel_core.checkpoint import CheckpointWriter, TensorShard, open_checkpoint
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.convert.cli import main
from parallel_core.convert.comparison import compare
from parallel_core.layout.shard import shard_of
from parallel_core.training.checkpointing import stored_settings
from parallel_core.transformer import GPTModel, ModelStage

TWO_DEPTHS = f"{LLAMA} --mtp-num-layers 2"
PIPELINE = "--target-pipeline-parallel-size 2 --target-transformer-impl"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    config = config_of(TWO_DEPTHS)
    rng, state = np.random.default_rng(0), {}
    for parameter in trained(GPTModel(ModelStage(config.model_config))):
        name = shard_of(parameter).name
        state[name] = parameter.asnumpy()
        state[f"{name}@exp_avg"], state[f"{name}@exp_avg_sq"] = rng.random((2, *parameter.shape), np.float32)
    root = tmp_path_factory.mktemp("native")
    writer = CheckpointWriter(root, 3, 0, 1)
    writer.begin()
    shards = {key: (TensorShard.full(key.split("@")[0], x.shape, "float32"), x) for key, x in state.items()}
    told = {"model_config": stored_settings(config), "config": config.to_dict(), "adam_step": 5}
    writer.commit([writer.write_rank_file(shards)], told)
    return root


def exported(native: Path, target: Path, words: str) -> Path:
    assert main(["--to", "megatron", "--load", str(native), "--save", str(target), "--quiet", *words.split()]) == 0
    return target / "iter_0000003"


@pytest.mark.parametrize(
    "words",
    [
        f"{PIPELINE} local",
        f"{PIPELINE} local --target-tensor-parallel-size 2",
        f"{PIPELINE} local --target-use-distributed-optimizer",
        f"{PIPELINE} transformer_engine --target-use-distributed-optimizer",
        "--target-format torch_dist",
    ],
)
def test_there_and_back(native: Path, tmp_path: Path, words: str):
    result = compare(open_checkpoint(native / "iter_0000003"), open_checkpoint(exported(native, tmp_path, words)))
    padding = [line for line in result.settings if line.startswith("padded_vocab_size")]
    assert result.same and result.settings == padding, result.text()


def test_the_last_stage_has_the_layers_and_its_copy_of_the_word_embeddings(native: Path, tmp_path: Path):
    path = exported(native, tmp_path, f"{PIPELINE} local --target-tensor-parallel-size 2")
    models = [load_torch_zip(path / f"mp_rank_00_00{pp}" / "model_optim_rng.pt")["model"] for pp in (0, 1)]
    first, last = ({name: value.shape for name, value in model.items() if value is not None} for model in models)
    assert not [name for name in first if name.startswith("mtp.")]
    copy = "embedding.word_embeddings.weight"
    assert list(last)[0] == copy and last[copy] == first[copy] and list(last)[-1] == "output_layer.weight"
    depth = [name.removeprefix("mtp.layers.0.") for name in last if name.startswith("mtp.layers.0.")]
    assert depth[:4] == [
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "transformer_layer.input_layernorm.weight",
    ] and depth[-1] == "final_layernorm.weight"  # fmt: skip
    assert last["mtp.layers.1.eh_proj.weight"] == (16, 64)  # half of 32 rows
