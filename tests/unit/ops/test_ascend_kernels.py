"""Ascend's kernels over the documented operators: what the references compute, both ways, or left to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core.ops import ascend, reference
from parallel_core.ops.documents import ends_of, remember
from tests.ascend import pieces
from tests.ascend.kernels import Sizes
from tests.helpers import ascend_double
from tests.helpers.ascend_double import on_ascend_double

HALF = np.float16
S, B, N, G, D = 16, 2, 4, 2, 16


@pytest.fixture(autouse=True)
def _double():
    with on_ascend_double():
        ops.use_kernels()
        yield
    ops.use_kernels("local")


def tensor(*shape: int, seed: int = 0, dtype: Any = HALF) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def agree(kernel: Callable[..., Tensor], want: Callable[..., Tensor], inputs: list[Tensor], atol: float = 4e-3) -> None:
    """Compare values and gradients for a gradient that differs from element to element."""
    got, wanted = kernel(*inputs), want(*inputs)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    np.testing.assert_allclose(got.asnumpy(), wanted.asnumpy(), atol=atol)
    weights = tensor(*got.shape, seed=9, dtype=np.float32)
    positions = tuple(range(len(inputs)))
    grads = [ms.grad(lambda *x, f=f: (f(*x).astype(ms.float32) * weights).sum(), positions)(*inputs)
             for f in (kernel, want)]  # fmt: skip
    for mine, theirs in zip(*grads):
        np.testing.assert_allclose(mine.asnumpy(), theirs.asnumpy(), atol=4 * atol, rtol=1e-2)


STARTS = np.sort(np.random.default_rng(3).integers(0, S, (B, S)), 1).astype(np.int32)
STARTS = np.minimum(STARTS, np.arange(S, dtype=np.int32))


CUTS = np.array([[0] * 5 + [5] * 3 + [8] * 8, [0] * 12 + [12] * 4], np.int32)
WINDOW = np.broadcast_to(np.maximum(np.arange(S, dtype=np.int32) - 3, 0), (B, S)).copy()
SEEN = {
    "causal": (lambda: None, 2),
    "starts": (lambda: Tensor(STARTS), 1),
    "starts that are no documents": (lambda: remember(Tensor(STARTS), STARTS), 1),
    "documents": (lambda: remember(Tensor(CUTS), CUTS), 2),
    "window": (lambda: remember(Tensor(WINDOW), WINDOW, 3), 4),
}


@pytest.mark.parametrize("layout", ["SBH", "BNSD"])
@pytest.mark.parametrize("width", [D, D // 2], ids=["", "narrow values"])
@pytest.mark.parametrize("seen", SEEN)
def test_flash_attention_is_the_references(seen, width, layout):
    made, mode = SEEN[seen]
    start = made()
    inputs = [tensor(S, B, N, D), tensor(S, B, G, D, seed=1), tensor(S, B, G, width, seed=2)]
    options = {"scale": 0.25, "document_start_BS": start}
    attend, packed = ascend.attention_functions(True, layout)
    watched = mock.patch.object(ascend_double, "flash_attention_score", wraps=ascend_double.flash_attention_score)
    with mock.patch.object(reference, "attention_mask", side_effect=AssertionError("a whole mask")), watched as call:
        attend(*inputs, **options)
    used = call.call_args.kwargs
    assert used["sparse_mode"] == mode and used["input_layout"] == ("TND" if seen == "documents" else layout)
    agree(functools.partial(attend, **options), functools.partial(reference.causal_attention, **options), inputs)
    if width == D:
        mixed = tensor(S, B, G, (N // G + 2) * D, seed=5)
        want = reference.causal_attention_packed(mixed, D, **options).asnumpy()
        for function in (packed, ops.causal_attention_packed):
            with mock.patch.object(reference, "attention_mask", side_effect=AssertionError("a whole mask")):
                np.testing.assert_allclose(function(mixed, D, **options).asnumpy(), want, atol=4e-3)


@pytest.mark.parametrize("seen", SEEN)
def test_attention_weights_are_dropped_alike_in_forward_and_backward(seen):
    """With values of ones, the context is the sum of the weights that are kept: its gradient for a value says which."""
    query, key = tensor(S, B, N, D), tensor(S, B, N, D, seed=1)
    drop = {"scale": 0.25, "dropout_rate": 0.5, "dropout_seed": (3, 4), "document_start_BS": SEEN[seen][0]()}
    value = tensor(S, B, N, D, seed=2)
    got = ops.causal_attention(query, key, value, **drop)
    assert np.array_equal(got.asnumpy(), ops.causal_attention(query, key, value, **drop).asnumpy())
    for other in ({"dropout_seed": (4, 3)}, {"heads": (4, 8)}):
        assert not np.array_equal(got.asnumpy(), ops.causal_attention(query, key, value, **{**drop, **other}).asnumpy())
    # The context is linear in the values: <grad of <context, c>, value> is <context, c> where the masks are the same.
    c = tensor(*got.shape, seed=3, dtype=np.float32)
    grad = ms.grad(lambda v: (ops.causal_attention(query, key, v, **drop).astype(ms.float32) * c).sum())(value)
    through = float((grad.astype(ms.float32) * value.astype(ms.float32)).sum())
    assert through == pytest.approx(float((got.astype(ms.float32) * c).sum()), rel=0.02, abs=0.1)


def test_a_mask_of_documents_is_made_once_for_all_layers():
    inputs = [tensor(S, B, N, D) for _ in range(3)]
    made = []
    real = ascend.ops.logical_or
    with mock.patch.object(ascend.ops, "logical_or", side_effect=lambda *x: made.append(1) or real(*x)):
        for start in (Tensor(STARTS), Tensor(STARTS * 0)):
            contexts = [ops.causal_attention(*inputs, scale=0.25, document_start_BS=start).asnumpy() for _ in range(3)]
            assert np.array_equal(contexts[0], contexts[2])
    assert len(made) == 2


def test_what_flash_attention_does_not_take_the_reference_computes(caplog):
    half = [tensor(S, B, N, D) for _ in range(3)]
    with mock.patch.object(ascend.ops, "flash_attention_score", side_effect=AssertionError("not for the operator")):
        for inputs, more in (
            ([x.astype(ms.float32) for x in half], {}),
            ([x[..., :12] for x in half], {}),
            ([x[:12] for x in half], {"dropout_rate": 0.5}),
            ([*half[:2], tensor(S, B, N, 2 * D)], {}),
            (half, {"softmax_coefficient": 2.0}),
        ):
            out = ops.causal_attention(*inputs, scale=0.5, **more)
            assert out.shape == (len(inputs[0]), B, N * inputs[2].shape[-1])
        assert len(caplog.records) == 5 and "causal_attention: the plain MindSpore operators" in caplog.text
        attend, _ = ascend.attention_functions(False, "SBH")  # a model that does not want it
        attend(*half, scale=0.5)
        ops.use_kernels("local")
        ascend.attention_functions(True, "SBH")[0](*half, scale=0.5)
        ops.use_kernels()
        with pytest.raises(AssertionError, match="not for the operator"):
            ops.causal_attention(*half, scale=0.5)


@pytest.mark.parametrize(("x", "weight"), [(HALF, HALF), (np.float32, np.float32), (np.float32, HALF)])
def test_rms_norm(x, weight):
    agree(functools.partial(ops.rms_norm, eps=1e-5), functools.partial(reference.rms_norm, eps=1e-5),
          [tensor(4, 2, 32, dtype=x), tensor(32, seed=1, dtype=weight)])  # fmt: skip


@pytest.mark.parametrize("dtype", [HALF, np.float32])
def test_rms_norm_of_a_sum(dtype):
    inputs = [tensor(4, 2, 32, dtype=dtype), tensor(4, 2, 32, seed=2, dtype=dtype), tensor(32, seed=1, dtype=dtype)]
    for part in range(2):
        both = [functools.partial(lambda f, *x, part: f(*x, 1e-5)[part], f, part=part)
                for f in (ops.add_rms_norm, reference.add_rms_norm)]  # fmt: skip
        agree(*both, inputs)


def test_documents_end_where_the_next_begin():
    assert ends_of(Tensor(CUTS)) is None and ends_of(remember(Tensor(STARTS), STARTS)) is None
    for _ in range(2):
        assert ends_of(remember(Tensor(CUTS), CUTS)) == (5, 8, 16, 28, 32)
    whole = CUTS * 0
    assert ends_of(remember(Tensor(whole), whole)) == (16, 32)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations(name, caplog):
    inputs = [tensor(4, 2, 32, dtype=np.float32), tensor(32, seed=1, dtype=np.float32)]
    kernel, want = (functools.partial(f, name=name) for f in (ops.activation, reference.activation))
    agree(kernel, want, inputs, atol=1e-5)
    assert ("the activation is" in caplog.text) == (name not in ("swiglu", "gelu", "gelu_tanh", "silu", "relu"))


@pytest.mark.parametrize("width", [D, D // 2])
@pytest.mark.parametrize(("interleaved", "samples"), [(False, 1), (False, B), (True, 1), (True, B)])
def test_rotary_positions(interleaved, samples, width, caplog):
    angles = np.random.default_rng(4).uniform(0, 6, (S, samples, 1, width // 2)).astype(np.float32)
    angles = np.repeat(angles, 2, -1) if interleaved else np.concatenate((angles, angles), -1)
    tables = Tensor(np.cos(angles)), Tensor(np.sin(angles))
    kernel, want = (functools.partial(f, cos=tables[0], sin=tables[1], interleaved=interleaved)
                    for f in (ops.rotary, reference.rotary))  # fmt: skip
    agree(kernel, want, [tensor(S, B, N, D)])
    mixed = tensor(S, B, G, (N // G + 2) * D, seed=5)
    got = ops.rotary_packed(mixed, D, *tables, interleaved).asnumpy()
    np.testing.assert_allclose(got, reference.rotary_packed(mixed, D, *tables, interleaved).asnumpy(), atol=4e-3)
    assert ("pairs are neighbours" in caplog.text) == (interleaved and samples > 1)


@pytest.mark.parametrize("uniform", [0.0, 0.01])
def test_gradients_of_logits(uniform):
    """Targets of other ranks stand before and after this rank's rows."""
    logits = tensor(12, 8, dtype=np.float32)
    target, dloss = Tensor(np.arange(12, dtype=np.int32)), tensor(12, seed=1, dtype=np.float32)
    inputs = logits, tensor(12, seed=2, dtype=np.float32), target, 2, dloss, 0.9, uniform
    with mock.patch.object(ascend.ops, "one_hot", side_effect=AssertionError("a tensor of the logits' size")):
        got = ops.vocab_grad_logits(*inputs).asnumpy()
    np.testing.assert_allclose(got, reference.vocab_grad_logits(*inputs).asnumpy(), atol=1e-6)


def test_a_weight_of_more_bits_than_x_goes_to_the_reference(caplog):
    x, weight = tensor(4, 2, 32), tensor(32, dtype=np.float32)
    assert np.array_equal(ops.rms_norm(x, weight, 1e-5).asnumpy(), reference.rms_norm(x, weight, 1e-5).asnumpy())
    assert "x is Float16 and the weight Float32" in caplog.text


@pytest.mark.parametrize("piece", [
    pytest.param(lambda: pieces.compare_kernels(ms.float16, 2e-2, Sizes(16, B, N, G, D, 2)), marks=pytest.mark.slow),
    lambda: pieces.memory(),
], ids=["kernels", "memory"])  # fmt: skip
def test_the_pieces_for_an_npu_pass_here(piece, monkeypatch, capsys):
    """What an NPU is asked runs to its end on the double, so that what fails there is not the question."""
    monkeypatch.setattr(pieces, "_FAILURES", [])
    piece()
    told = capsys.readouterr().out
    assert pieces._FAILURES == [] and "BAD" not in told and told.count("ok  ") >= 7, told
