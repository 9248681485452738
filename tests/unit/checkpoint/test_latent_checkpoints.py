"""Checkpoints of multi-latent attention in Megatron's names: there and back, and what Megatron's files look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, TensorShard, open_checkpoint
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.config import load_config
from parallel_core.convert.cli import main
from parallel_core.convert.comparison import compare
from parallel_core.training.checkpointing import stored_settings

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "parity" / "mla_dense" / "params_0000.npz"
WORDS = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --mock-data
    --padded-vocab-size 256 --normalization RMSNorm --position-embedding-type rope --swiglu --ffn-hidden-size 64
    --disable-bias-linear --untie-embeddings-and-output-weights --multi-latent-attention --q-lora-rank 24
    --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 --qk-layernorm
""".split()
# Of a tensor parallel rank of two, as Megatron-LM's own file of local modules has them, in its order.
LOCAL = {
    "input_layernorm.weight": (64,),
    "self_attention.linear_proj.weight": (64, 32),
    "self_attention.linear_q_down_proj.weight": (12, 64),
    "self_attention.linear_q_up_proj.weight": (48, 24),
    "self_attention.linear_kv_down_proj.weight": (12, 64),
    "self_attention.linear_kv_up_proj.weight": (64, 16),
    "self_attention.q_layernorm.weight": (24,),
    "self_attention.kv_layernorm.weight": (16,),
    "pre_mlp_layernorm.weight": (64,),
    "mlp.linear_fc1.weight": (64, 64),
    "mlp.linear_fc2.weight": (64, 32),
}
# With TransformerEngine projections to latents are whole, and norms stand in the linear after them.
TRANSFORMER_ENGINE = {
    "input_layernorm.weight": (64,),
    "self_attention.linear_proj.weight": (64, 32),
    "self_attention.linear_q_down_proj.weight": (24, 64),
    "self_attention.linear_q_up_proj.layer_norm_weight": (24,),
    "self_attention.linear_q_up_proj.weight": (48, 24),
    "self_attention.linear_kv_down_proj.weight": (24, 64),
    "self_attention.linear_kv_up_proj.layer_norm_weight": (16,),
    "self_attention.linear_kv_up_proj.weight": (64, 16),
    "mlp.linear_fc1.layer_norm_weight": (64,),
    "mlp.linear_fc1.weight": (64, 64),
    "mlp.linear_fc2.weight": (64, 32),
}


@pytest.fixture(scope="module", params=["rope", "yarn"])
def native(request, tmp_path_factory) -> Path:
    """A checkpoint of this project: Megatron's weights, and moments that all differ."""
    words = ["--rope-type", "rope"] if request.param == "rope" else ["--rotary-scaling-factor", "4", "--mscale", "0.7"]
    config = load_config([*WORDS, *words]).config
    rng, state = np.random.default_rng(0), {}
    with np.load(GOLDEN) as weights:
        for name in weights.files:
            state[name] = weights[name]
            state[f"{name}@exp_avg"], state[f"{name}@exp_avg_sq"] = rng.random((2, *weights[name].shape), np.float32)
    root = tmp_path_factory.mktemp("native")
    writer = CheckpointWriter(root, 3, 0, 1)
    writer.begin()
    shards = {key: (TensorShard.full(key.split("@")[0], x.shape, "float32"), x) for key, x in state.items()}
    common = {"model_config": stored_settings(config), "config": config.to_dict(), "adam_step": 5}
    writer.commit([writer.write_rank_file(shards)], common)
    return root


def exported(native: Path, target: Path, words: str) -> Path:
    arguments = ["--to", "megatron", "--load", str(native), "--save", str(target), "--quiet", *words.split()]
    assert main(arguments) == 0
    return target / "iter_0000003"


@pytest.mark.parametrize(
    "words",
    [
        "--target-tensor-parallel-size 2 --target-transformer-impl local",
        "--target-tensor-parallel-size 2 --target-transformer-impl transformer_engine",
        "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-use-distributed-optimizer "
        "--target-transformer-impl local",
        "--target-tensor-parallel-size 2 --target-use-distributed-optimizer "
        "--target-transformer-impl transformer_engine",
        "--target-format torch_dist --target-transformer-impl local",
        "--target-format torch_dist --target-transformer-impl transformer_engine",
    ],
)
def test_there_and_back(native: Path, tmp_path: Path, words: str):
    result = compare(open_checkpoint(native / "iter_0000003"), open_checkpoint(exported(native, tmp_path, words)))
    assert result.same and not result.settings, result.text()


@pytest.mark.parametrize(("kind", "layer"), [("local", LOCAL), ("transformer_engine", TRANSFORMER_ENGINE)])
def test_names_and_shapes_are_megatrons(native: Path, tmp_path: Path, kind: str, layer: dict):
    path = exported(native, tmp_path, f"--target-tensor-parallel-size 2 --target-transformer-impl {kind}")
    state = load_torch_zip(path / "mp_rank_01" / "model_optim_rng.pt")
    found = {name: value.shape for name, value in state["model"].items() if value is not None}
    want = {f"decoder.layers.{i}.{name}": shape for i in range(4) for name, shape in layer.items()}
    ends = {"decoder.final_layernorm.weight": (64,), "output_layer.weight": (128, 64)}
    assert list(found.items()) == list({"embedding.word_embeddings.weight": (128, 64), **want, **ends}.items())
    if kind == "local":  # of each linear one, and of the output layer
        assert len([name for name in state["model"] if name.endswith("_extra_state")]) == 4 * 7 + 1
    args = vars(state["args"])
    assert args["multi_latent_attention"] and args["position_embedding_type"] == "rope"
    assert args["rope_type"] in ("rope", "yarn") and args["q_lora_rank"] == 24


def test_a_yarn_that_megatrons_cannot_have_is_refused(tmp_path: Path, capsys):
    config = load_config([*WORDS, "--rotary-scaling-factor", "4", "--beta-fast", "16"]).config
    writer = CheckpointWriter(tmp_path / "n", 3, 0, 1)
    writer.begin()
    with np.load(GOLDEN) as weights:
        shards = {name: (TensorShard.full(name, weights[name].shape, "float32"), weights[name]) for name in weights}
    writer.commit([writer.write_rank_file(shards)], {"model_config": stored_settings(config)})
    assert main(["--to", "megatron", "--load", str(tmp_path / "n"), "--save", str(tmp_path / "m"), "--quiet"]) != 0
    told = capsys.readouterr()
    assert "yarn_beta_fast=16.0: Megatron's multi-latent attention has 32.0 alone" in told.out + told.err
