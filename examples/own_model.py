"""Tensor parallel layers in a model of one's own, trained with plain MindSpore autograd and a plain optimizer.

    python examples/own_model.py                                                    # one process
    NPROC=2 python -m parallel_core.launch --plain examples/own_model.py            # the same losses on two
    NPROC=2 python -m parallel_core.launch --plain examples/own_model.py --sequence-parallel
"""

import os
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn

from parallel_core import parallel_state
from parallel_core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    init_method_normal,
    vocab_parallel_cross_entropy,
)

VOCABULARY, HIDDEN, LENGTH, BATCH, STEPS = 64, 32, 16, 8, 30


class NextToken(nn.Cell):
    """Guesses the next token from the present one: embedding, a residual MLP, output layer."""

    def __init__(self, group, sequence_parallel):
        super().__init__()
        # Every layer draws its whole weight and keeps this rank's part, so any number of ranks starts from one model.
        common = {"tp_group": group, "init_method": init_method_normal(0.2)}
        self.group = group
        self.embedding = VocabParallelEmbedding(
            VOCABULARY, HIDDEN, reduce_scatter_embeddings=sequence_parallel, **common
        )
        self.up = ColumnParallelLinear(HIDDEN, 4 * HIDDEN, sequence_parallel=sequence_parallel, name="up", **common)
        self.down = RowParallelLinear(4 * HIDDEN, HIDDEN, sequence_parallel=sequence_parallel, name="down", **common)
        self.output = ColumnParallelLinear(
            HIDDEN, VOCABULARY, bias=False, sequence_parallel=sequence_parallel, name="output", **common
        )

    def construct(self, tokens, labels):  # int32 [length, batch]; sequence parallelism cuts dim 0
        hidden = self.embedding(tokens)
        wide, _ = self.up(hidden)  # layers return (output, bias); the bias is None unless skip_bias_add
        narrow, _ = self.down(mint.tanh(wide))
        logits, _ = self.output(hidden + narrow)  # [length, batch, VOCABULARY / ranks]
        return vocab_parallel_cross_entropy(logits, labels, self.group).mean()


def main():
    num_ranks = int(os.environ.get("MS_WORKER_NUM", "1"))  # set by msrun
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=num_ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    model = NextToken(group, "--sequence-parallel" in sys.argv)
    parameters = model.trainable_params()
    optimizer = nn.Momentum(parameters, learning_rate=0.5, momentum=0.9)
    loss_and_gradients = ms.value_and_grad(model, None, parameters)

    draws = np.random.default_rng(0)  # the same tokens on every rank; the rule to learn is label = 3 * token + 1
    for step in range(STEPS):
        tokens = draws.integers(0, VOCABULARY, (LENGTH, BATCH)).astype(np.int32)
        loss, gradients = loss_and_gradients(Tensor(tokens), Tensor((3 * tokens + 1) % VOCABULARY))
        # A parameter that every rank holds, but applies to its part of the sequence, has a part of the gradient.
        gradients = [group.all_reduce(g) if p.shard.partial_gradient else g for p, g in zip(parameters, gradients)]
        optimizer(tuple(gradients))
        if group.rank == 0:
            print(f"INFO - step {step:2d}, loss {float(loss):.6f}", flush=True)
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
