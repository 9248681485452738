"""Which command lines leave room for the project's own configuration."""

from __future__ import annotations

import pytest

from parallel_core.config.bundled import describes_a_run


@pytest.mark.parametrize("line", [
    "", "--train-iters 5 --lr 1e-4", "--save out --save-interval 5", "--load out --bf16 --exit-interval 3",
    "--use-distributed-optimizer --overlap-grad-reduce", "--train-itrs 3", "--log_throughput", "--profile",
])  # fmt: skip
def test_the_bundled_configuration_may_stand_under(line):
    assert not describes_a_run(line.split())


@pytest.mark.parametrize("line", [
    "--config x.yaml", "--config=x.yaml", "--yaml-cfg x.yaml", "--num-layers 4", "--num_layers=4", "--swiglu",
    "--no-bias-gelu-fusion", "--tensor-model-parallel-size 2", "--num-layers-per-virtual-pipeline-stage 1",
    "--data-path a", "--mock-data", "--tokenizer-type NullTokenizer", "--vocab-size 9", "--micro-batch-size 1",
    "--train-iters 5 --sequence-parallel", "--use-checkpoint-args --load x", "--attention-dropout 0.0",
])  # fmt: skip
def test_it_does_not_stand_under(line):
    assert describes_a_run(line.split())
