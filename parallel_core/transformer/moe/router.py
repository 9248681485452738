"""The router: a linear layer whose best scores are a token's experts, and the losses that keep loads even."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import SoloGroup
from parallel_core.config.experts import LOSS_NAMES
from parallel_core.expert_parallel.ledger import RouterRecord, RoutingLedger
from parallel_core.expert_parallel.rounds import RoundsRouting, balance_loss, route_in_rounds
from parallel_core.expert_parallel.rounds import grad_logits as grad_logits_of_rounds
from parallel_core.expert_parallel.routing import BalanceScores, Routing, grad_logits, route, z_loss
from parallel_core.layout.shard import TensorShard, mark
from parallel_core.tape import constant as tape_constant
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.parameter import constant, make_parameter
from parallel_core.transformer.stage import ModelStage


class TopKRouter(nn.Cell):
    """Chooses the experts of every token.

    Losses never enter the reported loss: their gradients are added to the logits'. The bias of each expert, which is
    for the choice alone, is a parameter without a gradient, in float32.

    Args:
        stage: configuration, groups, streams, ledger.
        name: global name of this module.
    """

    def __init__(self, stage: ModelStage, name: str) -> None:
        super().__init__(auto_prefix=True)
        config = stage.config
        self.moe, self.name, self.streams, self.ledger = config.moe, name, stage.streams, stage.ledger
        self.is_cut = stage.sequence_parallel and stage.tp_group.size > 1
        self.gate = ColumnParallelLinear(
            config.hidden_size,
            self.moe.num_experts,
            tp_group=SoloGroup(),
            init_method=stage.init(f"{name}.weight"),
            bias=config.add_bias_linear and not self.moe.moe_router_rounds,
            params_dtype=config.params_dtype,
            name=name,
        )
        for parameter in self.gate.get_parameters():
            mark(parameter, partial_gradient=self.is_cut)
            parameter.exact_product = bool(self.moe.moe_router_dtype)
        self.expert_bias: Parameter | None = None
        if self.moe.moe_router_enable_expert_bias:
            shard = TensorShard.full(f"{name}.expert_bias", (self.moe.num_experts,), "float32")
            self.expert_bias = make_parameter(shard, constant(0.0))
            self.expert_bias.requires_grad = False
        layer = int(name.partition("layers.")[2].partition(".")[0] or 0)
        behind = config.num_layers if name.startswith("mtp.") else 0
        self.record = self.ledger.add_router(self.expert_bias, behind + layer)

    def construct(self, x_TH: Tensor, batch: int) -> tuple[Tensor, Routing]:
        """Return the routing weights, float32 [T, K], and what was decided.

        Args:
            x_TH: tokens, those of one position of the microbatch's samples next to each other.
            batch: samples in the microbatch.
        """
        if self.moe.moe_input_jitter_eps and self.streams.training:
            x_TH = ops.multiplied_by(x_TH, tape_constant(self._jitter(x_TH)))
        logits, _ = self.gate(ops.cast(x_TH, ms.float32) if self.moe.moe_router_dtype else x_TH)
        logits = ops.cast(logits, ms.float32)
        if self.moe.moe_router_force_load_balancing:
            draws = self._generator("forced").standard_normal(logits.shape, np.float32)
            logits = _InPlaceOf.apply(logits, tape_constant(Tensor.from_numpy(draws)))
        call = _Call(self, batch)
        weights = _Route.apply(logits, call)
        return weights, call.routing

    def _jitter(self, x: Tensor) -> Tensor:
        eps, draws = self.moe.moe_input_jitter_eps, self._generator("jitter").random(x.shape, np.float32)
        return Tensor((1 + eps * (2 * draws - 1)).astype(np.float32)).astype(x.dtype)

    def _generator(self, site: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.streams.seeds(f"{self.name}.{site}", self.is_cut)))


class _InPlaceOf(Function):
    """Other values, whose gradients go where those of the first ones would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None


class _Call:
    """One microbatch's pass through a router."""

    def __init__(self, router: TopKRouter, batch: int) -> None:
        self.moe, self.ledger, self.record, self.batch = router.moe, router.ledger, router.record, batch
        self.bias = None if router.expert_bias is None else router.expert_bias.asnumpy()
        self.training = router.streams.training
        self.routing: Routing


class _Route(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Call) -> Tensor:
        ctx.call, ctx.logits = call, logits.asnumpy()  # kept on the host, which decides, for the backward pass
        if call.moe.moe_router_rounds:
            routing: Routing = route_in_rounds(ctx.logits, call.moe, call.ledger, call.batch)
        else:
            routing = route(ctx.logits, call.moe, call.bias, call.training)
        call.routing = ctx.routing = routing
        return Tensor.from_numpy(np.ascontiguousarray(ctx.routing.weights, np.float32))

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        logits, call = ctx.logits, ctx.call
        gradient: Any = grad_logits_of_rounds if call.moe.moe_router_rounds else grad_logits
        dlogits = gradient(ctx.routing, dweights.asnumpy(), call.moe)
        dlogits += add_losses(logits, ctx.routing, call.ledger, call.record, call.batch)
        return Tensor.from_numpy(dlogits.astype(np.float32, copy=False)), None


def add_losses(
    logits: np.ndarray, routing: Routing, ledger: RoutingLedger, record: RouterRecord, batch: int
) -> np.ndarray:
    """Tell the ledger of a microbatch, and return the gradient of its losses for the logits, [T, E].

    With n_e the tokens of expert e among T of a microbatch (a sample, or the microbatches so far), k chosen for each,
    and a_te the score of token t for expert e over all experts, a balancing loss is E / (k T^2) sum_e n_e sum_t a_te,
    which is 1 for even loads.

    Communication: with balancing losses one all-reduce of counts over each of tp and cp, for `global_aux_loss` one
    all-gather over dp.
    """
    moe, (T, E) = ledger.moe, logits.shape
    counts = routing.counts(E)
    record.counts = record.counts + counts
    ledger.tell("dropped_share", float(routing.kept.size - counts.sum()), float(routing.kept.size))
    tokens = T * ledger.parts  # of the whole microbatch
    strength = ledger.strength * (tokens if ledger.per_token else 1)
    gradient = np.zeros_like(logits)
    losses = moe.balancing_losses
    if losses and isinstance(routing, RoundsRouting):
        ((kind, coefficient),) = losses
        value, slope = balance_loss(routing, ledger)
        ledger.tell(LOSS_NAMES[kind], value * ledger.parts)
        gradient += np.float32(coefficient * strength) * slope
    elif losses:
        scores = BalanceScores(logits, moe)
        dscores = np.zeros((T // batch, batch, E), np.float32)
        values = scores.values.reshape(T // batch, batch, E)
        chosen = np.zeros((T, E), np.float32)
        np.put_along_axis(chosen, scores.chosen, np.float32(1), 1)
        by_sample = ledger.over_microbatch(chosen.reshape(T // batch, batch, E).sum(0))
        for kind, coefficient in losses:
            slope = _slope(kind, by_sample, tokens, ledger, record)
            dscores += np.float32(coefficient * strength) * slope
            share = float((slope * values).sum(dtype=np.float64))
            together = ledger.dp.size if kind == "global_aux_loss" and _is_megatrons(ledger) else 1
            ledger.tell_loss(record, LOSS_NAMES[kind], share * ledger.parts * together)
        gradient += scores.grad_logits(dscores.reshape(T, E))
    if moe.moe_z_loss_coeff:
        value, slope = z_loss(logits)
        ledger.tell_loss(record, "z_loss", value)
        gradient += np.float32(moe.moe_z_loss_coeff * strength / ledger.parts) * slope
    return gradient


def _slope(
    kind: str, by_sample: np.ndarray, tokens: int, ledger: RoutingLedger, record: RouterRecord
) -> np.ndarray:
    """Return the derivative of a balancing loss for the scores, [1, B or 1, E].

    Args:
        kind: the loss.
        by_sample: tokens of each expert in each sample, [B, E].
        tokens: of the microbatch.
        ledger: of all routers.
        record: of this one.
    """
    batch, E = by_sample.shape
    factor = E / ledger.moe.moe_router_topk
    if kind == "seq_aux_loss":
        return (by_sample * np.float32(factor * batch / tokens**2))[None]
    counts, microbatches = by_sample.sum(0), 1.0
    if kind == "global_aux_loss":
        counts, microbatches = ledger.looking_back(record, counts)
    return (counts * np.float32(factor / (tokens * microbatches) ** 2))[None, None]


def _is_megatrons(ledger: RoutingLedger) -> bool:
    return ledger.moe.moe_global_aux_loss_form == "megatron"
