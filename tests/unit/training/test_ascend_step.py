"""Training steps on Ascend's double: what they compute, and what they read on the host."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from parallel_core import ops
from parallel_core.context import ParallelContext
from parallel_core.layout.shard import shard_of
from parallel_core.ops import reference
from parallel_core.ops.shared import put
from parallel_core.optimizer import flat
from parallel_core.optimizer.main_grad import MainGrad
from tests.helpers.ascend_double import on_ascend_double, round_trips
from tests.unit.config.effect_probes import Batches, config_of, make_step

HALF = ("--fp16", "--loss-scale", "64", "--kv-channels", "16", "--normalization", "RMSNorm", "--swiglu",
        "--position-embedding-type", "rope")  # fmt: skip
EXPERTS = (*HALF, "--num-experts", "4", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "0.01",
           "--moe-router-load-balancing-type", "aux_loss", "--disable-bias-linear")  # fmt: skip
RUNS = {
    "half": HALF,
    "dynamic scale, clipped": (*HALF[:1], *HALF[3:], "--initial-loss-scale", "64", "--clip-grad", "0.1"),
    "experts": EXPERTS,
    "float32 by SGD": ("--optimizer", "sgd"),
    "recomputed": (*HALF, "--recompute-granularity", "full", "--recompute-method", "uniform",
                   "--recompute-num-layers", "1"),
}  # fmt: skip


def trained(words: tuple[str, ...], steps: int = 2) -> SimpleNamespace:
    """Losses, norms and weights of a few updates, and what the last one has read on the host."""
    config = config_of(words)
    step = make_step(config, ParallelContext.solo())
    count, size = config.dataset_config.micro_batch_num, config.dataset_config.global_batch_size
    reports = [step.train(Batches(config, count, i), i + 1, count, size) for i in range(steps - 1)]
    data = Batches(config, count, steps - 1)
    with round_trips() as read:
        reports.append(step.train(data, steps, count, size))
    names = {shard_of(p).name: p for buffer in step.ddp.buffers for p in buffer.parameters}
    return SimpleNamespace(
        losses=[r.losses["lm loss"] for r in reports],
        norms=[r.grad_norm for r in reports],
        weights={name: p.astype(ms.float32).asnumpy() for name, p in names.items()},
        read=dict(read),
        bytes=(step.optimizer.memory_bytes(), step.ddp.memory_bytes()),
    )


@functools.cache
def on_cpu(words: tuple[str, ...]) -> SimpleNamespace:
    ops.use_kernels("local")
    return trained(words)


@functools.cache
def on_ascend(words: tuple[str, ...]) -> SimpleNamespace:
    with on_ascend_double():
        ops.use_kernels()
        try:
            return trained(words)
        finally:
            ops.use_kernels("local")


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_the_cpus(name):
    got, want = on_ascend(RUNS[name]), on_cpu(RUNS[name])
    tolerance = 5e-3 if "--fp16" in RUNS[name] else 1e-5
    np.testing.assert_allclose(got.losses, want.losses, rtol=tolerance)
    np.testing.assert_allclose(got.norms, want.norms, rtol=4 * tolerance)
    assert got.bytes == want.bytes
    for parameter, values in want.weights.items():
        if parameter.endswith("linear_qkv.bias"):
            continue  # a bias of keys changes nothing: Adam makes steps of what rounding leaves of its gradient
        moved = np.abs(values).max() * tolerance + (2e-2 if "--fp16" in RUNS[name] else 1e-4)
        difference = np.abs(got.weights[parameter] - values)
        # Where 16 bits leave of a gradient nothing but rounding, Adam steps by the rate in either direction.
        assert np.mean(difference > moved) < 1e-3 and difference.max() < moved + 2e-2, parameter


@pytest.mark.parametrize("name", RUNS)
def test_a_step_reads_the_scalars_and_nothing_else(name):
    """Each read waits for everything that was started: one copy of this rank's numbers, and of their sum if it has one.

    Experts are chosen on the host: scores go there in forward, and the gradient of the chosen ones' in backward.
    """
    scalars = {"training/scalars.py: _on_host": 1}
    config = config_of(RUNS[name])
    calls = config.model_config.num_layers * config.dataset_config.micro_batch_num
    router = "transformer/moe/router.py:"
    routed = {f"{router} forward": calls, f"{router} backward": calls} if name == "experts" else {}
    assert on_ascend(RUNS[name]).read == {**scalars, **routed}


def test_gradients_of_weights_are_summed_on_the_device():
    """No tensor of a weight's size is made for a microbatch: products are added where gradients are summed."""
    made = []
    real = reference.linear_grad_weight
    with mock.patch.object(reference, "linear_grad_weight", side_effect=lambda *x: made.append(x) or real(*x)):
        on_ascend.__wrapped__(HALF)
    assert not made


@pytest.mark.parametrize("double", [on_ascend_double, contextlib.nullcontext], ids=["ascend", "cpu"])
def test_what_autograd_adds_to_a_placeholder_counts(double):
    """The placeholder of what is summed already is nothing; with another contribution it is that."""
    with double():
        buffer = flat.zeros(6, "float32")
        weight = Parameter(Tensor(np.zeros((2, 3), np.float32)))
        main_grad = MainGrad(buffer, weight)
        ones = Tensor(np.ones((2, 3), np.float32))
        given = main_grad.accumulate(lambda into, add: put(into, ones, add))
        assert given.shape == (2, 3) and main_grad.accumulate(lambda into, add: put(into, ones, add)) is None
        main_grad.receive(given)
        assert buffer.numpy().tolist() == [2.0] * 6
        main_grad.receive(main_grad.accumulate(lambda into, add: put(into, ones, add)) + ones)
        assert buffer.numpy().tolist() == [4.0] * 6


def test_dropout_is_the_same_where_layers_are_computed_again():
    drop = ("--attention-dropout", "0.25", "--hidden-dropout", "0.25")
    plain, again = on_ascend((*HALF, *drop)), on_ascend((*RUNS["recomputed"], *drop))
    assert plain.losses == again.losses and plain.losses != on_ascend(HALF).losses
    np.testing.assert_allclose(again.norms, plain.norms, rtol=1e-3)


def test_the_counter_sees_every_way_to_the_host():
    x = Tensor(np.ones(1, np.float32))
    from parallel_core.training import scalars

    with round_trips() as read:
        scalars._on_host(x, [(x, {"a": (x, 1)})])
        x.asnumpy()  # not the package's
    assert read == {"training/scalars.py: <listcomp>": 3}


def test_updates_count_from_the_first():
    numbers = [np.random.default_rng(i).standard_normal(12).astype(np.float32) for i in range(4)]
    numbers[3] = np.abs(numbers[3])
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
    with on_ascend_double():
        buffers = [flat.zeros(16, "float32") for _ in numbers]
        parts = [buffer.part(2, 14) for buffer in buffers]
        for part, values in zip(parts, numbers):
            part.load(values)
        for step in (1, 2, 1 << 30):
            parts[0].adam_(*parts[1:], step=step, **options)
            reference.adam_(*numbers, step=step, **options)
            for part, values in zip(parts, numbers):
                np.testing.assert_allclose(part.numpy(), values, rtol=1e-6)
        assert not any(buffer.numpy()[[0, 1, 14, 15]].any() for buffer in buffers)
