"""Fused C++ kernels against the plain MindSpore reference, forward and backward, over fuzzed shapes."""

from __future__ import annotations

import contextlib
import functools
import math
from unittest import mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint

from parallel_core import ops
from parallel_core.ops import (
    build,
    library,
    raw,
    reference,
    reference_experts,
    reference_layer,
    reference_meetings,
    registry,
)
from parallel_core.ops.meetings import Meeting

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

TOLERANCE = 1e-6
# Relative to the largest element. Gradients that sum over all T tokens are allowed sqrt(T) roundings on both sides.
SUMMED = 4e-6


@pytest.fixture(autouse=True, scope="module", params=[1, 2], ids=["1thread", "2threads"])
def kernels(request):
    sentence = ops.use_kernels("auto", num_threads=request.param)
    if not sentence.startswith("fused"):
        pytest.skip(sentence)
    yield
    ops.use_kernels("local")


COMPARED = set()
"""Kernels that a test here compares."""


def compares(*names):
    """Say which kernels a test compares; it fails if one of them does not run."""
    COMPARED.update(names)

    def decorate(test):
        @functools.wraps(test)
        def watched(*args, **kwargs):
            ran = set()
            with contextlib.ExitStack() as stack:
                for name in names:
                    entry = registry.KERNELS[name]

                    def selected(*a, name=name, run=entry.selected, **k):
                        ran.add(name)
                        return run(*a, **k)

                    stack.enter_context(mock.patch.object(entry, "selected", selected))
                test(*args, **kwargs)
            assert ran == set(names), f"not compared: {sorted(set(names) - ran)}"

        return watched

    return decorate


def array(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def close(got, want, tolerance=TOLERANCE, what="", floor=1e-30):
    got, want = got.asnumpy(), want.asnumpy()
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = max(floor, float(np.abs(want).max()) if want.size else 1.0)
    assert np.abs(got - want).max(initial=0.0) <= tolerance * scale, f"{what}: {np.abs(got - want).max() / scale:.2e}"


def run(function, arrays, weight):
    """Return the value and the gradients of sum(weight * function(*arrays))."""
    tensors = [Tensor(a) for a in arrays]
    value = function(*tensors)
    loss = ms.grad(lambda *x: (function(*x) * Tensor(weight)).sum(), grad_position=tuple(range(len(arrays))))
    gradients = loss(*tensors)
    return value, gradients if isinstance(gradients, tuple) else (gradients,)


def compare(fused, plain, arrays, rng, summed=()):
    """Check value and gradients; `summed` are the arguments whose gradient sums over tokens."""
    shape = plain(*[Tensor(a) for a in arrays]).shape
    weight = array(rng, *shape)
    got, got_gradients = run(fused, arrays, weight)
    want, want_gradients = run(plain, arrays, weight)
    close(got, want, what="value")
    for i, (g, w) in enumerate(zip(got_gradients, want_gradients)):
        close(g, w, SUMMED if i in summed else TOLERANCE, f"gradient {i}")


SHAPES = [(1, 1, 8), (3, 2, 17), (7, 1, 64), (33, 4, 100), (128, 4, 256), (2, 1, 1031)]


@pytest.mark.parametrize("shape", SHAPES)
@compares("layer_norm", "rms_norm", "add_rms_norm")
def test_norms(shape):
    rng = np.random.default_rng(shape[-1])
    x, w, b = array(rng, *shape) + 0.5, array(rng, shape[-1]), array(rng, shape[-1])
    compare(
        lambda *a: ops.layer_norm(*a, 1e-5), lambda *a: reference.layer_norm(*a, 1e-5), [x, w, b], rng, summed=(1, 2)
    )
    compare(lambda *a: ops.rms_norm(*a, 1e-5), lambda *a: reference.rms_norm(*a, 1e-5), [x, w], rng, summed=(1,))
    both = [lambda *a, f=f: mint.cat(f(*a, 1e-5), -1) for f in (ops.add_rms_norm, reference.add_rms_norm)]
    compare(*both, [x, array(rng, *shape), w], rng, summed=(2,))


def exact_layer_norm(x, w, b, dy, eps):
    """Return value and gradients for x, w and b, in float64."""
    x, w, b, dy = (a.astype(np.float64) for a in (x, w, b, dy))
    scale = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    normal, g = (x - x.mean(-1, keepdims=True)) * scale, dy * w
    dx = scale * (g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True))
    return normal * w + b, dx, (dy * normal).sum(0), dy.sum(0)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e5])
@pytest.mark.parametrize("width", [63, 256, 1031])
def test_layer_norm_of_data_far_from_zero(offset, width):
    """The rounded mean of such data is off by up to 1e-2 standard deviations, and must not shift the output by that."""
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((40, width)) + offset).astype(np.float32)
    w, b, dy = array(rng, width), array(rng, width), array(rng, 40, width)
    exact = exact_layer_norm(x, w, b, dy, 1e-5)
    errors = []
    for norm in (ops.layer_norm, reference.layer_norm):
        value, gradients = run(lambda *a, norm=norm: norm(*a, 1e-5), [x, w, b], dy)
        errors.append([np.abs(got.asnumpy() - want).max() for got, want in zip((value, *gradients), exact)])
    for fused, plain, bound in zip(*errors, (5e-6, 5e-6, 2e-5, 2e-5)):
        assert fused <= max(plain, 5e-6) and fused <= bound


def test_layer_norm_of_equal_elements_is_its_bias():
    x = Tensor(np.full((3, 7), 1e5 / 3, np.float32))
    y = ops.layer_norm(x, Tensor(np.ones(7, np.float32)), Tensor(np.full(7, 0.5, np.float32)), 1e-12).asnumpy()
    np.testing.assert_allclose(y, 0.5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
@pytest.mark.parametrize("with_bias", [False, True])
@compares("activation")
def test_activations(name, with_bias):
    for seed, (S, B, F) in enumerate([(1, 1, 2), (5, 3, 34), (64, 4, 512)]):
        rng = np.random.default_rng(seed)
        arrays = [3 * array(rng, S, B, F)] + ([array(rng, F)] if with_bias else [])

        def call(function, *a):
            return function(a[0], a[1] if with_bias else None, name)

        compare(
            lambda *a: call(ops.activation, *a),
            lambda *a: call(reference.activation, *a),
            arrays,
            rng,
            summed=(1,),
        )


def test_activations_far_from_zero():
    x = Tensor(np.array([-200.0, -90.0, -20.0, -5.0, -0.0, 0.0, 5.0, 20.0, 90.0, 200.0], np.float32))
    for name in sorted(set(ops.ACTIVATIONS) - {"swiglu"}):
        got = ops.activation(x, None, name).asnumpy()
        np.testing.assert_allclose(got, reference.activation(x, None, name).asnumpy(), rtol=1e-6, atol=1e-6)
    assert np.isnan(ops.activation(Tensor(np.full(20, np.nan, np.float32)), None, "gelu").asnumpy()).all()


def test_gelu_is_near_the_exact_one_everywhere():
    """Polynomials stand for the normal distribution: their ends, and every place between, against float64."""
    x = np.linspace(-9, 9, 200_001).astype(np.float32)
    exact = x.astype(np.float64)
    cdf = np.array([0.5 * math.erfc(-a / math.sqrt(2)) for a in exact])
    slope = cdf + exact * np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
    value, (gradient,) = run(lambda a: ops.activation(a, None, "gelu"), [x], np.ones_like(x))
    assert (np.abs(value.asnumpy() - exact * cdf) <= 4e-7 * np.maximum(np.abs(exact), 0.1)).all()
    assert np.abs(gradient.asnumpy() - slope).max() <= 1e-6
    ends = ops.activation(Tensor(np.array([-np.inf, np.inf, np.nan], np.float32)), None, "gelu").asnumpy()
    np.testing.assert_array_equal(ends, [np.nan, np.inf, np.nan])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
@compares("rotary")
def test_rotary(interleaved, per_batch):
    for S, B, N, D, R in [(1, 1, 1, 4, 4), (5, 2, 3, 16, 8), (32, 4, 8, 32, 32)]:
        rng = np.random.default_rng(R)
        cos, sin = (Tensor(array(rng, S, B if per_batch else 1, 1, R)) for _ in range(2))
        angles = {"cos": cos, "sin": sin, "interleaved": interleaved}
        fused, plain = functools.partial(ops.rotary, **angles), functools.partial(reference.rotary, **angles)
        compare(fused, plain, [array(rng, S, B, N, D)], rng)


ATTENTION = [
    (2, 1, 1, 1, 4),
    (5, 2, 2, 1, 8),
    (33, 1, 4, 2, 20),
    (64, 2, 2, 2, 32),
    (128, 2, 4, 2, 64),
    (900, 1, 1, 1, 64),  # more keys than the backward pass takes at a time
    (530, 1, 1, 1, 16),
]


@pytest.mark.parametrize(("N", "plain", "R", "E"), [(1, 3, 2, 5), (4, 16, 8, 16), (3, 8, 6, 4)])
@pytest.mark.parametrize("per_batch", [False, True])
@compares("latent_heads")
def test_latent_heads(N, plain, R, E, per_batch):
    rng, (S, B) = np.random.default_rng(N), (9, 2)
    angle = np.repeat(array(rng, S, B if per_batch else 1, 1, R // 2), 2, -1)
    tables = Tensor(np.cos(angle) * 1.5), Tensor(np.sin(angle) * 1.5)
    arrays = [array(rng, S, B, N, plain + R), array(rng, S, B, N, plain + E), array(rng, S, B, R)]
    for i in range(3):  # each output alone, so that each gradient is that of one output
        compare(
            lambda *a, i=i: ops.latent_heads(*a, *tables)[i],
            lambda *a, i=i: reference.latent_heads(*a, *tables)[i], arrays, rng, summed=(2,),
        )  # fmt: skip


@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize("documents", [False, True])
@compares("causal_attention")
def test_attention(shape, documents):
    S, B, N, G, D = shape
    rng = np.random.default_rng(S)
    start = None
    if documents:
        firsts = np.zeros((B, S), np.int32)
        for b in range(B):
            for cut in sorted(rng.integers(0, S, 3)):
                firsts[b, cut:] = cut
        start = Tensor(firsts)
    options = {"scale": D**-0.5, "softmax_coefficient": 1.5, "document_start_BS": start}
    arrays = [array(rng, S, B, N, D), array(rng, S, B, G, D), array(rng, S, B, G, D)]
    compare(
        lambda *a: ops.causal_attention(*a, **options),
        lambda *a: reference.causal_attention(*a, **options),
        arrays,
        rng,
        summed=(0, 1, 2),
    )


@pytest.mark.parametrize("shape", [(5, 2, 2, 1, 8), (40, 1, 4, 2, 20), (70, 2, 6, 2, 16)])
@compares("causal_attention_packed", "rotary_packed")
def test_packed_attention(shape):
    S, B, N, G, D = shape
    rng = np.random.default_rng(S)
    mixed = array(rng, S, B, G, (N // G + 2) * D)
    options = {"head_size": D, "scale": D**-0.5}
    fused = functools.partial(ops.causal_attention_packed, **options)
    plain = functools.partial(reference.causal_attention_packed, **options)
    compare(fused, plain, [mixed], rng, summed=(0,))
    for interleaved in (False, True):
        cos, sin = (Tensor(array(rng, S, 1, 1, D // 2 // 2 * 2)) for _ in range(2))
        angles = {"head_size": D, "cos": cos, "sin": sin, "interleaved": interleaved}
        fused = functools.partial(ops.rotary_packed, **angles)
        compare(fused, functools.partial(reference.rotary_packed, **angles), [mixed], rng)


@pytest.mark.parametrize(("q_first", "k_first", "T"), [(0, 0, 40), (48, 16, 70), (0, 33, 20), (100, 0, 33)])
@pytest.mark.parametrize("shape", [(40, 2, 4, 2, 8, 8), (33, 1, 4, 4, 20, 12)])
@compares("attention_of_meetings", "attention_of_meetings_grad")
def test_attention_of_a_meeting(shape, q_first, k_first, T):
    """Queries and keys at runs of positions: queries that see no key, other value sizes, more keys than queries."""
    S, B, N, G, D, E = shape
    rng = np.random.default_rng(S)
    start = np.zeros((B, q_first + S + 5), np.int32)
    start[:, q_first : q_first + S] = np.minimum(rng.integers(0, q_first + S, (B, S)), q_first + np.arange(S))
    inputs = [Tensor(array(rng, *dims)) for dims in ((S, B, G, N // G * D), (T, B, G, D + E))]
    meetings = (Meeting(0, q_first, 0, k_first, T),)
    options = {"meetings": meetings, "length": S, "head_size": D, "scale": D**-0.5}
    dout = Tensor(array(rng, S, B, N * E))
    (out, lse), (want, want_lse) = (
        f(*inputs, None, None, Tensor(start), **options) for f in both_of("attention_of_meetings")
    )
    close(out, want, 2e-6, floor=1.0)
    blind = np.isinf(want_lse.asnumpy())
    np.testing.assert_array_equal(np.isinf(lse.asnumpy()), blind)
    assert (out.asnumpy().reshape(S, B, N, E)[blind[0].transpose(2, 0, 1)] == 0).all()
    np.testing.assert_allclose(lse.asnumpy()[~blind], want_lse.asnumpy()[~blind], atol=2e-5)  # MindSpore's exp and log
    functions = both_of("attention_of_meetings_grad")
    for got, wanted in zip(*(f(*inputs, want, dout, want_lse, None, Tensor(start), **options) for f in functions)):
        close(got, wanted, 2e-5, floor=1.0)


@compares("attention_of_meetings", "attention_of_meetings_grad")
def test_meetings_one_after_another():
    """Rows that have seen no key on the one side, on the other, on both; scores whose exponentials overflow."""
    rng = np.random.default_rng(4)
    length, B, N, G, D = 33, 2, 4, 2, 12
    start = np.zeros((B, 5 * length), np.int32)
    start[0, 3 * length + 3 : 4 * length] = 3 * length + 3  # these see none of the keys before their own
    start[1, 3 * length :] = 2 * length + 7
    query, keys = (Tensor(array(rng, 2 * length, B, G, width)) for width in (N // G * D, 2 * D))
    later = Tensor(array(rng, length, B, G, 2 * D))
    dout = Tensor(array(rng, 2 * length, B, N * D))
    first = (Meeting(length, 3 * length, 0, 2 * length, 2 * length), Meeting(0, 4 * length, length, length, length))
    then = (Meeting(0, 4 * length, 0, 4 * length, length),)
    options = {"length": length, "head_size": D, "scale": 30.0}
    results = []
    for attend, attend_grad in zip(both_of("attention_of_meetings"), both_of("attention_of_meetings_grad")):
        found = attend(query, keys, None, None, Tensor(start), meetings=first, **options)
        found = [x.asnumpy().copy() for x in attend(query, later, *found, Tensor(start), meetings=then, **options)]
        results.append(found)
        given = [Tensor(x) for x in results[0]]
        dquery, of_later = attend_grad(
            query, later, given[0], dout, given[1], None, Tensor(start), meetings=then, **options
        )
        of_both = attend_grad(query, keys, given[0], dout, given[1], dquery, Tensor(start), meetings=first, **options)
        results[-1] = [*found, of_later.asnumpy(), *(x.asnumpy() for x in of_both)]
    (out, log, *gradients), (want, want_log, *wanted) = results
    close(Tensor(out), Tensor(want), 2e-5, floor=1.0)
    np.testing.assert_allclose(log, want_log, rtol=1e-6)
    assert np.isfinite(log).all() and np.abs(log).max() > 88.0
    for got, one in zip(gradients, wanted):
        close(Tensor(got), Tensor(one), 1e-4)  # scores of 300 are off by 3e-5


def both_of(name):
    return getattr(ops, name), getattr(reference_meetings, name)


def test_packed_attention_is_attention():
    """The reference of packed attention, too, agrees with queries, keys and values taken apart by NumPy."""
    rng = np.random.default_rng(0)
    S, B, G, per_group, D = 9, 2, 2, 3, 8
    mixed = array(rng, S, B, G, per_group + 2, D)
    query, key, value = mixed[:, :, :, :per_group], mixed[:, :, :, per_group], mixed[:, :, :, per_group + 1]
    parts = [Tensor(np.ascontiguousarray(a).reshape(S, B, -1, D)) for a in (query, key, value)]
    want = reference.causal_attention(*parts, scale=0.3)
    for function in (ops.causal_attention_packed, reference.causal_attention_packed):
        close(function(Tensor(mixed.reshape(S, B, G, -1)), D, scale=0.3), want)


@compares("split_last_dim")
def test_split_last_dim():
    rng = np.random.default_rng(2)
    x, widths = array(rng, 7, 3, 12), (4, 6, 2)

    def rejoined(function, x):
        a, b, c = function(x, widths)
        return ms.mint.cat((c * 3.0, a, b * 2.0), -1)

    compare(functools.partial(rejoined, ops.split_last_dim), lambda x: rejoined(np_split, x), [x], rng)


def np_split(x, widths):
    return [x[..., 0:4], x[..., 4:10], x[..., 10:12]]


def test_attention_with_dropout_is_the_gradient_of_what_it_computes():
    """Attention is linear in V, and its weights can be read off by V = identity: so dropout masks are visible."""
    S = D = 48
    rng = np.random.default_rng(0)
    query, key = array(rng, S, 1, 1, D), array(rng, S, 1, 1, D)
    identity = np.eye(S, dtype=np.float32).reshape(S, 1, 1, D)

    def weights(rate, seed=(3, 5)):
        q, k, v = Tensor(query), Tensor(key), Tensor(identity)
        out = ops.causal_attention(q, k, v, scale=0.3, dropout_rate=rate, dropout_seed=seed)
        return out.asnumpy().reshape(S, S)

    plain, dropped = weights(0.0), weights(0.25)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], plain[kept] / 0.75, rtol=2e-6)
    lower = np.tril(np.ones((S, S), bool))
    assert 0.15 < 1 - kept[lower].mean() < 0.35
    np.testing.assert_array_equal(dropped, weights(0.25))
    assert (weights(0.25, (3, 6)) != dropped).any()

    # The gradients are those of softmax(..) * mask / keep, with the mask that was just read off.
    mask = Tensor((kept / 0.75).astype(np.float32))
    causal = Tensor(np.where(lower, 0, -10000).astype(np.float32))
    value, weight = array(rng, S, 1, 1, D), array(rng, S, 1, D)

    def explicit(q, k, v):
        q, k, v = (x.reshape(S, D) for x in (q, k, v))
        probabilities = ms.ops.softmax(ms.ops.matmul(q, k.transpose()) * 0.3 + causal, -1)
        return ms.ops.matmul(probabilities * mask, v).reshape(S, 1, D)

    def fused(q, k, v):
        return ops.causal_attention(q, k, v, scale=0.3, dropout_rate=0.25, dropout_seed=(3, 5))

    got, want = (run(f, [query, key, value], weight) for f in (fused, explicit))
    close(got[0], want[0], 2e-6)
    for g, w in zip(got[1], want[1]):
        close(g, w, SUMMED)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
@compares("dropout", "bias_dropout_add")
def test_dropout_and_residual(rate):
    rng = np.random.default_rng(1)
    x, bias, residual = array(rng, 40, 3, 37), array(rng, 37), array(rng, 40, 3, 37)
    seed = (7, 1 << 40)
    ones = ops.dropout(Tensor(np.ones_like(x)), rate, seed).asnumpy()
    assert set(np.unique(ones)) <= {np.float32(0), np.float32(1 / np.float32(1 - rate))}
    assert abs((ones == 0).mean() - rate) < 0.03
    compare(
        lambda *a: ops.bias_dropout_add(*a, rate, seed),
        lambda x, b, r: r + (x + b) * Tensor(ones),
        [x, bias, residual],
        rng,
        summed=(1,),
    )
    again = ops.dropout(Tensor(np.ones_like(x)), rate, seed).asnumpy()
    np.testing.assert_array_equal(again, ones)


def test_dropout_masks_do_not_depend_on_threads():
    x = Tensor(np.ones((300, 2, 64), np.float32))
    ops.use_kernels("auto", num_threads=1)
    one = ops.dropout(x, 0.3, (1, 2)).asnumpy()
    ops.use_kernels("auto", num_threads=2)
    np.testing.assert_array_equal(ops.dropout(x, 0.3, (1, 2)).asnumpy(), one)


LINEARS = [(1, 1, 1), (3, 5, 7), (65, 33, 130), (256, 128, 384), (100, 400, 20), (70, 96, 2048)]


@pytest.mark.parametrize("sizes", LINEARS)
@pytest.mark.parametrize("with_bias", [False, True])
@compares("linear", "linear_grad_input", "linear_grad_weight", "linear_grad_weight_", "linear_grad_bias")
def test_linear(sizes, with_bias):
    """Among them products that oneDNN's two ways to multiply share, each with what it is fast at."""
    T, I, O = sizes
    rng = np.random.default_rng(T)
    x, w, dy = Tensor(array(rng, T, I)), Tensor(array(rng, O, I)), Tensor(array(rng, T, O))
    bias = Tensor(array(rng, O)) if with_bias else None
    close(ops.linear(x, w, bias), reference.linear(x, w, bias))
    close(ops.linear_grad_input(dy, w), reference.linear_grad_input(dy, w))
    want = reference.linear_grad_weight(dy, x)
    close(ops.linear_grad_weight(dy, x), want)
    into = array(rng, O, I)
    added = into.copy()
    ops.linear_grad_weight_(added, dy, x, True)
    close(Tensor(added), Tensor(into + want.asnumpy()))
    close(ops.linear_grad_bias(dy), reference.linear_grad_bias(dy), SUMMED)


def test_linear_keeps_leading_dims():
    rng = np.random.default_rng(4)
    x, w, dy = Tensor(array(rng, 3, 5, 8)), Tensor(array(rng, 6, 8)), Tensor(array(rng, 3, 5, 6))
    close(ops.linear(x, w, None), reference.linear(x, w, None))
    close(ops.linear_grad_input(dy, w), reference.linear_grad_input(dy, w))
    close(ops.linear_grad_weight(dy, x), reference.linear_grad_weight(dy, x))
    close(ops.linear_grad_bias(dy), reference.linear_grad_bias(dy))
    want = np.einsum("abo,abi->oi", dy.asnumpy(), x.asnumpy())
    np.testing.assert_allclose(reference.linear_grad_weight(dy, x).asnumpy(), want, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 3, 1), (50, 40, 7), (512, 300, 64)])
@compares("embedding", "embedding_grad_table")
def test_embedding(sizes):
    T, V, H = sizes
    rng = np.random.default_rng(V)
    table, dy = Tensor(array(rng, V, H)), Tensor(array(rng, T, H))
    first = 11
    for dtype in (np.int32, np.int64):
        ids = Tensor(rng.integers(0, V + 2 * first, T).astype(dtype))
        close(ops.embedding(ids, table, first), reference.embedding(ids, table, first), 0.0)
        for half in HALVES:  # exact
            operands = ids, table.astype(half), first, ms.float32
            close(ops.embedding(*operands), reference.embedding(*operands), 0.0)
        got, want = (f.embedding_grad_table(dy, ids, V, first) for f in (ops, reference))
        close(got, want, SUMMED)


@pytest.mark.parametrize("add", [False, True])
@compares("linear_grad_weight_", "linear_grad_bias_", "embedding_grad_table_")
def test_gradients_written_in_place(add):
    """What was there before is kept when added to, and of no influence when not."""
    rng = np.random.default_rng(5)
    dy, x, ids = Tensor(array(rng, 65, 7)), Tensor(array(rng, 65, 9)), Tensor(rng.integers(0, 30, 65).astype(np.int32))
    before = array(rng, 7, 9), array(rng, 20, 7), array(rng, 65 * 7), array(rng, 65 * 7), array(rng, 7)
    got, want = ([a.copy() for a in before] for _ in range(2))
    if not add:
        for a in got:
            a.fill(np.nan)
    for module, out in ((ops, got), (reference, want)):
        module.linear_grad_weight_(out[0], dy, x, add)
        module.embedding_grad_table_(out[1], dy, ids, 5, add)
        module.linear_grad_bias_(out[4], dy, add)
        (module.add_ if add else module.write_)(out[2], dy)
        (module.add_ if add else module.write_)(out[3], Tensor(np.ascontiguousarray(dy.asnumpy().T)).T)  # a view
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
    exact = dy.asnumpy().T @ x.asnumpy() + (before[0] if add else 0)
    np.testing.assert_allclose(got[0], exact, rtol=1e-5, atol=1e-5)


@compares("side_by_side", "multiplied", "multiplied_by", "plus_multiple", "gated", "bias_dropout_add")
def test_what_layers_put_between_their_parts():
    rng = np.random.default_rng(0)
    x, y, factors = array(rng, 5, 2, 8), array(rng, 5, 2, 8), Tensor(array(rng, 5, 2, 8))
    bias, scores = array(rng, 8), 100.0 * array(rng, 5, 2, 1)

    def functions(module):
        yield module.side_by_side, [x, scores]
        yield functools.partial(module.multiplied, factor=3.5), [x]
        yield functools.partial(module.multiplied_by, factors=factors), [x]
        yield functools.partial(module.plus_multiple, factor=0.3), [x, y]
        yield module.gated, [x, scores / 100.0]
        yield lambda x, b: module.bias_dropout_add(x, b, None, 0.0, (0, 0)), [x, bias]

    for (fused, inputs), (plain, _) in zip(functions(ops), functions(reference)):
        compare(fused, plain, inputs, rng, summed=(1,))
    one = Tensor(np.float32(2.0))
    assert float(ops.multiplied(one, 3.0)) == 6.0 and float(ops.plus_multiple(one, one, 3.0)) == 8.0
    gates = ops.gated(Tensor(np.ones((5, 2, 8), np.float32)), Tensor(scores)).asnumpy()
    assert np.isfinite(gates).all() and gates.min() < 1e-30 and gates.max() == 1.0
    for module in (ops, reference):
        kept = module.bias_dropout_add(Tensor(x), Tensor(bias), None, 0.5, (1, 2)).asnumpy() != 0.0
        assert 0.0 < kept.mean() < 1.0
    assert ops.bias_dropout_add(one, None, None, 0.0, (0, 0)) is one


@compares("reordered")
def test_rows_in_another_order():
    x = Tensor(array(np.random.default_rng(0), 12, 2, 3))
    for order in ((2, 0, 1), (0, 3, 2, 1)):
        np.testing.assert_array_equal(ops.reordered(x, order).asnumpy(), reference.reordered(x, order).asnumpy())


@compares("packed_heads", "shifted")
def test_heads_that_are_packed_and_weights_around_one():
    rng = np.random.default_rng(0)
    parts = [Tensor(array(rng, 3, 2, 4, width)) for width in (10, 5, 5)]
    dmixed = Tensor(array(rng, 3, 2, 4, 20))
    for got, want in zip(*(
        ms.grad(lambda *a, m=module: (m.shifted(m.packed_heads(*a), 1.0) * dmixed).sum(), (0, 1, 2))(*parts)
        for module in (ops, reference)
    )):  # fmt: skip
        close(got, want, 0.0)
    close(ops.shifted(ops.packed_heads(*parts), 1.0), reference.shifted(reference.packed_heads(*parts), 1.0), 0.0)


@compares("transposed", "masked_sum", "mean_loss")
def test_the_mean_of_a_loss():
    """Through all three, with the gradient of the first; a batch of no tokens has loss 0, not a quotient of zeros."""
    rng = np.random.default_rng(0)
    for counts in (0.0, 0.7):
        values, mask = Tensor(array(rng, 5, 7)), Tensor((rng.random((7, 5)) < counts).astype(np.float32))

        def loss(module, values, mask=mask):
            total, number = module.masked_sum(module.transposed(values), mask)
            return module.mean_loss(total, number, 1.0) + module.mean_loss(total, number, 3.0)

        got, want = (ms.value_and_grad(lambda v, m=module: loss(m, v))(values) for module in (ops, reference))
        close(got[0], want[0], SUMMED)
        close(got[1], want[1], SUMMED)
        assert np.isfinite(got[0].asnumpy()).all() and (counts or not got[1].asnumpy().any())
    assert np.array_equal(ops.transposed(Tensor([[1, 2, 3]], ms.int32)).asnumpy(), [[1], [2], [3]])


@compares("total", "shaped")
def test_sums_and_shapes():
    rng = np.random.default_rng(0)
    x, y = Tensor(array(rng, 5, 3, 700)), Tensor(array(rng, 5, 3, 700))
    before = x.asnumpy().copy()
    close(ops.total(x, y), reference.total(x, y), 0.0)
    assert np.array_equal(x.asnumpy(), before)
    none = Tensor(np.zeros(0, np.float32))
    assert ops.total(none, none).shape == (0,)
    for tensor in (x, Tensor(rng.integers(0, 9, (4, 6)).astype(np.int32)), x.astype(ms.bfloat16)):
        got = ops.shaped(tensor, (tensor.size,))
        assert got.dtype == tensor.dtype and np.array_equal(got.asnumpy(), tensor.reshape(-1).asnumpy())


@pytest.mark.parametrize("sizes", [(1, 2), (17, 33), (64, 1000), (8, 8192)])
@compares("vocab_statistics", "vocab_sums_of", "vocab_losses", "vocab_grad_logits")
def test_vocabulary(sizes):
    T, V = sizes
    rng = np.random.default_rng(V)
    logits, first = Tensor(5 * array(rng, T, V)), 3
    target = Tensor(rng.integers(-1, V + 2 * first, T).astype(np.int32))
    statistics = reference.vocab_statistics(logits, target, first)
    for got, want in zip(ops.vocab_statistics(logits, target, first), statistics):
        close(got, want, SUMMED)
    largest, sums = statistics
    higher = largest + Tensor(np.abs(array(rng, T)))
    close(ops.vocab_sums_of(sums, largest, higher), reference.vocab_sums_of(sums, largest, higher), 6e-6)
    dloss = Tensor(array(rng, T))
    for smoothing in (0.0, 0.1):
        of_loss = largest, sums, target, 1.0 - smoothing, smoothing / V
        for got, want in zip(ops.vocab_losses(*of_loss), reference.vocab_losses(*of_loss)):
            close(got, want, SUMMED)
        log_sum_exp = reference.vocab_losses(*of_loss)[1]
        arguments = (logits, log_sum_exp, target, first, dloss, 1.0 - smoothing, smoothing / V)
        # softmax - onehot cancels where the target is likely: errors are relative to dloss, not to what is left. And
        # MindSpore's exp is off by up to 6e-6, ours by 1e-7.
        floor = float(np.abs(dloss.asnumpy()).max())
        got = ops.vocab_grad_logits(*arguments)
        close(got, reference.vocab_grad_logits(*arguments), 6e-6, floor=floor)
        in_place = ops.vocab_grad_logits(Tensor(logits.asnumpy().copy()), *arguments[1:], reuse_logits=True)
        close(in_place, got, 0.0)
        exact = np.exp(logits.asnumpy().astype(np.float64) - log_sum_exp.asnumpy()[:, None]) - smoothing / V
        rows = target.asnumpy() - first
        inside = (rows >= 0) & (rows < V)
        exact[np.flatnonzero(inside), rows[inside]] -= 1.0 - smoothing
        exact[target.asnumpy() < 0] = 0.0
        close(got, Tensor((exact * dloss.asnumpy()[:, None]).astype(np.float32)), floor=floor)


@compares("vocab_statistics")
def test_vocabulary_with_logits_that_are_no_numbers():
    """Runs of -infinity, longer than a vector and than a block of them, count nothing; NaN stays."""
    rng = np.random.default_rng(0)
    logits, target = 300 * array(rng, 4, 1500), Tensor(np.zeros(4, np.int32))
    logits[0, :700] = logits[1, 700:] = logits[2, 1::2] = -np.inf
    logits[3, 9] = np.nan
    largest, (sum_exp, _, total) = (x.asnumpy() for x in ops.vocab_statistics(Tensor(logits), target, 0))
    exact = logits[:3].astype(np.float64)
    np.testing.assert_array_equal(largest[:3], logits[:3].max(1))
    np.testing.assert_allclose(sum_exp[:3], np.exp(exact - exact.max(1, keepdims=True)).sum(1), rtol=1e-6)
    np.testing.assert_array_equal(total[:3], -np.inf)
    assert np.isnan(sum_exp[3]) and np.isnan(total[3])


def test_non_contiguous_inputs():
    rng = np.random.default_rng(0)
    x = Tensor(array(rng, 6, 4, 32)).transpose(1, 0, 2)
    w, b = Tensor(array(rng, 32)), Tensor(array(rng, 32))
    close(ops.layer_norm(x, w, b, 1e-5), reference.layer_norm(x, w, b, 1e-5))
    close(ops.activation(x, b, "gelu"), reference.activation(x, b, "gelu"))
    wide = Tensor(array(rng, 8, 64))[:, 16:48]
    close(ops.linear(wide, Tensor(array(rng, 5, 32)), None), reference.linear(wide, Tensor(array(rng, 5, 32)), None), 9)
    m = Tensor(array(rng, 5, 32))
    close(ops.linear(wide, m, None), reference.linear(wide, m, None))


def test_other_dtypes_use_the_reference():
    rng = np.random.default_rng(0)
    x, w = Tensor(array(rng, 4, 8).astype(np.float16)), Tensor(array(rng, 8))
    got = ops.rms_norm(x, w, 1e-5)
    assert got.dtype == ms.float16
    close(got, reference.rms_norm(x, w, 1e-5), 0.0)


@pytest.mark.parametrize("n", [1, 4097, 200_001])
@compares("sum_of_squares", "adam_", "add_", "write_")
def test_flat_buffers(n):
    rng = np.random.default_rng(n)
    flat = array(rng, n)
    exact = float((flat.astype(np.float64) ** 2).sum())
    assert abs(ops.sum_of_squares(flat) / exact - 1) < 1e-6
    state = [array(rng, n), array(rng, n), array(rng, n), np.abs(array(rng, n))]
    got, want = ([a.copy() for a in state] for _ in range(2))
    for step in (1, 2, 10):
        options = {"step": step, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.7}
        ops.adam_(*got, **options)
        reference.adam_(*want, **options)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=2e-6, atol=1e-7)
    added, written = flat.copy(), np.full(n, np.nan, np.float32)
    ops.add_(added, Tensor(state[0]))
    ops.write_(written, Tensor(state[0]))
    np.testing.assert_array_equal(added, flat + state[0])
    np.testing.assert_array_equal(written, state[0])


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 70, 0], [0, 0], [1], [40, 37, 1, 0, 22]])
@compares("grouped_linear", "grouped_linear_grad_input", "grouped_linear_grad_weight", "grouped_linear_grad_weight_")
def test_products_of_rows_with_their_experts_weight(counts):
    """Experts without a row, one with all, and no row at all."""
    rng, counts = np.random.default_rng(len(counts)), np.array(counts, np.int64)
    N, E, I, O = int(counts.sum()), len(counts), 48, 80
    x, w, dy = Tensor(array(rng, N, I)), Tensor(array(rng, E, O, I)), Tensor(array(rng, N, O))
    close(ops.grouped_linear(x, w, counts), reference_experts.grouped_linear(x, w, counts))
    close(ops.grouped_linear_grad_input(dy, w, counts), reference_experts.grouped_linear_grad_input(dy, w, counts))
    want = reference_experts.grouped_linear_grad_weight(dy, x, counts)
    close(ops.grouped_linear_grad_weight(dy, x, counts), want, SUMMED)
    empty = counts == 0
    assert not want.asnumpy()[empty].any()
    for add in (False, True):
        into = array(rng, E, O, I)
        expected = want.asnumpy() + (into if add else 0)
        ops.grouped_linear_grad_weight_(into, dy, x, counts, add)
        np.testing.assert_allclose(into, expected, atol=2e-5)
        assert add or not into[empty].any()


@pytest.mark.parametrize(("T", "N"), [(7, 11), (300, 900), (1, 0)])
@compares("gather_rows", "sum_rows")
def test_rows_by_number(T, N):
    rng = np.random.default_rng(T)
    x, y = Tensor(array(rng, T, 257)), Tensor(array(rng, max(N, 1), 257))
    index = rng.integers(-1, T, N).astype(np.int32)
    close(ops.gather_rows(x, index), reference_experts.gather_rows(x, index), 0.0)
    places = rng.integers(-1, max(N, 1), (T, 3)).astype(np.int32)
    places[0] = -1
    close(ops.sum_rows(y, places), reference_experts.sum_rows(y, places))


@pytest.mark.parametrize("name", ["swiglu", "gelu", "gelu_tanh", "silu", "squared_relu"])
@compares("scaled_activation")
def test_weighted_rows_of_an_activation(name):
    rng = np.random.default_rng(3)
    x, scale = array(rng, 70, 64), np.abs(array(rng, 70))
    compare(
        lambda *a: ops.scaled_activation(*a, name), lambda *a: reference_experts.scaled_activation(*a, name),
        [x, scale], rng, summed=(1,),
    )  # fmt: skip


HALVES = [ms.bfloat16, ms.float16]


@pytest.fixture
def bf16_products(kernels):
    if not library.use_bf16_products(True):
        pytest.skip("this CPU does not multiply bfloat16 numbers faster")
    yield
    library.use_bf16_products(False)


@pytest.mark.parametrize(("T", "I", "O"), [(3, 5, 7), (70, 129, 33), (96, 4100, 65), (40, 65, 4100)])
@pytest.mark.parametrize("dtype", HALVES)
@compares("linear", "linear_grad_input")
def test_products_with_weights_of_16_bits(T, I, O, dtype):
    """They are read as they are: the results are those of the same numbers in float32."""
    rng = np.random.default_rng(T)
    x, dy, w, b = (Tensor(array(rng, *shape)) for shape in ((T, I), (T, O), (O, I), (O,)))
    w, b = w.astype(dtype), b.astype(dtype)
    wide = [Tensor(t.astype(ms.float32).asnumpy()) for t in (w, b)]
    close(ops.linear(x, w, b), reference.linear(x, *wide), SUMMED)
    close(ops.linear_grad_input(dy, w), reference.linear_grad_input(dy, wide[0]), SUMMED)


@pytest.mark.parametrize("dtype", HALVES)
@compares("linear_grad_weight_", "linear_grad_bias_", "embedding_grad_table_", "grouped_linear_grad_weight_")
def test_sums_of_16_bits_take_a_gradient_as_a_whole(dtype):
    """Products and sums are made in float32, and what is added is rounded once: each number is the nearest, or next."""
    rng = np.random.default_rng(5)
    T, I, O = 96, 65, 4100  # more than one block of a thread
    x, dy = Tensor(array(rng, T, I)), Tensor(array(rng, T, O))
    ids, counts = Tensor(rng.integers(0, 9, T).astype(np.int32)), np.array([40, 0, 56], np.int64)
    wide = {
        "linear_grad_weight_": (reference.linear_grad_weight(dy, x), (dy, x)),
        "linear_grad_bias_": (reference.linear_grad_bias(dy), (dy,)),
        "embedding_grad_table_": (reference.embedding_grad_table(x, ids, 11, 2), (x, ids, 2)),
        "grouped_linear_grad_weight_": (reference_experts.grouped_linear_grad_weight(x, dy, counts), (x, dy, counts)),
    }
    for name, (gradient, operands) in wide.items():
        for add in (False, True):
            into = Tensor(array(rng, *gradient.shape)).astype(dtype).asnumpy()
            exact = gradient.asnumpy().astype(np.float64) + (into.astype(np.float64) if add else 0.0)
            for module in (ops, reference_experts if name.startswith("grouped") else reference):
                got = into.copy()
                getattr(module, name)(got, *operands, add)
                step = np.abs(exact) * (2.0**-8 if dtype == ms.bfloat16 else 2.0**-11)
                assert (np.abs(got.astype(np.float64) - exact) <= 1.01 * step + 1e-4).all(), (name, module.__name__)


@pytest.mark.parametrize("dtype", HALVES)
@compares("adam_", "sum_of_squares")
def test_an_update_reads_gradients_of_16_bits_and_writes_such_weights(dtype):
    rng, n = np.random.default_rng(1), 5000
    grad = Tensor(array(rng, n)).astype(dtype).asnumpy()
    state = [array(rng, n), array(rng, n), np.abs(array(rng, n))]
    options = {"step": 2, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.7}
    found = []
    for module, gradient in ((ops, grad), (reference, grad), (ops, grad.astype(np.float32))):
        (param, m, v), copy = (a.copy() for a in state), np.zeros_like(grad)
        module.adam_(param, gradient, m, v, rounded=copy, **options)
        np.testing.assert_array_equal(copy, param.astype(grad.dtype))
        found.append((param, m, v))
    for got, want, wide in zip(*found):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)
        np.testing.assert_array_equal(got, wide)
    assert ops.sum_of_squares(grad) == ops.sum_of_squares(grad.astype(np.float32))
    assert abs(reference.sum_of_squares(grad) / ops.sum_of_squares(grad) - 1) < 1e-6


@pytest.mark.parametrize(
    ("T", "I", "O"), [(33, 8, 24), (512, 256, 100), (128, 1031, 7), (40, 520, 1030), (1030, 513, 1)]
)
@pytest.mark.parametrize("weight_type", [ms.float32, *HALVES])
def test_products_of_bfloat16_operands_have_float32_sums(T, I, O, weight_type, bf16_products):
    """Against float64 sums of the rounded operands; a bias and what is added to stay in float32."""
    rng = np.random.default_rng(T)
    x, dy, b, into = array(rng, T, I), array(rng, T, O), array(rng, O), array(rng, O, I)
    w = Tensor(array(rng, O, I)).astype(weight_type)

    def rounded(values):
        return Tensor(values).astype(ms.bfloat16).astype(ms.float32).asnumpy().astype(np.float64)

    x16, dy16, w16 = rounded(x), rounded(dy), rounded(w.astype(ms.float32).asnumpy())

    def near(got, want):
        assert np.abs(got - want).max() <= 3e-6 * np.abs(want).max()

    near(ops.linear(Tensor(x), w, Tensor(b)).asnumpy(), x16 @ w16.T + b)
    near(ops.linear_grad_input(Tensor(dy), w).asnumpy(), dy16 @ w16)
    near(ops.linear_grad_weight(Tensor(dy), Tensor(x)).asnumpy(), dy16.T @ x16)
    added = into.copy()
    ops.linear_grad_weight_(added, Tensor(dy), Tensor(x), True)
    near(added, into + dy16.T @ x16)
    with ops.exact_products():
        exact = ops.linear_grad_weight(Tensor(dy), Tensor(x)).asnumpy()
    near(exact, dy.astype(np.float64).T @ x)
    assert np.abs(exact - dy16.T @ x16).max() > 1e-4
    near(ops.linear_grad_weight(Tensor(dy), Tensor(x)).asnumpy(), dy16.T @ x16)


@pytest.mark.parametrize("rounds", [False, True])
@compares("linear_grad_weight", "linear_grad_weight_", "linear_grad_input")
def test_no_tokens_give_zeros(rounds, request):
    if rounds:
        request.getfixturevalue("bf16_products")
    x, dy, w = (Tensor(np.empty(shape, np.float32)) for shape in ((0, 40), (0, 24), (24, 40)))
    for add, before, after in ((False, np.nan, 0.0), (True, 3.0, 3.0)):
        into = np.full((24, 40), before, np.float32)
        ops.linear_grad_weight_(into, dy, x, add)
        assert (into == after).all()
    assert not ops.linear_grad_weight(dy, x).asnumpy().any()
    assert ops.linear_grad_input(dy, w).shape == (0, 40)


@pytest.mark.parametrize("weight_type", [ms.float32, *HALVES])
@compares("grouped_linear", "grouped_linear_grad_input", "grouped_linear_grad_weight", "grouped_linear_grad_weight_")
def test_products_of_experts_round_what_linear_layers_round(weight_type, bf16_products):
    """Against products of the rounded operands; a few rows are multiplied as they are, and no rows leave zeros."""
    rng = np.random.default_rng(3)
    counts, (I, O) = np.array([40, 0, 7, 56], np.int64), (65, 300)
    x, dy, into = array(rng, 103, I), array(rng, 103, O), array(rng, 4, O, I)
    w = Tensor(array(rng, 4, O, I)).astype(weight_type)
    rounded = lambda values: Tensor(values).astype(ms.bfloat16).astype(ms.float32)  # noqa: E731
    x16, dy16, w16 = map(rounded, (x, dy, w.astype(ms.float32).asnumpy()))
    got = (
        ops.grouped_linear(Tensor(x), w, counts),
        ops.grouped_linear_grad_input(Tensor(dy), w, counts),
        ops.grouped_linear_grad_weight(Tensor(dy), Tensor(x), counts),
    )
    with ops.exact_products():
        want = (
            reference_experts.grouped_linear(x16, w16, counts),
            reference_experts.grouped_linear_grad_input(dy16, w16, counts),
            reference_experts.grouped_linear_grad_weight(dy16, x16, counts),
        )
        exact = ops.grouped_linear_grad_weight(Tensor(dy), Tensor(x), counts)
    for ours, theirs in zip(got, want):
        close(ours, theirs, SUMMED)
    assert np.abs(exact.asnumpy() - want[2].asnumpy()).max() > 1e-3 and not exact.asnumpy()[1].any()
    ops.grouped_linear_grad_weight_(into, Tensor(dy), Tensor(x), counts, False)
    np.testing.assert_array_equal(into, got[2].asnumpy())
    few, counts = Tensor(x[:32]), np.array([20, 0, 5, 7], np.int64)
    wide = Tensor(w.astype(ms.float32).asnumpy())
    close(ops.grouped_linear(few, w, counts), reference_experts.grouped_linear(few, wide, counts), SUMMED)


@pytest.mark.parametrize(("rate", "documents"), [(0.0, False), (0.0, True), (0.25, True)])
@pytest.mark.parametrize("shape", [(33, 1, 2, 2, 8), (77, 2, 4, 2, 20), (301, 1, 3, 1, 64), (270, 1, 2, 2, 33)])
@compares("causal_attention")
def test_attention_of_bfloat16_operands(shape, rate, documents, bf16_products):
    """Products of rounded numbers and of rounded weights, each of which is right to 2^-9, against those of float32."""
    S, B, N, G, D = shape
    rng = np.random.default_rng(S)
    cuts = np.sort(rng.integers(0, S, (B, 3)), 1)
    firsts = np.stack([np.searchsorted(c, np.arange(S), "right") for c in cuts])
    starts = np.take_along_axis(np.pad(cuts, ((0, 0), (1, 0))), firsts, 1).astype(np.int32)
    options = {
        "scale": D**-0.5, "dropout_rate": rate, "dropout_seed": (3, 5),
        "document_start_BS": Tensor(starts) if documents else None,
    }  # fmt: skip
    arrays = [Tensor(array(rng, S, B, heads, D)) for heads in (N, G, G)]
    dout = Tensor(array(rng, S, B, N * D))

    def results():
        attend = lambda *a: (ops.causal_attention(*a, **options) * dout).sum()  # noqa: E731
        return ops.causal_attention(*arrays, **options), *ms.grad(attend, (0, 1, 2))(*arrays)

    got = results()
    with ops.exact_products():
        want = results()
    near_in_bfloat16(got, want)
    assert np.abs(got[0].asnumpy() - want[0].asnumpy()).max() > 1e-4


@pytest.mark.parametrize(("q_first", "k_first", "T"), [(0, 0, 41), (48, 16, 70), (0, 33, 21), (100, 0, 333)])
@compares("attention_of_meetings", "attention_of_meetings_grad")
def test_meetings_of_bfloat16_operands(q_first, k_first, T, bf16_products):
    """The same where queries and keys are runs of positions and other keys came before."""
    rng = np.random.default_rng(T)
    S, B, N, G, D, E = 41, 1, 4, 2, 20, 12
    inputs = [Tensor(array(rng, *dims)) for dims in ((S, B, G, N // G * D), (T, B, G, D + E))]
    options = {"length": S, "head_size": D, "scale": D**-0.5}
    before, then = ((Meeting(0, q, 0, k, T),) for q, k in ((q_first + T, 0), (q_first, k_first)))
    dout = Tensor(array(rng, S, B, N * E))

    def attended():
        found = ops.attention_of_meetings(*inputs, None, None, None, meetings=before, **options)
        found = ops.attention_of_meetings(*inputs, *found, None, meetings=then, **options)
        return [Tensor(x.asnumpy().copy()) for x in found]

    def gradients(out, lse):
        found = ops.attention_of_meetings_grad(*inputs, out, dout, lse, None, None, meetings=then, **options)
        return [Tensor(x.asnumpy().copy()) for x in found]

    out, lse = attended()
    got = gradients(out, lse)
    with ops.exact_products():
        near_in_bfloat16([out, *got], [attended()[0], *gradients(out, lse)])


def near_in_bfloat16(got, want):
    """A key or a query that is left out, or taken twice, is further off."""
    for ours, theirs in zip(got, want):
        theirs = theirs.asnumpy()
        error = ours.asnumpy() - theirs
        assert np.abs(error).max() <= 0.02 * np.abs(theirs).max()
        assert np.sqrt((error**2).mean()) <= 0.006 * np.sqrt((theirs**2).mean())


@compares("linear_and_operand", "linear_grad_input_and_operand")
def test_the_copies_that_were_multiplied_give_the_weights_gradient(bf16_products):
    """The same bits as x and dy themselves; nothing else of 16 bits is taken for such a copy."""
    rng = np.random.default_rng(2)
    for O in (128, 512):  # shared between threads by rows, and by columns
        x, dy, w = Tensor(array(rng, 2, 64, 256)), Tensor(array(rng, 2, 64, O)), Tensor(array(rng, O, 256))
        (y, x16), (dx, dy16) = ops.linear_and_operand(x, w, None), ops.linear_grad_input_and_operand(dy, w)
        close(y, ops.linear(x, w, None), 0.0)
        close(dx, ops.linear_grad_input(dy, w), 0.0)
        want = ops.linear_grad_weight(dy, x)
        for left, right in ((dy16, x16), (dy16, x), (dy, x16)):
            close(ops.linear_grad_weight(left, right), want, 0.0)
            into = np.full((O, 256), np.nan, np.float32)
            ops.linear_grad_weight_(into, left, right, False)
            close(Tensor(into), want, 0.0)
        for copy, of in ((x16, x), (dy16, dy)):
            close(copy.astype(ms.float32), of.astype(ms.bfloat16).astype(ms.float32), 0.0)
    few = Tensor(array(rng, 32, 256))
    assert ops.linear_and_operand(few, w, None)[1].dtype == ms.float32
    assert not raw._foreign(x16, dy)
    assert raw._foreign(dy, x.astype(ms.float16)) == "x or dy is Float16"
    with ops.exact_products():
        assert ops.linear_and_operand(x, w, None)[1].dtype == ms.float32
        assert raw._foreign(x16) == "x or dy is BFloat16"


@compares("linear_and_operand", "linear_grad_input_and_operand")
def test_products_that_round_nothing_keep_their_operands():
    rng = np.random.default_rng(2)
    x, dy, w = Tensor(array(rng, 40, 48)), Tensor(array(rng, 40, 80)), Tensor(array(rng, 80, 48))
    for module in (ops, reference):
        (y, kept), (dx, kept_dy) = module.linear_and_operand(x, w, None), module.linear_grad_input_and_operand(dy, w)
        close(y, reference.linear(x, w, None))
        close(dx, reference.linear_grad_input(dy, w))
        close(kept, x, 0.0)
        close(kept_dy, dy, 0.0)


def test_a_cpu_without_the_instructions_multiplies_float32_and_says_so():
    threads = library.threads()
    with mock.patch.object(build, "cpu_flags", lambda: b"flags : avx512f avx2"):
        sentence = ops.use_kernels("auto", num_threads=1, bf16_products=True)
    assert sentence.endswith("products of float32: this CPU has neither AMX nor AVX-512 instructions for bfloat16")
    x, w = array(np.random.default_rng(0), 40, 64), array(np.random.default_rng(1), 8, 64)
    close(ops.linear(Tensor(x), Tensor(w), None), reference.linear(Tensor(x), Tensor(w), None))
    assert ops.use_kernels("local", bf16_products=True).endswith("(local was asked for); products of float32")
    ops.use_kernels("auto", num_threads=threads)


def half_array(values, dtype):
    return Tensor(values.astype(np.float32)).astype(dtype).asnumpy()


@pytest.mark.parametrize("dtype", HALVES)
@compares("convert", "copy_")
def test_conversions_are_exact_up_and_rounded_to_even_down(dtype):
    """All numbers of 16 bits; and float32 beside them, between two of them and half way."""
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = every.view(half_array(np.zeros(1), dtype).dtype)
    finite = np.isfinite(wide.astype(np.float32))
    x = Tensor.from_numpy(wide.copy())
    up = ops.convert(x, ms.float32).asnumpy()
    np.testing.assert_array_equal(up.view(np.uint32)[finite], wide.astype(np.float32).view(np.uint32)[finite])
    np.testing.assert_array_equal(np.isnan(up), np.isnan(wide.astype(np.float32)))
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.nextafter(up[finite], np.float32(np.inf)), np.nextafter(up[finite], np.float32(-np.inf))
        middles = (up[finite].astype(np.float64) + np.roll(up[finite], 1)) / 2
        values = np.concatenate([up, *steps, middles.astype(np.float32)])
        want = values.astype(wide.dtype)
    down = ops.convert(Tensor(values), dtype).asnumpy()
    number = ~np.isnan(values)
    np.testing.assert_array_equal(down.view(np.uint16)[number], want.view(np.uint16)[number])
    assert np.isnan(down.astype(np.float32)[~number]).all()
    into = np.empty(values.shape, wide.dtype)
    ops.copy_(into, values)
    np.testing.assert_array_equal(into.view(np.uint16), down.view(np.uint16))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_conversion_has_the_gradient_of_a_copy_in_its_inputs_type(dtype):
    weight = Tensor(np.arange(70000, dtype=np.float32) / 7)
    gradient = ms.grad(lambda x: (ops.cast(x, ms.float32) * weight).sum())(Tensor(np.ones(70000), dtype))
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient.asnumpy(), weight.astype(dtype).asnumpy())
    assert ops.cast(Tensor([1, 2]), ms.float32).asnumpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", HALVES)
@compares("add_", "scale_", "write_")
def test_buffers_of_halves_round_each_element_once(dtype):
    rng = np.random.default_rng(5)
    for kind, values in ((dtype, array(rng, 70001)), (ms.float32, array(rng, 70001)), (ms.float32, array(rng, 7))):
        into = half_array(array(rng, values.size), dtype)
        other = Tensor(values).astype(kind)
        want = (into.astype(np.float32) + other.asnumpy().astype(np.float32)).astype(into.dtype)
        ops.add_(into, other)
        np.testing.assert_array_equal(into, want)
        ops.scale_(into, 0.3)
        np.testing.assert_array_equal(into, (want.astype(np.float32) * np.float32(0.3)).astype(into.dtype))
        ops.write_(into, other)
        np.testing.assert_array_equal(into, other.asnumpy().astype(into.dtype))


@pytest.mark.parametrize("dtype", HALVES)
@compares("linear", "linear_grad_input", "layer_norm", "rms_norm", "activation", "bias_dropout_add", "embedding",
          "grouped_linear", "grouped_linear_grad_input")  # fmt: skip
def test_parameters_of_16_bits_are_read_as_the_float32_that_they_are(dtype, caplog):
    """Bitwise; their gradients come in their type, and nothing goes to the reference."""
    rng = np.random.default_rng(6)
    x, dy, w, b = array(rng, 50, 4, 96), array(rng, 50, 4, 128), array(rng, 128, 96), array(rng, 128)
    half, bias = Tensor(w).astype(dtype), Tensor(b).astype(dtype)
    wide, counts = half.astype(ms.float32), np.array([3, 0, 47])
    experts = Tensor(array(rng, 3, 128, 96)).astype(dtype)
    pairs = [
        (lambda w, b: ops.linear(Tensor(x), w, b), (half, bias)),
        (lambda w: ops.linear(Tensor(x[:3, 0]), w, None), (half,)),
        (lambda w: ops.linear_grad_input(Tensor(dy), w), (half,)),
        (lambda w: ops.grouped_linear(Tensor(x[:, 0]), w, counts), (experts,)),
        (lambda w: ops.grouped_linear_grad_input(Tensor(dy[:, 0]), w, counts), (experts,)),
        (lambda w, b: ops.layer_norm(Tensor(dy), w, b, 1e-5), (bias, bias + bias)),
        (lambda w: ops.rms_norm(Tensor(dy), w, 1e-5), (bias,)),
        (lambda b: ops.activation(Tensor(dy), b, "gelu"), (bias,)),
        (lambda b: ops.bias_dropout_add(Tensor(dy), b, Tensor(dy), 0.25, (1, 2)), (bias,)),
    ]
    with caplog.at_level("INFO", logger=registry.logger.name):
        for function, halves in pairs:
            wides = [value.astype(ms.float32) for value in halves]
            got = function(*halves)
            assert got.dtype == ms.float32
            np.testing.assert_array_equal(got.asnumpy(), function(*wides).asnumpy())
        for function, halves in pairs[5:]:
            where = tuple(range(len(halves)))
            grad = ms.grad(lambda *a, f=function: (f(*a) * Tensor(dy)).sum(), grad_position=where)
            got, want = (grad(*values) for values in (halves, [value.astype(ms.float32) for value in halves]))
            for g, v in zip(*((got, want) if isinstance(got, tuple) else ((got,), (want,)))):
                assert g.dtype == dtype
                np.testing.assert_array_equal(g.asnumpy(), v.astype(dtype).asnumpy())
        rows = ops.embedding(Tensor([0, 200, 5, 127], ms.int32), half, 0)
        assert rows.dtype == dtype
        np.testing.assert_array_equal(
            rows.asnumpy(), ops.embedding(Tensor([0, 200, 5, 127], ms.int32), wide, 0).astype(dtype).asnumpy()
        )
    assert not caplog.records


def test_every_compiled_kernel_is_compared():
    compiled = {name for name, entry in registry.KERNELS.items() if "CPU" in entry.implementations}
    assert compiled == COMPARED


# ---- cached attention -----------------------------------------------------------------------------------------------
CACHED = [(1, 3, 4, 4, 16, 9), (1, 1, 6, 2, 10, 3), (5, 2, 8, 1, 33, 1000), (40, 1, 4, 2, 24, 7), (3, 4, 2, 2, 8, 1)]
"""New tokens S, sequences B, query heads N, groups G, head size D, window."""


@pytest.mark.parametrize("case", CACHED)
@compares("cached_attention", "cached_attention_packed")
def test_cached_attention(case):
    S, B, N, G, D, window = case
    rng, T = np.random.default_rng(S * D), 64
    rows, firsts = rng.permutation(B + 1)[:B].astype(np.int32), rng.integers(0, T - S, B).astype(np.int32)
    mixed = array(rng, S, B, G, (N // G + 2) * D)
    caches = [array(rng, B + 1, G, T, D) for _ in range(2)]
    parts = np.split(mixed, [N // G * D, (N // G + 1) * D], -1)
    query, key, value = (np.ascontiguousarray(x) for x in (parts[0].reshape(S, B, N, D), *parts[1:]))
    for name, arguments in (
        ("cached_attention_packed", (mixed, D)),
        ("cached_attention", (query, key, value)),
    ):
        results = []
        for module in (ops, reference):
            keys, values = (cache.copy() for cache in caches)
            given = [Tensor(x) if isinstance(x, np.ndarray) else x for x in arguments]
            out = getattr(module, name)(*given, keys, values, rows, firsts, scale=0.3, window=window)
            results.append((out, keys, values))
        close(results[0][0], results[1][0], 1e-5, name)  # MindSpore's exp
        for got, want, before in zip(results[0][1:], results[1][1:], caches):
            np.testing.assert_array_equal(got, want)
            assert (got != before).sum() == S * B * G * D


LAYERS = [
    (1, 3, 8, 4, 2, 6, 12, "LayerNorm", "gelu_tanh", 0), (5, 2, 16, 4, 4, 4, 9, "LayerNorm", "relu", 2),
    (1, 1, 12, 6, 1, 4, 20, "RMSNorm", "swiglu", 4), (3, 2, 12, 2, 2, 8, 20, "RMSNorm", "swiglu", 6),
]  # fmt: skip
"""New tokens S, sequences B, hidden H, heads N, groups G, head size D, feed-forward F, norm, activation, turned R."""


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("case", LAYERS)
@compares("cached_layer")
def test_cached_layer(case, biases):
    S, B, H, N, G, D, F, norm, activation, turned = case
    rng, T = np.random.default_rng(S * H), 24
    rows, firsts = rng.permutation(B + 1)[:B].astype(np.int32), rng.integers(0, T - S, B).astype(np.int32)
    wide, caches = F * (2 if activation == "swiglu" else 1), [array(rng, B + 1, G, T, D) for _ in range(2)]
    shapes = [(H,), (H,), ((N + 2 * G) * D, H), ((N + 2 * G) * D,), (H, N * D), (H,), (H,), (H,),
              (wide, H), (wide,), (H, F), (H,)]  # fmt: skip
    given = [Tensor(array(rng, *shape)) for shape in shapes]
    if norm == "RMSNorm":
        given[1] = given[7] = None
    if not biases:
        given[3::2] = [None, None, given[7], None, None]
    tables = [Tensor(array(rng, S, B, 1, turned)) if turned else None for _ in range(2)]
    hidden, options = Tensor(array(rng, S, B, H)), {"eps": 1e-5, "interleaved": turned == 6, "scale": 0.3, "window": 7}
    results = []
    for module in (ops, reference_layer):
        keys, values = (cache.copy() for cache in caches)
        out = module.cached_layer(hidden, *given, *tables, keys, values, rows, firsts, **options, activation=activation)
        results.append((out, keys, values))
    close(results[0][0], results[1][0], 1e-5)
    for got, want in zip(results[0][1:], results[1][1:]):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_sequence_sees_the_same_beside_any_other():
    rng = np.random.default_rng(3)
    x, w, b = array(rng, 11, 770), array(rng, 1031, 770), array(rng, 1031)
    every = ops.linear(Tensor(x), Tensor(w), Tensor(b)).asnumpy()
    close(Tensor(every), reference.linear(Tensor(x), Tensor(w), Tensor(b)), 2e-6)
    for rows in ([4], [0, 7], [10, 2, 3, 8, 1]):
        np.testing.assert_array_equal(ops.linear(Tensor(x[rows]), Tensor(w), Tensor(b)).asnumpy(), every[rows])
