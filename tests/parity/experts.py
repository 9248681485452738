"""Megatron-LM's runs of a mixture of experts: their arguments, and the values they gave."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from parallel_core.checkpoint import CheckpointWriter, TensorShard
from tests.parity.golden import COMMON, GOLDEN, arrays

FAMILY = "moe_mixtral"
MIXTRAL = (
    "--normalization RMSNorm --position-embedding-type rope --rotary-base 10000 --swiglu --disable-bias-linear "
    "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights --norm-epsilon 1e-5 "
    "--init-method-std 0.02 --ffn-hidden-size 176 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 96 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3 "
    "--moe-token-dispatcher-type alltoall"
)
_NO_LOSS = "--moe-aux-loss-coeff 0 --moe-router-load-balancing-type"
VARIANTS = {
    "cap_probs": "--moe-expert-capacity-factor 1.0 --moe-token-drop-policy probs",
    "cap_position": "--moe-expert-capacity-factor 1.0 --moe-token-drop-policy position",
    "cap_position_pad": "--moe-expert-capacity-factor 1.0 --moe-token-drop-policy position "
    "--moe-pad-expert-input-to-capacity",
    "none": f"{_NO_LOSS} none",
    "sinkhorn_top1": f"{_NO_LOSS} sinkhorn --moe-router-topk 1",
    "top1": "--moe-router-topk 1 --moe-router-pre-softmax",
    "pre_softmax": "--moe-router-pre-softmax",
    "seq_aux": "--moe-router-load-balancing-type seq_aux_loss",
    "global_aux": "--moe-router-load-balancing-type global_aux_loss",
    "pertoken": "--calculate-per-token-loss",
}
"""What Megatron-LM was given beside `MIXTRAL`."""
LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss")


def arguments(variant: str = "", layout: str = "") -> list[str]:
    """Return the arguments of a run."""
    words = [*COMMON, *MIXTRAL.split()]
    words += VARIANTS[variant].split() if variant else []
    return ["--config", "empty.yaml", *words, *layout.split()]


@functools.cache
def curve(name: str) -> dict[int, dict[str, float]]:
    """Return what Megatron-LM logged at each iteration; its z-loss as the mean over its ranks."""
    curves = json.loads((GOLDEN / FAMILY / "curves.json").read_text())
    return {row["iteration"]: row for row in curves[name]}


def joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return Megatron's tensors by this project's names: the experts of a layer as one tensor."""
    out, experts = {}, {}
    for name, value in tensors.items():
        head, found, tail = name.partition("experts.local_experts.")
        if found:
            number, _, rest = tail.partition(".")
            experts.setdefault(f"{head}experts.experts.{rest}", {})[int(number)] = value
        else:
            out[name] = value
    return {**out, **{name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}}


def write_initial_checkpoint(path: Path) -> str:
    """Write the weights that every curve starts from as a checkpoint, and return its path."""
    weights = joined(arrays(FAMILY, "params_0000.npz"))
    writer = CheckpointWriter(path, 0, 0, 1)
    writer.begin()
    shards = {name: (TensorShard.full(name, value.shape, "float32"), value) for name, value in weights.items()}
    writer.commit([writer.write_rank_file(shards)], {"model_config": {}, "consumed_train_samples": 0})
    return str(path)


def assert_follows(steps: dict[int, dict], golden: dict[int, dict[str, float]], tolerance: float) -> None:
    """Assert that losses, grad norms and routing losses of golden's iterations agree, relative to golden's."""
    assert sorted(steps) == sorted(golden)
    for iteration, want in golden.items():
        for name in ("loss", "grad_norm", *LOSSES):
            if name in want:
                error = abs(steps[iteration][name] / want[name] - 1)
                assert error < tolerance, f"iteration {iteration}, {name}: {steps[iteration][name]}, not {want[name]}"
