"""Routing and experts on one rank: choices, gradients, the edges, and what a layer's parts add up to."""

from __future__ import annotations

import dataclasses
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core.autograd import backward
from parallel_core.comm.interface import Done, SoloGroup
from parallel_core.config.experts import MoEConfig
from parallel_core.config.schema import TransformerConfig
from parallel_core.expert_parallel.dispatch import ExpertGroups
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.expert_parallel.permutation import by_expert, for_ranks, permute
from parallel_core.expert_parallel.routing import grad_logits, route, sinkhorn, top_k, within_capacity
from parallel_core.layout.shard import shard_of
from parallel_core.transformer.mlp import MLP
from parallel_core.transformer.moe import router as router_module
from parallel_core.transformer.moe.layer import MoELayer
from parallel_core.transformer.moe.router import add_losses
from parallel_core.transformer.recomputed import make_mlp
from parallel_core.transformer.stage import ModelStage

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

H, S, B, E = 16, 6, 2, 4
PLAIN = {"num_experts": E, "moe_ffn_hidden_size": 12}


def config(moe: dict[str, Any], **model: Any) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": H, "num_attention_heads": 2, "vocab_size": 32, "seq_length": S}
    options = {"hidden_act": "swiglu", "add_bias_linear": False, "init_method_std": 0.5}
    return TransformerConfig(**{**sizes, **options, **model}, moe=MoEConfig(**{**PLAIN, **moe}))


def make(moe: dict[str, Any] | None = None, **model: Any) -> MoELayer:
    """Return a layer on one rank."""
    made = config(moe or {}, **model)
    return MoELayer(ModelStage(made, ledger=RoutingLedger(made.moe)), "mlp")


def run(layer: ms.nn.Cell, hidden: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return the output, the input's gradient and the parameters'."""

    class Cell(ms.nn.Cell):
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.layer = layer

        def construct(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    cell = Cell()
    cell.set_grad(True)
    parameters, entry = list(layer.trainable_params()), Tensor(hidden)
    out = cell(entry)
    (dx, *_), dw = backward(cell, (entry,), parameters, Tensor(dy))
    return out.asnumpy(), dx.asnumpy(), {shard_of(p).name: g.asnumpy() for p, g in zip(parameters, dw)}


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((S, B, H)).astype(np.float32), rng.standard_normal((S, B, H)).astype(np.float32)


# ---- choice ---------------------------------------------------------------------------------------------------------
def test_of_equal_scores_the_first_experts_are_chosen():
    assert top_k(np.ones((2, 4), np.float32), 2).tolist() == [[0, 1], [0, 1]]
    assert top_k(np.array([[1, 3, 3, 2]], np.float32), 3).tolist() == [[1, 2, 3]]
    assert top_k(np.array([[-np.inf, 1, -np.inf]], np.float32), 3).tolist() == [[1, 0, 2]]
    tied = route(np.zeros((5, E), np.float32), MoEConfig(**PLAIN))
    assert (tied.experts == [0, 1]).all() and (tied.weights == 0.5).all()


def test_a_groups_best_scores_choose_it():
    moe = MoEConfig(num_experts=6, moe_router_topk=2, moe_router_num_groups=3, moe_router_group_topk=1)
    logits = np.array([[5, 0, 4, 3, 1, 1], [1, 1, 0, 0, 9, -9]], np.float32)
    assert route(logits, moe).experts.tolist() == [[2, 3], [0, 1]]  # 4 + 3 > 5 + 0; 1 + 1 > 9 - 9


def test_a_bias_chooses_and_does_not_weigh():
    moe = MoEConfig(
        num_experts=3, moe_router_topk=1, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    )
    logits = np.array([[2.0, 1.0, 0.0]], np.float32)
    chosen = route(logits, moe, np.array([0, 0, 5], np.float32))
    assert chosen.experts.tolist() == [[2]] and chosen.weights.tolist() == [[0.5]]
    two = route(logits, dataclasses.replace(moe, moe_router_topk=2, moe_router_topk_scaling_factor=3.0))
    np.testing.assert_allclose(two.weights.sum(), 3.0, rtol=1e-6)


def test_sinkhorn_makes_loads_even():
    logits = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32) + [3, 0, 0, 0]
    assert np.bincount(logits.argmax(1), minlength=4)[0] > 50
    assert np.bincount(sinkhorn(logits).argmax(1), minlength=4).max() < 26


@pytest.mark.parametrize("by_weight", [True, False])
def test_a_full_expert_keeps_the_heaviest_or_the_first(by_weight):
    experts = np.zeros((4, 1), np.int64)
    kept = within_capacity(experts, np.array([[1], [3], [2], [3]], np.float32), 2, 2, by_weight=by_weight)
    assert kept.ravel().tolist() == ([False, True, False, True] if by_weight else [True, True, False, False])


def test_capacity_counts_the_tokens_of_the_rank():
    moe = MoEConfig(num_experts=4, moe_router_topk=2, moe_expert_capacity_factor=1.25)
    assert moe.capacity(10) == 7 and moe.capacity(0) == 0 and MoEConfig(num_experts=4).capacity(10) is None
    assert moe.capacity(64) == 40


MODES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax before": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.0},
    "one": {"moe_router_pre_softmax": True, "moe_router_topk": 1},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "sigmoid of one": {"moe_router_score_function": "sigmoid", "moe_router_topk": 1},
    "groups": {"moe_router_score_function": "sigmoid", "moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "sinkhorn": {"moe_router_load_balancing_type": ("sinkhorn",)},
    "sinkhorn of one": {"moe_router_load_balancing_type": ("sinkhorn",), "moe_router_topk": 1},
    "capacity": {"moe_expert_capacity_factor": 0.75},
    "all": {"moe_router_topk": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_the_weights_gradient(mode):
    """Against differences of the weights of a fixed choice."""
    moe = MoEConfig(**{**PLAIN, **MODES[mode]})
    rng = np.random.default_rng(5)
    logits, dy = rng.standard_normal((12, E)).astype(np.float32), rng.standard_normal((12, moe.moe_router_topk))
    routing = route(logits, moe, training=False)
    got = grad_logits(routing, dy.astype(np.float32), moe)
    want, step = np.zeros_like(logits), 1e-2
    for place in np.ndindex(*logits.shape):
        values = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[place] += sign * step
            there = route(moved, moe, training=False)
            if any((np.sort(a) != np.sort(b)).any() for a, b in ((there.experts, routing.experts),
                                                                 (there.kept, routing.kept))):  # fmt: skip
                break
            dense = np.zeros(logits.shape)
            np.put_along_axis(dense, there.experts, there.weights.astype(np.float64), 1)
            values.append((np.take_along_axis(dense, routing.experts, 1) * dy).sum())
        want[place] = (values[0] - values[1]) / (2 * step) if len(values) == 2 else got[place]
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss", "z"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_losses_gradient(kind, score):
    """Against differences of the value that the ledger is told, whose choices stay."""
    options = {"moe_router_score_function": score}
    options |= {"moe_z_loss_coeff": 3.0} if kind == "z" else {
        "moe_router_load_balancing_type": (kind,), "moe_aux_loss_coeff": (3.0,)
    }  # fmt: skip
    moe = MoEConfig(**{**PLAIN, **options})
    logits = (np.random.default_rng(1).standard_normal((S * B, E)) * 2).astype(np.float32)

    def told(values: np.ndarray) -> tuple[float, np.ndarray]:
        ledger = RoutingLedger(moe)
        record = ledger.add_router(None)
        ledger.start_iteration(2.0, 4)
        gradient = add_losses(values, route(values, moe), ledger, record, B)
        numbers = ledger.finish_iteration(True)
        return next(numbers[name][0] for name in numbers if "loss" in name), gradient

    _, got = told(logits)
    direction = np.random.default_rng(2).standard_normal(logits.shape).astype(np.float32)
    step = 1e-3
    slope = (told(logits + step * direction)[0] - told(logits - step * direction)[0]) / (2 * step)
    np.testing.assert_allclose((got * direction).sum(), slope * 3.0 * 2.0 / 4, rtol=2e-3)


def test_even_loads_have_a_balancing_loss_of_one():
    moe = MoEConfig(**PLAIN, moe_aux_loss_coeff=(1.0,))
    ledger = RoutingLedger(moe)
    record = ledger.add_router(None)
    logits = np.tile(np.eye(4, dtype=np.float32) * 0, (3, 1))
    logits += np.tile(np.array([[1, 1, 0, 0], [0, 0, 1, 1]], np.float32), (6, 1))
    add_losses(logits, route(logits, moe), ledger, record, 1)
    assert ledger.finish_iteration(True)["load_balancing_loss"][0] == pytest.approx(1.0, rel=1e-6)


# ---- order ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_rows_and_assignments_find_each_other(seed):
    rng = np.random.default_rng(seed)
    T, K, number = int(rng.integers(1, 30)), int(rng.integers(1, 4)), 6
    experts = np.stack([rng.permutation(number)[:K] for _ in range(T)])
    kept = rng.random((T, K)) < 0.7
    capacity = None if seed % 2 else int(kept.sum()) + 1
    order = permute(experts, kept, 0, number, capacity)
    for ranks, copies in ((1, 1), (3, 1), (3, 2), (2, 3)):
        spread = for_ranks(order, ranks, copies)
        assert len(spread.tokens) == copies * len(order.tokens) == spread.counts.sum()
        for t, k in np.ndindex(T, K):
            rows = spread.rows[t].reshape(K, copies)[k]
            assert (rows >= 0).all() == kept[t, k] and (kept[t, k] or (rows == -1).all())
            if kept[t, k]:
                assert (spread.tokens[rows] == t).all() and (spread.slots[rows] == t * K + k).all()
                own = np.searchsorted(np.cumsum(spread.counts), rows, side="right")
                share, within = divmod(int(experts[t, k]), number // ranks)
                assert own.tolist() == [(share * copies + c) * (number // ranks) + within for c in range(copies)]
    tokens = order.tokens[order.tokens >= 0]
    for start, count in zip(np.cumsum(order.counts) - order.counts, order.counts):
        real = order.tokens[start : start + count]
        real = real[real >= 0]
        assert (np.diff(real) > 0).all(), "tokens of an expert stand in order"
    assert len(tokens) == kept.sum()


def test_rows_of_ranks_in_the_order_of_experts():
    counts = np.array([[2, 1], [0, 3]])
    assert by_expert(counts).tolist() == [0, 1, 2, 3, 4, 5]
    assert by_expert(np.array([[1, 2], [1, 0]])).tolist() == [0, 3, 1, 2]


# ---- the layer ------------------------------------------------------------------------------------------------------
def by_hand(layer: MoELayer, hidden: np.ndarray) -> np.ndarray:
    """Return the layer's output in float64, one token at a time."""
    x = hidden.reshape(-1, H).astype(np.float64)
    values = {shard_of(p).name: p.asnumpy().astype(np.float64) for p in layer.get_parameters()}
    routing = route((x @ values["mlp.router.weight"].T).astype(np.float32), layer.router.moe)
    out = np.zeros_like(x)
    for t, k in np.ndindex(*routing.experts.shape):
        e = routing.experts[t, k]
        wide = values["mlp.experts.experts.linear_fc1.weight"][e] @ x[t]
        gate, up = np.split(wide, 2)
        narrow = values["mlp.experts.experts.linear_fc2.weight"][e] @ (gate / (1 + np.exp(-gate)) * up)
        out[t] += narrow * routing.weights[t, k]
    if "mlp.shared_experts.linear_fc1.weight" in values:
        gate, up = np.split(x @ values["mlp.shared_experts.linear_fc1.weight"].T, 2, -1)
        shared = (gate / (1 + np.exp(-gate)) * up) @ values["mlp.shared_experts.linear_fc2.weight"].T
        if "mlp.shared_experts.gate_weight" in values:
            shared = shared / (1 + np.exp(-(x @ values["mlp.shared_experts.gate_weight"].T)))
        out += shared
    return out.reshape(hidden.shape)


SHARED = {"moe_shared_expert_intermediate_size": 8}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": SHARED,
    "gated": {**SHARED, "moe_shared_expert_gate": True},
    "capacity 1": {"moe_expert_capacity_factor": 0.1},
    "padded": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
}


@pytest.mark.parametrize("kernels", ["local", "auto"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_weighted_sum_of_its_experts(name, kernels):
    ops.use_kernels(kernels)
    hidden, dy = inputs()
    layer = make(LAYERS[name])
    out, dx, _ = run(layer, hidden, dy)
    np.testing.assert_allclose(out, by_hand(layer, hidden), atol=2e-5 * np.abs(out).max() + 1e-6)
    direction, step = np.random.default_rng(3).standard_normal(hidden.shape).astype(np.float32), 1e-3
    moved = [by_hand(layer, hidden + sign * step * direction) for sign in (1, -1)]
    slope = ((moved[0] - moved[1]) * dy).sum() / (2 * step)
    np.testing.assert_allclose((dx * direction).sum(), slope, rtol=2e-2)
    ops.use_kernels("local")


def test_padding_gives_every_expert_its_rows():
    """Shapes do not change with the routing, values and gradients do not change with the padding."""
    hidden, dy = inputs(1)
    seen, results = [], []
    for pad in (False, True):
        layer = make({"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": pad})
        experts = layer.experts.construct

        def watched(rows, weights, counts, experts=experts):
            seen.append((rows.shape[0], counts.tolist()))
            return experts(rows, weights, counts)

        layer.experts.construct = watched
        results.append(run(layer, hidden, dy))
    assert seen[1] == (E * 6, [6] * E) and seen[0][1] != [6] * E
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    for name, gradient in results[0][2].items():
        np.testing.assert_allclose(results[1][2][name], gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=name)


def test_an_expert_without_tokens_has_gradients_of_zero():
    hidden, dy = inputs()
    layer = make({"moe_router_topk": 1, "moe_router_pre_softmax": True})
    weight = np.zeros((E, H), np.float32)
    layer.router.gate.weight.set_data(Tensor(weight))  # all logits are equal: everything goes to expert 0
    out, _, gradients = run(layer, hidden, dy)
    for name in ("fc1", "fc2"):
        gradient = gradients[f"mlp.experts.experts.linear_{name}.weight"]
        assert np.abs(gradient[0]).max() > 0 and not gradient[1:].any()
    np.testing.assert_allclose(out, by_hand(layer, hidden), atol=1e-4)
    numbers = layer.router.ledger.finish_iteration(True)
    assert numbers["tokens_per_expert_max_over_mean"] == (4.0, 1.0)


def test_a_token_that_no_expert_takes_has_no_output():
    hidden, dy = inputs()
    layer = make({"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_expert_capacity_factor": 1 / 3,
                  "moe_token_drop_policy": "position"})  # fmt: skip
    layer.router.gate.weight.set_data(Tensor(np.zeros((E, H), np.float32)))
    out, _, _ = run(layer, hidden, dy)
    assert np.abs(out.reshape(-1, H)[0]).max() > 0 and not out.reshape(-1, H)[1:].any()
    share = layer.router.ledger.finish_iteration(True)["dropped_share"]
    assert share == (S * B - 1, S * B)


@pytest.mark.parametrize(("positions", "samples"), [(1, 1), (5, 3), (7, 1)])
def test_any_number_of_tokens(positions, samples):
    rng = np.random.default_rng(positions)
    hidden = rng.standard_normal((positions, samples, H)).astype(np.float32)
    layer = make({"moe_expert_capacity_factor": 1.0, "moe_aux_loss_coeff": (0.1,), "moe_z_loss_coeff": 0.1})
    out, _, gradients = run(layer, hidden, np.ones_like(hidden))
    np.testing.assert_allclose(out, by_hand(layer, hidden), atol=1e-5 * max(1.0, np.abs(out).max()))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_biases_of_experts():
    """Of the second linear weighted as its output, with gradients for bias and weight."""
    hidden, dy = inputs(2)
    layer = make(hidden_act="gelu", add_bias_linear=True)
    rng = np.random.default_rng(9)
    for bias in (layer.experts.fc1_bias, layer.experts.fc2_bias):
        bias.set_data(Tensor(rng.standard_normal(bias.shape).astype(np.float32)))
    out, _, gradients = run(layer, hidden, dy)

    def loss() -> float:
        return float((layer(Tensor(hidden))[0].asnumpy().astype(np.float64) * dy).sum())

    for bias in (layer.experts.fc1_bias, layer.experts.fc2_bias, layer.router.gate.bias):
        values, step = bias.asnumpy().copy(), 1e-3
        direction = rng.standard_normal(values.shape).astype(np.float32)
        ends = []
        for sign in (1, -1):
            bias.set_data(Tensor(values + sign * step * direction))
            ends.append(loss())
        bias.set_data(Tensor(values))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((gradients[shard_of(bias).name] * direction).sum(), slope, rtol=2e-2)
    assert out.shape == hidden.shape


AGAIN = {"recompute_granularity": "selective"}


@pytest.mark.parametrize(
    ("moe", "model", "counts"),
    [
        ({"moe_layer_recompute": True}, {}, (2, 2, 2)),
        ({}, {**AGAIN, "recompute_modules": ("core_attn", "moe")}, (2, 2, 2)),
        ({}, {**AGAIN, "recompute_modules": ("moe", "moe_act", "shared_experts")}, (2, 2, 2)),
        ({}, {**AGAIN, "recompute_modules": ("moe_act",)}, (1, 3, 1)),  # once for its output, once for its gradient
        ({}, {**AGAIN, "recompute_modules": ("shared_experts", "mlp")}, (1, 1, 2)),
    ],
)
def test_parts_that_are_computed_again(monkeypatch, moe, model, counts):
    """Gradients and what is counted of routing are those of one pass, to the last bit."""
    hidden, dy = inputs()
    calls, results = [], []
    counted = (
        (router_module, "route", router_module.route), (ops, "scaled_activation", ops.scaled_activation),
        (MLP, "construct", MLP.construct),
    )  # fmt: skip
    for where, name, function in counted:
        monkeypatch.setattr(where, name, lambda *a, n=name, f=function: calls.append(n) or f(*a))
    for changed, again in (({}, {}), (moe, model)):
        calls.clear()
        layer = make({"moe_aux_loss_coeff": (0.1,), **SHARED, **changed}, **again)
        results.append((*run(layer, hidden, dy), layer.router.ledger.finish_iteration(True), calls.copy()))
    plain, again = results
    assert tuple(again[4].count(name) for _, name, _ in counted) == counts
    assert plain[3] == again[3] and plain[3]["dropped_share"] == (0.0, 2 * S * B)
    np.testing.assert_array_equal(plain[0], again[0])
    np.testing.assert_array_equal(plain[1], again[1])
    for name, gradient in plain[2].items():
        np.testing.assert_array_equal(again[2][name], gradient, err_msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_that_is_computed_again(monkeypatch, bias):
    hidden, dy = inputs()
    calls, results = [], []
    once = MLP.construct
    monkeypatch.setattr(MLP, "construct", lambda *a: calls.append(1) or once(*a))
    for model in ({}, {**AGAIN, "recompute_modules": ("mlp",)}):
        calls.clear()
        made = config({"num_experts": 0}, add_bias_linear=bias, hidden_act="gelu_tanh", **model)
        results.append((*run(make_mlp(ModelStage(made), "mlp", "mlp"), hidden, dy), len(calls)))
    plain, again = results
    assert (plain[3], again[3]) == (1, 2)
    np.testing.assert_array_equal(plain[1], again[1])
    for name, gradient in plain[2].items():
        np.testing.assert_array_equal(again[2][name], gradient, err_msg=name)


def test_forced_loads_are_random_and_gradients_pass_through():
    """Whatever the router's weights say, and drawn anew for every microbatch; they get the gradient all the same."""
    hidden, dy = inputs()
    layer, other = make({"moe_router_force_load_balancing": True}), make({"moe_router_force_load_balancing": True})
    other.router.gate.weight.set_data(Tensor(np.zeros((E, H), np.float32)))
    (first, _, gradients), (same, _, _) = run(layer, hidden, dy), run(other, hidden, dy)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - run(layer, hidden, dy)[0]).max() > 1e-3
    assert np.abs(gradients["mlp.router.weight"]).max() > 0
    counts = layer.router.record.counts
    for _ in range(50):
        run(layer, hidden, dy)
    shares = (layer.router.record.counts - counts) / (layer.router.record.counts - counts).sum()
    np.testing.assert_allclose(shares, 1 / E, atol=0.06)


class Loop(SoloGroup):
    """The first of two ranks that route alike; tells when messages are sent and asked for."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.size, self.told = 2, told

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        return Tensor(np.concatenate([x.asnumpy()] * 2, dim))

    def all_to_all_rows(self, x: Tensor, counts: np.ndarray) -> Tensor:
        mine = x.asnumpy()[: counts[0, 0]]
        return Tensor(np.concatenate([mine, np.ones((counts[1, 0], *x.shape[1:]), np.float32)]))

    def send(self, x: Tensor, dst: int) -> Done:
        self.told.append("sent")
        return Done(None)

    def receive(self, shape: Any, dtype: Any, src: int) -> Any:
        x, told = Tensor(np.ones(shape, np.float32)), self.told

        class Arriving(Done):
            def wait(self) -> Tensor:
                told.append("received")
                return x

        return Arriving(None)


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_shared_expert_is_computed_while_rows_are_on_their_way(monkeypatch, overlaps):
    told: list[str] = []
    made = config({**SHARED, "moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": overlaps})
    pair = Loop(told)
    groups = ExpertGroups(ep=pair, ep_etp=pair, replicas="edp")
    layer = MoELayer(ModelStage(made, ledger=RoutingLedger(made.moe), expert_groups=groups), "mlp")
    once = MLP.construct
    monkeypatch.setattr(MLP, "construct", lambda *a: told.append("shared") or once(*a))
    run(layer, *inputs())
    assert told == (["sent", "shared", "received", "sent", "received"] if overlaps else ["shared"])


def test_losses_of_each_layer_are_told_on_request():
    """By Megatron's names, numbered from 0 and on through the layers behind the model's last."""
    losses = {"moe_aux_loss_coeff": (0.1,), "moe_z_loss_coeff": 1e-3, "moe_per_layer_logging": True}
    made = config(losses, num_layers=3)
    ledger = RoutingLedger(made.moe)
    for name in ("decoder.layers.2.mlp", "mtp.layers.0.transformer_layer.mlp"):
        run(MoELayer(ModelStage(made, ledger=ledger), name), *inputs())
    told = ledger.finish_iteration(True)
    for name in ("load_balancing_loss", "z_loss"):
        each = [told[f"moe/{name}_layer_{layer}"] for layer in (2, 3)]
        assert [number for _, number in each] == [1, 1]
        assert told[name] == (pytest.approx(sum(value for value, _ in each)), 2)


def test_float16_runs_on_the_reference():
    hidden, dy = inputs()
    layer = make(compute_dtype="float16", params_dtype="float16")
    out, dx, gradients = run(layer, hidden.astype(np.float16), dy.astype(np.float16))
    assert out.dtype == dx.dtype == np.float16 and np.isfinite(out).all()
    assert all(g.dtype == np.float16 for g in gradients.values())


def test_the_bias_of_an_expert_moves_against_its_load():
    moe = MoEConfig(**PLAIN, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    ledger = RoutingLedger(moe)
    bias = ms.Parameter(Tensor(np.zeros(E, np.float32)), name="bias")
    record = ledger.add_router(bias)
    record.counts = np.array([5, 3, 4, 4], np.float32)
    ledger.finish_iteration(True)
    np.testing.assert_allclose(bias.asnumpy(), [-1e-3, 1e-3, 0, 0])
