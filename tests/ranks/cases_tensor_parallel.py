"""Tensor parallel layers against the unsharded layer in NumPy (float64): values and every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core import tensor_parallel as tp
from parallel_core.autograd import backward
from parallel_core.comm.interface import Group
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import shard_of
from parallel_core.tensor_parallel.parameter import init_method_normal
from tests.helpers.cases import CaseContext, case
from tests.ranks.support import gather_values, kernels, world_group

S, B, IN, OUT, VOCAB = 8, 2, 12, 16, 24
RTOL = 1e-5
"""fp32 against float64: sums of up to 24 products of order 1, and one all-reduce that reorders up to 4 of them."""

MODES = [{"mode": mode, "sp": sp} for mode in ("local", "auto") for sp in (False, True)]
SIZES = (1, 2, 4)


class Call(nn.Cell):
    """`function(layer, *inputs)` as a Cell that can be taken back."""

    def __init__(self, layer: nn.Cell | None, function: Callable[..., Tensor]) -> None:
        super().__init__(auto_prefix=False)
        self.layer, self.function = layer, function
        self.set_grad(True)

    def construct(self, *inputs: Tensor) -> Tensor:
        return self.function(self.layer, *inputs)


def output(layer: nn.Cell, x: Tensor) -> Tensor:
    """Return the output with its bias, whether the layer adds it or not."""
    y, bias = layer(x)
    return y if bias is None else y + bias


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def part(x: np.ndarray, group: Group, dim: int) -> np.ndarray:
    return np.ascontiguousarray(np.split(x, group.size, dim)[group.rank])


def close(got: Tensor, want: np.ndarray, what: str) -> None:
    scale = float(np.abs(want).max()) or 1.0
    np.testing.assert_allclose(got.asnumpy(), want, rtol=0, atol=RTOL * scale, err_msg=what)


def whole_gradient(group: Group, parameter: Parameter, gradient: Tensor) -> Tensor:
    """Sum what the program sums after backward: gradients that cover a part of the sequence."""
    return group.all_reduce(gradient) if shard_of(parameter).partial_gradient else gradient


def set_bias(layer: Any, full: np.ndarray) -> None:
    layer.bias.set_data(Tensor(shard_of(layer.bias).take(full)))


def linear_reference(x: np.ndarray, w: np.ndarray, b: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    x, w, dy = x.astype(np.float64), w.astype(np.float64), dy.astype(np.float64)
    return {
        "y": x @ w.T + b,
        "dx": dy @ w,
        "dw": np.einsum("sbo,sbi->oi", dy, x),
        "db": dy.sum((0, 1)),
    }


def full_weight(rows: int, columns: int) -> np.ndarray:
    return init_method_normal(1.0, seed=7)((rows, columns))


def check_linear(
    group: Group,
    layer: Any,
    x: Sequence[np.ndarray],
    dy: Sequence[np.ndarray],
    cut_x: Callable[[np.ndarray], np.ndarray],
    cut_y: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Send three microbatches forward, one more that is never taken back, and take the three back in every order."""
    weight, bias = full_weight(*shard_of(layer.weight).global_shape), draw(8, OUT)
    set_bias(layer, bias)
    cell = Call(layer, output)
    parameters = [layer.weight, layer.bias]
    want = [linear_reference(x[i], weight, bias, dy[i]) for i in range(3)]
    for order in itertools.permutations(range(3)):
        inputs = [Tensor(cut_x(value)) for value in x]
        for i, entry in enumerate(inputs):
            close(cell(entry), cut_y(want[i]["y"]), f"output of microbatch {i}")
        cell(Tensor(cut_x(x[0])))  # an evaluation in between; nothing is left behind by it
        for i in order:
            (dx,), (dw, db) = backward(cell, (inputs[i],), parameters, Tensor(cut_y(dy[i])))
            close(dx, cut_x(want[i]["dx"]), f"dx of microbatch {i} of order {order}")
            close(dw, shard_of(layer.weight).take(want[i]["dw"]), f"dw of microbatch {i} of order {order}")
            db = whole_gradient(group, layer.bias, db)
            close(db, shard_of(layer.bias).take(want[i]["db"]), f"db of microbatch {i} of order {order}")


def check_twice(
    group: Group,
    layer: Any,
    x: Sequence[np.ndarray],
    dy: np.ndarray,
    cut_x: Callable[[np.ndarray], np.ndarray],
    cut_y: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Call one layer twice in one forward pass, on other inputs."""
    cell = Call(layer, lambda own, a, b: 2.0 * output(own, a) + output(own, b))
    weight, bias = full_weight(*shard_of(layer.weight).global_shape), draw(8, OUT)
    set_bias(layer, bias)
    first, second = (linear_reference(x[i], weight, bias, dy) for i in range(2))
    a, b = Tensor(cut_x(x[0])), Tensor(cut_x(x[1]))
    close(cell(a, b), cut_y(2 * first["y"] + second["y"]), "output")
    (da, db), (dw, dbias) = backward(cell, (a, b), [layer.weight, layer.bias], Tensor(cut_y(dy)))
    close(da, cut_x(2 * first["dx"]), "gradient of the first input")
    close(db, cut_x(second["dx"]), "gradient of the second input")
    close(dw, shard_of(layer.weight).take(2 * first["dw"] + second["dw"]), "dw")
    close(whole_gradient(group, layer.bias, dbias), shard_of(layer.bias).take(3 * first["db"]), "bias gradient")


@case(world_size=SIZES, variants=MODES)
def test_column_parallel_linear_equals_the_unsharded_layer(ctx: CaseContext, mode: str, sp: bool) -> None:
    """Several microbatches in flight, one layer called twice, a forward pass that is never taken back."""
    group = world_group(ctx)
    x, dy = [draw(i, S, B, IN) for i in range(3)], [draw(10 + i, S, B, OUT) for i in range(3)]
    with kernels(mode):
        for skip_bias_add, regather in itertools.product((False, True), repeat=2):
            layer = tp.ColumnParallelLinear(
                IN,
                OUT,
                tp_group=group,
                init_method=init_method_normal(1.0, seed=7),
                skip_bias_add=skip_bias_add,
                sequence_parallel=sp,
                regather_input=regather,
            )

            def cut_x(value: np.ndarray) -> np.ndarray:
                return part(value, group, 0) if sp else value

            def cut_y(value: np.ndarray) -> np.ndarray:
                return part(value, group, 2)

            check_linear(group, layer, x, dy, cut_x, cut_y)
            check_twice(group, layer, x, dy[0], cut_x, cut_y)


@case(world_size=SIZES, variants=MODES)
def test_row_parallel_linear_equals_the_unsharded_layer(ctx: CaseContext, mode: str, sp: bool) -> None:
    """Microbatches in flight keep their own activations, and the bias is added once, whatever the group's size."""
    group = world_group(ctx)
    x, dy = [draw(i, S, B, IN) for i in range(3)], [draw(10 + i, S, B, OUT) for i in range(3)]
    with kernels(mode):
        for skip_bias_add, parallel in itertools.product((False, True), repeat=2):
            if sp and not parallel:
                continue
            layer = tp.RowParallelLinear(
                IN,
                OUT,
                tp_group=group,
                init_method=init_method_normal(1.0, seed=7),
                skip_bias_add=skip_bias_add,
                input_is_parallel=parallel,
                sequence_parallel=sp,
            )

            def cut_x(value: np.ndarray, parallel: bool = parallel) -> np.ndarray:
                return part(value, group, 2) if parallel else value

            def cut_y(value: np.ndarray) -> np.ndarray:
                return part(value, group, 0) if sp else value

            check_linear(group, layer, x, dy, cut_x, cut_y)
            check_twice(group, layer, x, dy[0], cut_x, cut_y)


@case(world_size=(2, 4))
def test_gather_output_returns_all_features_on_every_rank(ctx: CaseContext) -> None:
    group = world_group(ctx)
    layer = tp.ColumnParallelLinear(
        IN, OUT, tp_group=group, init_method=init_method_normal(1.0, seed=7), gather_output=True
    )
    x, dy = draw(0, S, B, IN), draw(1, S, B, OUT)
    want = linear_reference(x, full_weight(OUT, IN), np.zeros(OUT), dy)
    cell, entry = Call(layer, output), Tensor(x)
    close(cell(entry), want["y"], "output")
    (dx,), (dw,) = backward(cell, (entry,), [layer.weight], Tensor(dy))
    close(dx, want["dx"], "dx")
    close(dw, part(want["dw"], group, 0), "dw")


@case(world_size=(2, 4))
def test_a_gated_weight_is_cut_in_both_halves(ctx: CaseContext) -> None:
    """The local output is [gate; up] of the same features, so the function does not depend on the group's size."""
    group = world_group(ctx)
    layer = tp.ColumnParallelLinear(
        IN, OUT, tp_group=group, init_method=init_method_normal(1.0, seed=7), stride=2, bias=False
    )
    x = draw(0, S, B, IN)
    gate, up = np.split(x @ full_weight(OUT, IN).T, 2, -1)
    got_gate, got_up = np.split(output(layer, Tensor(x)).asnumpy(), 2, -1)
    np.testing.assert_allclose(got_gate, part(gate, group, 2), atol=1e-4)
    np.testing.assert_allclose(got_up, part(up, group, 2), atol=1e-4)


@case(world_size=(1, 2))
def test_the_bias_of_a_frozen_weight_is_trained(ctx: CaseContext) -> None:
    """A frozen weight takes the gradient of nothing but itself away."""
    group = world_group(ctx)
    layer = tp.ColumnParallelLinear(IN, OUT, tp_group=group, init_method=init_method_normal(1.0, seed=7))
    layer.weight.requires_grad = False
    assert [p.name for p in layer.trainable_params()] == [layer.bias.name]
    x, dy = draw(0, S, B, IN), draw(1, S, B, OUT)
    want = linear_reference(x, full_weight(OUT, IN), np.zeros(OUT), dy)
    cell, entry = Call(layer, output), Tensor(x)
    cell(entry)
    (dx,), (db,) = backward(cell, (entry,), [layer.bias], Tensor(part(dy, group, 2)))
    close(dx, want["dx"], "dx")
    close(db, part(want["db"], group, 0), "db")


@case(world_size=SIZES, variants=MODES)
def test_vocab_parallel_embedding_equals_the_unsharded_layer(ctx: CaseContext, mode: str, sp: bool) -> None:
    group = world_group(ctx)
    layer = tp.VocabParallelEmbedding(
        VOCAB,
        OUT,
        tp_group=group,
        init_method=init_method_normal(1.0, seed=7),
        reduce_scatter_embeddings=sp,
    )
    table = full_weight(VOCAB, OUT)
    ids = [np.random.default_rng(i).integers(0, VOCAB, (S, B)).astype(np.int32) for i in range(2)]
    dy = [draw(10 + i, S, B, OUT) for i in range(2)]

    def cut(value: np.ndarray) -> np.ndarray:
        return part(value, group, 0) if sp else value

    def gradient(i: int) -> np.ndarray:
        out = np.zeros((VOCAB, OUT))
        np.add.at(out, ids[i], dy[i])
        return out

    with kernels(mode):
        cell = Call(layer, lambda own, x: own(x))
        entries = [Tensor(value) for value in ids]
        for i in range(2):
            np.testing.assert_array_equal(cell(entries[i]).asnumpy(), cut(table[ids[i]]))
        for i in range(2):
            _, (dw,) = backward(cell, (entries[i],), [layer.weight], Tensor(cut(dy[i])))
            close(dw, part(gradient(i), group, 0), f"gradient of microbatch {i}")
        twice = Call(layer, lambda own, a, b: own(a) + own(b))
        a, b = Tensor(ids[0]), Tensor(ids[1])
        twice(a, b)
        _, (dw,) = backward(twice, (a, b), [layer.weight], Tensor(cut(dy[0])))
        both = np.zeros((VOCAB, OUT))
        np.add.at(both, ids[0], dy[0])
        np.add.at(both, ids[1], dy[0])
        close(dw, part(both, group, 0), "gradient of two lookups")


def cross_entropy_reference(
    logits: np.ndarray, target: np.ndarray, dloss: np.ndarray, smoothing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return loss and gradient of the whole vocabulary; a negative target counts nothing."""
    wide = logits.astype(np.float64)
    log_p = wide - wide.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    classes = logits.shape[-1]
    share = smoothing * classes / (classes - 1)
    goal = (1 - share) * np.eye(classes)[np.maximum(target, 0)] + share / classes
    counted = (target >= 0)[..., None]
    loss = -(goal * log_p * counted).sum(-1)
    return loss, (np.exp(log_p) - goal) * counted * dloss[..., None]


@case(
    world_size=SIZES,
    variants=[{"mode": mode, "smoothing": e} for mode in ("local", "auto") for e in (0.0, 0.1)],
)
def test_vocab_parallel_cross_entropy_equals_the_whole_softmax(
    ctx: CaseContext, mode: str, smoothing: float
) -> None:
    """Label smoothing uses the whole vocabulary, a negative label counts nothing, gradients come in any order."""
    group = world_group(ctx)
    logits = [5 * draw(i, S, B, VOCAB) for i in range(3)]
    target = [np.random.default_rng(i).integers(0, VOCAB, (S, B)).astype(np.int32) for i in range(3)]
    target[0][0, 0], target[1][2, 1] = -100, -1
    dloss = [draw(20 + i, S, B) for i in range(3)]
    want = [cross_entropy_reference(logits[i], target[i], dloss[i], smoothing) for i in range(3)]
    with kernels(mode):
        cell = Call(tp.VocabParallelCrossEntropy(group, smoothing), lambda own, x, y: own(x, y))
        for order in ((0, 1, 2), (2, 0, 1)):
            entries = [(Tensor(part(logits[i], group, 2)), Tensor(target[i])) for i in range(3)]
            for i in range(3):
                close(cell(*entries[i]), want[i][0], f"loss of microbatch {i}")
            for i in order:
                (dlogits, *_), _ = backward(cell, entries[i], [], Tensor(dloss[i]))
                close(dlogits, part(want[i][1], group, 2), f"gradient of microbatch {i}")


@case(world_size=(2, 4))
def test_huge_logits_give_a_finite_loss(ctx: CaseContext) -> None:
    """The largest logit is on one rank only; the others must subtract it too."""
    group = world_group(ctx)
    logits = np.zeros((1, 2, VOCAB), np.float32)
    logits[0, 0, 0], logits[0, 1, -1] = 3e4, -3e4
    target = np.array([[VOCAB - 1, 0]], np.int32)
    loss = tp.vocab_parallel_cross_entropy(Tensor(part(logits, group, 2)), Tensor(target), group)
    np.testing.assert_allclose(loss.asnumpy(), [[3e4, np.log(VOCAB - 1)]], rtol=1e-6)


@case(world_size=(2, 4))
def test_shards_are_slices_of_the_full_initial_value(ctx: CaseContext) -> None:
    """Shards that start equal stay equal, and the model is 1 / tp as wide as it says."""
    group = world_group(ctx)
    column = tp.ColumnParallelLinear(IN, OUT, tp_group=group, init_method=init_method_normal(0.5, seed=3))
    row = tp.RowParallelLinear(IN, OUT, tp_group=group, init_method=init_method_normal(0.5, seed=3))
    table = tp.VocabParallelEmbedding(VOCAB, OUT, tp_group=group, init_method=init_method_normal(0.5, seed=3))
    for weight, dim in ((column.weight, 0), (row.weight, 1), (table.weight, 0)):
        full = init_method_normal(0.5, seed=3)(shard_of(weight).global_shape)
        shards = gather_values(group, weight.asnumpy())
        np.testing.assert_array_equal(np.concatenate(shards, dim), full)
        assert not np.array_equal(shards[0], shards[1])


@case(world_size=(1, 2, 4))
def test_mappings_and_their_gradients(ctx: CaseContext) -> None:
    """Megatron's table: what each does forward and backward."""
    group, n = world_group(ctx), ctx.world_size
    parts = [draw(r, 8, 4, 12) for r in range(n)]
    total, x = sum(parts), parts[ctx.rank]

    def shard(value: np.ndarray, dim: int) -> np.ndarray:
        return part(value, group, dim)

    def joined(dim: int) -> Callable[[list[np.ndarray]], np.ndarray]:
        return lambda values: np.concatenate(values, dim)

    first, last = 0, 2
    table: list[tuple[str, Callable[..., Tensor], np.ndarray, Callable[[list[np.ndarray]], np.ndarray]]] = [
        ("copy", tp.copy_to_tensor_model_parallel_region, x, sum),
        ("reduce", tp.reduce_from_tensor_model_parallel_region, total, lambda d: d[ctx.rank]),
        ("scatter last", tp.scatter_to_tensor_model_parallel_region, shard(x, last), joined(last)),
        (
            "gather last",
            tp.gather_from_tensor_model_parallel_region,
            joined(last)(parts),
            lambda d: shard(d[ctx.rank], last),
        ),
        ("scatter first", tp.scatter_to_sequence_parallel_region, shard(x, first), joined(first)),
        (
            "gather first",
            tp.gather_from_sequence_parallel_region,
            joined(first)(parts),
            lambda d: shard(sum(d), first),
        ),
        (
            "gather first, alike after",
            lambda t, g: tp.gather_from_sequence_parallel_region(t, g, tensor_parallel_output_grad=False),
            joined(first)(parts),
            lambda d: shard(d[ctx.rank], first),
        ),
        ("reduce-scatter", tp.reduce_scatter_to_sequence_parallel_region, shard(total, first), joined(first)),
        (
            "all-to-all",
            lambda t, g: tp.all_to_all(t, g, 0, 2),
            np.concatenate([np.split(p, n, 0)[ctx.rank] for p in parts], 2),
            lambda d: np.concatenate([np.split(v, n, 2)[ctx.rank] for v in d], 0),
        ),
    ]
    for name, function, forward, gradient in table:
        cell, entry = Call(None, lambda _, t, f=function: f(t, group)), Tensor(x)
        got = cell(entry).asnumpy()
        np.testing.assert_allclose(got, forward, atol=2e-6, err_msg=name)
        upstream = [draw(50 + r, *forward.shape) for r in range(n)]
        (dx, *_), _ = backward(cell, (entry,), [], Tensor(upstream[ctx.rank]))
        np.testing.assert_allclose(dx.asnumpy(), gradient(upstream), atol=2e-6, err_msg=f"gradient of {name}")


@case(world_size=2)
def test_combinations_that_do_not_exist_are_refused(ctx: CaseContext) -> None:
    group, init = world_group(ctx), init_method_normal(1.0)
    for build, words in (
        (lambda: tp.ColumnParallelLinear(4, 7, tp_group=group, init_method=init), "cannot be cut"),
        (
            lambda: tp.ColumnParallelLinear(
                4, 8, tp_group=group, init_method=init, gather_output=True, sequence_parallel=True
            ),
            "gather_output and sequence_parallel",
        ),
        (
            lambda: tp.RowParallelLinear(
                4, 8, tp_group=group, init_method=init, input_is_parallel=False, sequence_parallel=True
            ),
            "needs input_is_parallel",
        ),
    ):
        try:
            build()
        except ConfigError as error:
            assert words in str(error)
        else:
            raise AssertionError(f"nothing said that {words}")


@case(world_size=(1, 2), variants=[{"dtype": "float16"}, {"dtype": "bfloat16"}])
def test_parameters_of_16_bits_give_gradients_of_their_dtype(ctx: CaseContext, dtype: str) -> None:
    """Every parameter follows params_dtype; the computation is in the input's dtype."""
    group = world_group(ctx)
    common: Any = {"tp_group": group, "init_method": init_method_normal(1.0, seed=7), "params_dtype": dtype}
    column = tp.ColumnParallelLinear(IN, OUT, **common)
    table = tp.VocabParallelEmbedding(VOCAB, IN, **common)
    column.weight.name, column.bias.name, table.weight.name = "column.weight", "column.bias", "table.weight"
    kind = getattr(ms, dtype)
    cell = Call(column, lambda own, ids: output(own, table(ids).astype(ms.float32)))
    ids = Tensor(np.arange(S * B, dtype=np.int32).reshape(S, B))
    y = cell(ids)
    parameters = [column.weight, column.bias, table.weight]
    _, gradients = backward(cell, (ids,), parameters, Tensor(np.ones(y.shape, np.float32)))
    assert y.dtype == ms.float32
    assert [p.dtype for p in parameters] == [g.dtype for g in gradients] == [kind] * 3
