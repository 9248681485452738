"""Megatron-LM's runs: their arguments, and the values they gave."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from parallel_core.checkpoint import CheckpointWriter, TensorShard
from tests.helpers.launching import REPO

GOLDEN = REPO / "tests/golden/parity"
CHECKPOINTS = REPO / "tests/golden/checkpoint"

# As Megatron-LM was given them, in its order, and plain operators; layouts add their own flags.
COMMON = """
--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 20
--lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 5 --weight-decay 0.01 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --optimizer adam
--seed 1234 --attention-dropout 0 --hidden-dropout 0 --kernels local --transformer-impl local --distributed-backend gloo --no-masked-softmax-fusion --no-persist-layer-norm
--no-gradient-accumulation-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --disable-jit-fuser --attention-softmax-in-fp32
--tokenizer-type NullTokenizer --vocab-size 255 --make-vocab-size-divisible-by 128 --data-path corpus_a --split 100,0,0 --num-workers 0 --eval-iters 0 --eval-interval 100000 --log-interval 1
""".split()  # noqa: E501
MODELS = {
    "gpt2": "--normalization LayerNorm --position-embedding-type learned_absolute --ffn-hidden-size 256 "
    "--init-method-std 0.02",
    "llama": "--normalization RMSNorm --position-embedding-type rope --rotary-base 10000 --swiglu "
    "--ffn-hidden-size 176 --disable-bias-linear --group-query-attention --num-query-groups 2 "
    "--untie-embeddings-and-output-weights --norm-epsilon 1e-5 --init-method-std 0.02",
}
LAYOUTS: dict[str, tuple[int, str]] = {
    "tp1pp1": (1, ""),
    "tp2pp1": (2, "--tensor-model-parallel-size 2"),
    "tp2pp1sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp1pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2": (2, ""),
    "dp2distopt": (2, "--use-distributed-optimizer"),
    "tp2pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2dp2distopt": (4, "--tensor-model-parallel-size 2 --use-distributed-optimizer"),
    "tp2pp2dp2": (8, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}
"""Ranks and flags of each of Megatron's layouts; `tp2pp2dp2` is the product of three of them."""

CONTEXT_LAYOUTS: dict[str, tuple[int, str]] = {
    "cp2": (2, "--context-parallel-size 2"),
    "cp2allgather": (2, "--context-parallel-size 2 --cp-comm-type all_gather"),
    "cp2a2a": (2, "--context-parallel-size 2 --cp-comm-type a2a"),
    "tp2cp2sp": (4, "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2"),
    "cp4a2a+p2p": (
        4, "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"
    ),
}  # fmt: skip
"""Ranks and flags of layouts that Megatron-LM does not run on CPU: its context parallelism is TransformerEngine's."""


def arguments(model: str, layout: str, *more: str) -> list[str]:
    """Return Megatron's argument list for a run."""
    flags = {**LAYOUTS, **CONTEXT_LAYOUTS}[layout][1]
    return ["--config", "empty.yaml", *COMMON, *MODELS[model].split(), *flags.split(), *more]


@functools.cache
def curve(model: str, name: str) -> dict[int, tuple[float, float, float]]:
    """Return (loss, grad norm, learning rate) of each iteration."""
    curves = json.loads((GOLDEN / model / "curves.json").read_text())
    return {int(row[0]): (row[1], row[2], row[3]) for row in curves[name]}


def arrays(model: str, file: str) -> dict[str, np.ndarray]:
    """Return the arrays of one file of a golden model."""
    with np.load(GOLDEN / model / file) as found:
        return {name: found[name] for name in found.files}


def write_initial_checkpoint(model: str, path: Path) -> str:
    """Write the weights that every curve of `model` starts from as a checkpoint, and return its path."""
    weights = arrays(model, "params_0000.npz")
    writer = CheckpointWriter(path, 0, 0, 1)
    writer.begin()
    manifest = writer.write_rank_file(
        {name: (TensorShard.full(name, value.shape, "float32"), value) for name, value in weights.items()}
    )
    writer.commit([manifest], {"model_config": {}, "consumed_train_samples": 0})
    return str(path)


def assert_follows(steps: dict[int, dict], golden: dict[int, tuple[float, float, float]], tolerance: float) -> None:
    """Assert that losses, grad norms and learning rates of all of golden's iterations agree, relative to golden's."""
    assert sorted(steps) == sorted(golden)
    for iteration, (loss, grad_norm, lr) in golden.items():
        step = steps[iteration]
        got = np.array([step["loss"], step["grad_norm"]])
        assert np.all(np.abs(got / [loss, grad_norm] - 1) < tolerance), (
            f"iteration {iteration}: loss and grad norm {got}, Megatron's {loss, grad_norm}"
        )
        # The same formula in float64: nothing is summed, so nothing may differ beyond the last digits.
        assert abs(step["lr"] - lr) <= 1e-12 * abs(lr), f"iteration {iteration}: lr {step['lr']}, Megatron's {lr}"
