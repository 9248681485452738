"""A model on a tape against the same model recorded by MindSpore, and what makes a tape give up."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn

from parallel_core import ops, tape
from parallel_core.autograd import Function, forward_only
from parallel_core.comm.interface import SoloGroup
from parallel_core.config.experts import MoEConfig
from parallel_core.config.latent_attention import MLAConfig
from parallel_core.config.multi_token import MTPConfig
from parallel_core.config.schema import FlashAttentionConfig, TransformerConfig
from parallel_core.deferral import deferring
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.layout.recompute import RecomputePlan
from parallel_core.main_grad import on_gradient
from parallel_core.optimizer.grad_buffer import ParamAndGradBuffer
from parallel_core.pipeline import recorded
from parallel_core.pipeline.stage import PipelineStage
from parallel_core.tensor_parallel import as_one
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.training.forward_step import forward_step
from parallel_core.transformer import GPTModel, ModelStage, plain_layer
from parallel_core.transformer.attention import CoreAttention
from parallel_core.transformer.rope import RotaryEmbedding

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

BATCH, LENGTH, VOCABULARY = 2, 20, 40
# More rows than the 32 that are multiplied in another way.
SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": VOCABULARY, "seq_length": LENGTH,
    "ffn_hidden_size": 24, "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0, "init_method_std": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 12}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tape, "_off_tape", set())
    ops.use_kernels("auto", 1)
    yield
    ops.use_kernels("local")


def batches(number: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(1)
    for _ in range(number):
        tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.int32)
        mask = (rng.random((BATCH, LENGTH)) < 0.8).astype(np.float32)
        yield {
            "tokens": Tensor(tokens[:, :-1]), "labels": Tensor(tokens[:, 1:]), "loss_mask": Tensor(mask),
            "document_start": None, "position_ids": None,
        }  # fmt: skip


def make_model(options: dict[str, Any], plan: RecomputePlan | None = None) -> GPTModel:
    config = TransformerConfig(**{**SMALL, **options})
    return GPTModel(ModelStage(config, streams=RandomStreams(7), plan=plan, ledger=RoutingLedger(config.moe)))


class Run:
    """Two microbatches of one iteration, forward passes before backward passes; gradients by name, summed."""

    def __init__(
        self, model: Any, step: Any = forward_step, *, split: bool = False, streams: Any = None, listens: bool = True
    ) -> None:
        self.gradients: dict[str, np.ndarray] = {}
        self.order: list[str] = []
        for name, parameter in model.parameters_and_names() if listens else ():
            on_gradient(parameter, lambda gradient, name=name: self.receive(name, gradient))

        def before_forward(microbatch: int) -> None:
            if streams is not None:
                streams.start_microbatch(1, microbatch)

        self.stage = PipelineStage(model, step, is_first=True, is_last=True, before_forward=before_forward)
        self.stage.start_iteration(batches(2), 2)
        self.losses = [float(self.stage.forward(i, None).asnumpy()) for i in range(2)]
        for i in (1, 0):
            if split:
                with deferring() as late:
                    self.stage.backward(i, None, False)
                for work in late:
                    work()
            else:
                self.stage.backward(i, None, False)

    def receive(self, name: str, gradient: Tensor) -> None:
        self.order.append(name)
        self.gradients[name] = self.gradients.get(name, 0.0) + gradient.astype(ms.float32).asnumpy().copy()


def same(got: Run, want: Run, rtol: float = 2e-7) -> None:
    np.testing.assert_allclose(got.losses, want.losses, rtol=rtol)
    assert got.gradients.keys() == want.gradients.keys()
    for name, values in want.gradients.items():
        error = np.abs(got.gradients[name] - values).max()
        # Sums of a residual stream's gradients are made in another order.
        assert error <= 10 * rtol * max(np.abs(values).max(), 1e-3), f"{name}: {error}"


def recorded_by_mindspore(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Run:
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "is_known", lambda cell: False)
        patch.setattr(as_one, "is_known", lambda cell: False)
        patch.setattr(plain_layer, "is_known", lambda cell: False)
        return Run(*arguments, **options)


ROPE = {"position_embedding_type": "rope"}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama": {
        **ROPE, "normalization": "RMSNorm", "hidden_act": "swiglu", "num_query_groups": 2, "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    },
    "dropout": {"attention_dropout_rate": 0.1, "hidden_dropout_rate": 0.2},
    "dropout and MLPs again": {
        "attention_dropout_rate": 0.1, "hidden_dropout_rate": 0.2, "recompute_granularity": "selective",
        "recompute_modules": ("core_attn", "mlp"),
    },
    "norms of queries and keys": {"qk_layernorm": True, "apply_layernorm_1p": True},
    "norms of queries and keys that turn": {
        **ROPE, "normalization": "RMSNorm", "qk_layernorm": True, "num_query_groups": 2, "rotary_percent": 0.5,
    },
    "residual of the norm": {"apply_residual_connection_post_layernorm": True},
    "parallel residual": {"parallel_residual": True},
    "window": {"fa_config": FlashAttentionConfig(pre_tokens=4)},
    "smoothing": {"label_smoothing": 0.1},
    "experts": {"moe": MoEConfig(**EXPERTS, moe_aux_loss_coeff=(0.01,)), "add_bias_linear": False},
    "shared expert": {"moe": MoEConfig(**EXPERTS, moe_shared_expert_intermediate_size=8)},
    "gate of the shared expert": {
        "moe": MoEConfig(**EXPERTS, moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True),
    },
    "jitter": {"moe": MoEConfig(**EXPERTS, moe_input_jitter_eps=0.01)},
    "further tokens": {**ROPE, "mtp": MTPConfig(mtp_num_layers=2), "hidden_dropout_rate": 0.1},
    "norms of branches": {"use_sandwich_norm": True, "hidden_dropout_rate": 0.1, "embedding_multiplier": 2.0},
    "latent attention": {
        **ROPE, "add_bias_linear": False, "kv_channels": 6,
        "mla": MLAConfig(multi_latent_attention=True, q_lora_rank=8, kv_lora_rank=8, qk_head_dim=4,
                         qk_pos_emb_head_dim=4, v_head_dim=4),
    },
}  # fmt: skip


PLAIN_PARTS = {
    "residual of the norm": (False, False), "parallel residual": (False, False), "experts": (True, False),
    "norms of branches": (False, False), "shared expert": (True, False), "gate of the shared expert": (True, False),
    "jitter": (True, False), "latent attention": (False, True),
}  # fmt: skip
"""Whether attention and the MLP are functions of their own, where not both."""


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_a_tape_is_the_one_that_mindspore_records(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = MODELS[name]
    with caplog.at_level(logging.INFO, recorded.logger.name):
        models = [make_model(options) for _ in range(2)]
        got = Run(models[0], streams=streams_of(models[0]))
    assert "recorded" not in caplog.text
    assert plain_parts(models[0]) == {PLAIN_PARTS.get(name, (True, True))}
    same(got, recorded_by_mindspore(monkeypatch, models[1], streams=streams_of(models[1])))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["plain", "llama", "dropout", "dropout and MLPs again", "experts", "latent attention"])
def test_products_of_bfloat16(name: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operand is rounded once, and the copy multiplied again for the weight's gradient."""
    if "bfloat16 operands" not in ops.use_kernels("auto", 1, bf16_products=True):
        pytest.skip("this CPU multiplies no bfloat16 numbers")
    plan = RecomputePlan(core_attention=2 if "again" in name else 0)
    models = [make_model(MODELS[name], plan) for _ in range(2)]
    got = Run(models[0], split=split, streams=streams_of(models[0]))
    same(got, recorded_by_mindspore(monkeypatch, models[1], split=split, streams=streams_of(models[1])))


def plain_parts(model: GPTModel) -> set[tuple[bool, bool]]:
    found = [layer._plain.found for layer in model.decoder.layers]
    return {(parts.attention is not None, parts.mlp is not None) for parts in found}


def streams_of(model: GPTModel) -> RandomStreams:
    return model.decoder.streams


PLANS = {
    "full": RecomputePlan(segments=(range(0, 1), range(1, 2))),
    "core attention": RecomputePlan(core_attention=2),
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("model", ["dropout", "dropout and MLPs again"])
@pytest.mark.parametrize("name", PLANS)
def test_recomputation_on_a_tape(name: str, model: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_model(MODELS[model], PLANS[name]) for _ in range(2)]
    got = Run(models[0], split=split, streams=streams_of(models[0]))
    assert not tape._off_tape and plain_parts(models[0]) == {(True, True)}
    same(got, recorded_by_mindspore(monkeypatch, models[1], split=split, streams=streams_of(models[1])))
    (layout,) = models[0].decoder.layers[0]._plain.found.whole._layouts.values()
    kept, repeats_mlp = layout.inputs.shapes | layout.kept.shapes, "MLPs" in model
    assert ("context" in kept, "spread" in kept) == (name == "full", not repeats_mlp)
    without = make_model(MODELS["dropout"])
    same(got, Run(without, streams=streams_of(without)), 0.0)


def test_an_operator_in_what_is_recomputed_is_left_to_mindspore(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"hidden_act": "swiglu", "apply_swiglu_fusion": False}
    got = Run(make_model(options, PLANS["full"]))
    assert tape._off_tape
    same(got, recorded_by_mindspore(monkeypatch, make_model(options, PLANS["full"])))


@pytest.mark.parametrize("name", ["plain", "norms of queries and keys that turn", "experts", "latent attention"])
def test_gradients_of_weights_that_come_later(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = MODELS[name]
    same(Run(make_model(options), split=True), recorded_by_mindspore(monkeypatch, make_model(options)))


def test_a_gradient_is_delivered_when_its_last_use_is_taken_back() -> None:
    """The output layer's weight is the embedding's, which backward reaches last; unused parameters get zeros."""
    model = make_model({})
    model.spare = ms.Parameter(np.ones(3, np.float32), name="spare")
    run = Run(model)
    names = [name for name, _ in model.parameters_and_names()]
    assert sorted(run.order) == sorted(2 * names)
    order = run.order[: len(names)]
    assert order[0] == "spare" and not run.gradients["spare"].any()
    assert order[1].endswith("final_layernorm.weight") and order[-1].endswith("word_embeddings.weight")
    firsts = [next(i for i, name in enumerate(order) if f"layers.{layer}." in name) for layer in (1, 0)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("loss", ["of functions", "of operators"])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "llama", "experts", "latent attention"])
def test_gradients_are_written_where_they_are_summed(
    name: str, grad_dtype: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter is frozen; what an earlier iteration has left in the sums is of no influence.

    With operators in the loss MindSpore records the model, and layers that are on tapes of their own as one function.
    """
    options, totals, written = MODELS[name], [], []
    for run in (Run, partial(recorded_by_mindspore, monkeypatch)):
        model = make_model(options)
        model.decoder.layers[1].self_attention.linear_proj.weight.requires_grad = False
        parameters, buffer = list(model.trainable_params()), None
        buffer = ParamAndGradBuffer(
            parameters, [p.name for p in parameters], "float32", grad_dtype, SoloGroup(), bucket_size=None,
            sharded=False, alone=(), average_after=False, gradient_scale=1.0,
        )  # fmt: skip
        completed: list[int] = []
        for i, parameter in enumerate(parameters):
            on_gradient(parameter, lambda g, i=i, b=buffer: b.accumulate(i, g), lambda i=i, c=completed: c.append(i))
            buffer.main_grad(i).write_(Tensor(np.full(parameter.size, np.nan, np.float32)))
        buffer.start_iteration()
        run(model, forward_step if loss == "of functions" else mindspore_in_the_loss, listens=False)
        assert all(sum_.begun for sum_ in buffer.main_grads.values())
        written.append(len(completed))
        totals.append([buffer.main_grad(i).numpy().astype(np.float32) for i in range(len(parameters))])
    assert written[1] == 0 and bool(written[0]) == (loss == "of functions")
    for got, want in zip(*totals):
        np.testing.assert_allclose(got, want, atol=(2e-6 if grad_dtype == "float32" else 2e-2) * np.abs(want).max())


# ---- what makes a tape give up --------------------------------------------------------------------------------------
def mindspore_in_the_loss(data: Any, model: Any) -> Any:
    batch = next(data)
    losses = model(batch["tokens"], None, None, batch["labels"])
    mask = batch["loss_mask"]
    return losses, lambda losses: ((losses * mask).sum(), mask.sum(), {"lm loss": (losses.sum(), mask.sum())})


def test_a_loss_of_operators_is_recorded_by_mindspore_and_no_batch_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(MODELS["dropout"])
    with caplog.at_level(logging.INFO, recorded.logger.name):
        got = Run(model, mindspore_in_the_loss, streams=streams_of(model))
    assert "recorded by MindSpore's autograd, because an operator of MindSpore's made a tensor" in caplog.text
    assert len(got.stage.reports) == 2
    other = make_model(MODELS["dropout"])
    same(got, recorded_by_mindspore(monkeypatch, other, mindspore_in_the_loss, streams=streams_of(other)))


class OthersNorm(nn.Cell):
    """Changes its input in place, which MindSpore's autograd knows of."""

    def __init__(self, norm: nn.Cell) -> None:
        super().__init__()
        self.norm = norm

    def construct(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y.mul_(Tensor(np.float32(2.0)))
        return y


def test_another_packages_cell_is_never_on_a_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for run in (Run, lambda model: recorded_by_mindspore(monkeypatch, model)):
        model = make_model({})
        model.decoder.layers[0].input_layernorm = OthersNorm(model.decoder.layers[0].input_layernorm)
        runs.append(run(model))
    same(*runs)


@pytest.mark.parametrize("where", ["parameter", "forward", "method", "tensor"])
def test_hooks_are_called(where: str) -> None:
    model, called = make_model({}), []
    norm = model.decoder.layers[0].input_layernorm
    note = lambda *_: called.append(1)  # noqa: E731
    if where == "parameter":
        norm.weight.register_hook(lambda gradient: (note(), gradient)[1])
    elif where == "forward":
        norm.register_forward_hook(note)
    elif where == "method":
        own = norm.construct
        norm.construct = lambda x: (note(), own(x))[1]
    else:
        norm.register_forward_hook(lambda _, __, output: output.register_hook(lambda g: (note(), g)[1]) and None)
    Run(model)
    assert len(called) == 2


@pytest.mark.parametrize("whose", ["a hook", "another norm"])
def test_a_norm_that_is_given_sums_is_called_where_somebody_looks(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm without biases before it adds up its input itself, in one kernel."""
    calls, runs = [0, 0], []
    for i, run in enumerate((Run, partial(recorded_by_mindspore, monkeypatch))):
        model = make_model(MODELS["llama"])
        layer = model.decoder.layers[0]
        if whose == "a hook":
            layer.pre_mlp_layernorm.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        else:
            layer.pre_mlp_layernorm = OthersNorm(layer.pre_mlp_layernorm)
        runs.append(run(model))
    same(*runs)
    assert calls == ([2, 2] if whose == "a hook" else [0, 0])


def test_a_method_of_no_module_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `exec` makes it where it is given names of its own."""
    names: dict[str, Any] = {}
    exec("def packed(self, *arguments): ...", names)
    monkeypatch.setattr(CoreAttention, "packed", names["packed"])
    assert not tape._is_known(CoreAttention)


@pytest.mark.parametrize("where", ["a class", "an instance", "the rotation, between two calls"])
def test_a_method_that_replaces_ours_is_called(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As packages do that patch a model's classes before it is made."""
    model, called = make_model(MODELS["llama"]), list[int]()

    def replaced(original: Any) -> Any:
        @functools.wraps(original)
        def method(*arguments: Any) -> Any:
            called.append(1)
            return original(*arguments)

        return method

    first = model.decoder.layers[0]
    if where == "a class":
        monkeypatch.setattr(CoreAttention, "packed", replaced(CoreAttention.packed))
    elif where == "an instance":
        first.mlp.construct = replaced(first.mlp.construct)
    else:
        Run(model)

        class Rotation(RotaryEmbedding):
            __call__ = replaced(RotaryEmbedding.__call__)

        first.self_attention.rotary = Rotation(model.config)
    Run(model)
    assert called


def test_hooks_are_called_where_nothing_is_recorded() -> None:
    """As in generation, where a hook may also be put on a tensor, in vain as in any pass that is not taken back."""
    model, called = make_model({}), []
    norm = model.decoder.layers[0].input_layernorm
    norm.register_forward_hook(lambda _, __, output: called.append(output.register_hook(lambda g: g)))
    batch = next(batches(1))
    with forward_only():
        model(batch["tokens"], None, None, batch["labels"])
    assert len(called) == 1


class Ignores(nn.Cell):
    """A stage whose output is its own parameter, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = ms.Parameter(np.ones(3, np.float32), name="weight")

    def construct(self, x: Tensor) -> Tensor:
        return ops.bias_dropout_add(self.weight, None, self.weight, 0.0, (0, 0))


def test_an_input_that_nothing_depends_on_has_a_gradient_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "is_known", lambda cell: True)
    cell, got = Ignores(), []
    on_gradient(cell.weight, lambda gradient: got.append(gradient.asnumpy().tolist()))
    calls = recorded.RecordedCalls(cell, [cell.weight])
    calls.start_iteration(records=True)
    _, take_back = calls.call(Tensor(np.full(5, 7.0, np.float32)), ())
    assert take_back(Tensor(np.ones(3, np.float32))).asnumpy().tolist() == [0.0] * 5
    assert got == [[2.0] * 3]


class Double(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.total(x, x), ops.total(x, x)

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:
        return (ops.total(ops.total(first, first), ops.total(second, second)),)


def test_one_result_of_two_is_used_and_a_tensor_twice() -> None:
    x = Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))

    def function(x: Tensor) -> Tensor:
        y, _ = Double.apply(x)
        return ops.bias_dropout_add(y, None, y, 0.0, (0, 0))

    of_x, _ = tape.Tape(function, (x,), ()).backward(Tensor(np.ones((2, 3), np.float32)))
    assert np.array_equal(of_x[0].asnumpy(), np.full((2, 3), 4.0))
    for off in (lambda x: function(x) * 2.0, lambda x: function(mint.abs(x)), lambda x: tape.constant(x + 1.0)):
        with pytest.raises(tape.OffTape):
            tape.Tape(off, (x,), ())
    grad = ms.grad(lambda x: tape.as_one(function, (x,), ()).sum())(x)  # as a part of what MindSpore records
    assert np.array_equal(grad.asnumpy(), np.full((2, 3), 4.0))
