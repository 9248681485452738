"""PanGu-alpha against NumPy's float64 values, its sizes, its optimizer and its schedule."""

from __future__ import annotations

import math
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.config import load_config
from parallel_core.config.plan import make_plan, model_parameters
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.recompute import RecomputePlan
from parallel_core.layout.shard import shard_of
from parallel_core.optimizer.schedules import ScheduleShape
from parallel_core.transformer import GPTModel, ModelStage
from parallel_core.transformer.models import PanguAlphaModel, make_model

ROOT = Path(__file__).resolve().parents[3]
H, LAYERS, N, S, V, F = 8, 3, 2, 6, 11, 32
IDS = np.array([[1, 4, 6, 9, 2, 10, 3], [7, 6, 6, 5, 8, 0, 6]], np.int32)
EOD = 6
POSITIONS = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2]], np.int32)
STARTS = np.array([[0, 0, 0, 3, 3, 3], [0, 0, 2, 3, 3, 3]], np.int32)


def det(name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Values that a name decides, as the goldens were made with."""
    k = sum(map(ord, name)) % 97
    return scale * np.sin(1.0 + 0.37 * np.arange(np.prod(shape)) + k).reshape(shape)


def golden_values() -> dict[str, np.ndarray]:
    """Return the goldens' weights under this project's names; theirs name layers as MindSpore's checkpoints do."""
    values = {
        "embedding.word_embeddings.weight": det("word", (V, H), 0.3),
        "embedding.position_embeddings.weight": det("pos", (S, H), 0.2),
        "decoder.query_embedding.weight": det("query", (S, H), 0.25),
        "decoder.final_layernorm.weight": 1 + det("g", (H,), 0.1),
        "decoder.final_layernorm.bias": det("b", (H,), 0.1),
    }
    for i in range(LAYERS):
        old = f"backbone.blocks.{i}" if i < LAYERS - 1 else "backbone.top_query_layer"
        new = f"decoder.layers.{i}"
        for number, name in (("1", "input_layernorm"), ("2", "pre_mlp_layernorm")):
            values[f"{new}.{name}.weight"] = 1 + det(f"{old}{number}g", (H,), 0.1)
            values[f"{new}.{name}.bias"] = det(f"{old}{number}b", (H,), 0.1)
        weights = [det(f"{old}dense{j}", (H, H), 0.3).reshape(N, H // N, H) for j in (1, 2, 3)]
        biases = [det(f"{old}dense{j}b", (H,), 0.05).reshape(N, H // N) for j in (1, 2, 3)]
        attention = f"{new}.self_attention"
        if i < LAYERS - 1:
            values[f"{attention}.linear_qkv.weight"] = np.concatenate(weights, 1).reshape(3 * H, H)
            values[f"{attention}.linear_qkv.bias"] = np.concatenate(biases, 1).reshape(3 * H)
        else:
            values[f"{attention}.linear_q.weight"] = weights[0].reshape(H, H)
            values[f"{attention}.linear_q.bias"] = biases[0].reshape(H)
            values[f"{attention}.linear_kv.weight"] = np.concatenate(weights[1:], 1).reshape(2 * H, H)
            values[f"{attention}.linear_kv.bias"] = np.concatenate(biases[1:], 1).reshape(2 * H)
        values[f"{attention}.linear_proj.weight"] = det(f"{old}projection", (H, H), 0.3).T
        values[f"{attention}.linear_proj.bias"] = det(f"{old}projectionb", (H,), 0.05)
        values[f"{new}.mlp.linear_fc1.weight"] = det(f"{old}m", (H, F), 0.3).T
        values[f"{new}.mlp.linear_fc1.bias"] = det(f"{old}mb", (F,), 0.05)
        values[f"{new}.mlp.linear_fc2.weight"] = det(f"{old}p", (F, H), 0.3).T
        values[f"{new}.mlp.linear_fc2.bias"] = det(f"{old}pb", (H,), 0.05)
    return values


def config(**options: object) -> TransformerConfig:
    sizes = {"num_layers": LAYERS, "hidden_size": H, "num_attention_heads": N, "seq_length": S, "vocab_size": V}
    chosen = {"hidden_act": "fast_gelu", "top_query_layer": "norm_before", **options}
    return TransformerConfig(**sizes, attention_dropout_rate=0.0, hidden_dropout_rate=0.0, **chosen)  # type: ignore


def golden_model(plan: RecomputePlan | None = None, **options: object) -> PanguAlphaModel:
    model = PanguAlphaModel(ModelStage(config(**options), plan=plan))
    values = golden_values()
    assert {shard_of(p).name: p.shape for p in model.trainable_params()} == {n: v.shape for n, v in values.items()}
    for parameter in model.trainable_params():
        parameter.set_data(Tensor(values[shard_of(parameter).name].astype(np.float32)))
    return model


def inputs(resets: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return Tensor(IDS[:, :-1]), Tensor(POSITIONS) if resets else None, Tensor(STARTS) if resets else None


def loss_of(model: PanguAlphaModel, resets: bool = True) -> float:
    """Return the masked mean, whose divisor had 1e-5 added where the goldens come from."""
    losses = model(*inputs(resets), Tensor(IDS[:, 1:])).asnumpy().astype(np.float64)
    mask = IDS[:, :-1] != EOD
    return float((losses * mask).sum() / (mask.sum() + 1e-5))


GOLDEN = [
    ("fast_gelu", "norm_before", 3.8440294416352474, (0.08922096, 0.18318996, -0.4495766)),
    ("fast_gelu", "norm_after", 3.28170777846038, (-0.04240256, 0.34314943, -0.6326117)),
    ("gelu_tanh", "norm_before", 3.8269438115833103, (0.084157, 0.18743982, -0.45287261)),
    ("gelu_tanh", "norm_after", 3.2828888084866774, (-0.04634859, 0.34642302, -0.6351052)),
]


@pytest.mark.parametrize(("act", "norm", "loss", "logits"), GOLDEN, ids=[f"{g[0]} {g[1]}" for g in GOLDEN])
def test_the_model_is_the_one_written_in_numpy(act, norm, loss, logits):
    model = golden_model(hidden_act=act, top_query_layer=norm)
    np.testing.assert_allclose(model(*inputs()).asnumpy()[0, 5, :3], logits, atol=2e-6)
    assert loss_of(model) == pytest.approx(loss, rel=1e-6)


def test_without_resets_positions_count_through_documents():
    assert loss_of(golden_model(), resets=False) == pytest.approx(2.987116790189067, rel=1e-6)


def test_a_prediction_depends_on_its_place_and_on_what_was_before_through_keys_alone():
    """The query of a position is the same whatever stands there: with keys and values zeroed nothing of it is left."""
    model = golden_model(top_query_layer="norm_after")
    (layer,) = [m for _, m in model.cells_and_names() if type(m).__name__ == "QueryAttention"]
    rows = model.decoder.query_embedding((1, S), None)
    hidden = Tensor(np.random.default_rng(0).standard_normal((S, 1, H)).astype(np.float32))
    first, _ = layer(hidden, None, rows)
    same, _ = layer(hidden, None, Tensor(rows.asnumpy().copy()))
    np.testing.assert_array_equal(first.asnumpy(), same.asnumpy())
    moved = rows.asnumpy().copy()
    moved[3] = -moved[3]
    other, _ = layer(hidden, None, Tensor(moved))
    assert [bool(np.any(d)) for d in (other - first).asnumpy()[:, 0]] == [False, False, False, True, False, False]


class Total(nn.Cell):
    def __init__(self, model: PanguAlphaModel) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        return self.model(tokens, positions, starts, Tensor(IDS[:, 1:])).sum()


@pytest.mark.parametrize("norm", ["norm_before", "norm_after"])
def test_gradients_are_the_slopes_of_the_loss_and_recomputing_changes_no_bit(norm):
    plans = [None, RecomputePlan(core_attention=3, regather=3), RecomputePlan((range(0, 2), range(2, 3)), 0, 3),
             RecomputePlan((range(1, 3),), 0, 3)]  # fmt: skip
    found = []
    for plan in plans:
        model = golden_model(plan, top_query_layer=norm)
        parameters = model.trainable_params()
        _, gradients = ms.value_and_grad(Total(model), None, parameters)(*inputs())
        found.append({shard_of(p).name: g.asnumpy() for p, g in zip(parameters, gradients)})
    for other in found[1:]:
        for name, gradient in found[0].items():
            np.testing.assert_array_equal(other[name], gradient, err_msg=name)
    model, rng = golden_model(top_query_layer=norm), np.random.default_rng(0)
    for parameter in model.trainable_params():
        name = shard_of(parameter).name
        direction, value = rng.standard_normal(parameter.shape).astype(np.float32), parameter.asnumpy().copy()
        ends = []
        direction /= np.linalg.norm(direction)
        for sign in (1, -1):
            parameter.set_data(Tensor(value + sign * np.float32(2e-3) * direction))
            ends.append(float(model(*inputs(), Tensor(IDS[:, 1:])).asnumpy().astype(np.float64).sum()))
        parameter.set_data(Tensor(value))
        slope, gradient = (ends[0] - ends[1]) / 4e-3, found[0][name]
        assert (gradient * direction).sum() == pytest.approx(slope, rel=5e-3, abs=5e-3), name


# ---- sizes and presets ----------------------------------------------------------------------------------------------
SIZES = {
    "350m": 345_368_576, "1.3b": 1_366_471_680, "2.6b": 2_625_295_360, "13b": 12_800_870_400, "200b": 206_861_008_896,
}  # fmt: skip


@pytest.mark.parametrize("mode", SIZES)
def test_presets_have_the_published_sizes(mode):
    loaded = load_config(["--config", str(ROOT / f"configs/pangu_alpha_{mode}.yaml")])
    model, L = loaded.config.model_config, loaded.config.model_config.num_layers
    assert model_parameters(model) == SIZES[mode]
    h = model.hidden_size
    assert SIZES[mode] == 40000 * h + 2 * 1024 * h + 2 * h + L * (12 * h * h + 13 * h)
    plan = make_plan(loaded.config, loaded.world_size)
    copies = sum(stage.tied_copy for stage in plan.parameters)
    tp = loaded.config.parallel_config.tensor_model_parallel_size
    whole = sum(stage.total for stage in plan.parameters) - copies
    assert SIZES[mode] / tp <= whole < SIZES[mode] / tp * 1.02 + 1e6  # norms, tables and some biases are on every rank


def test_the_parameters_are_as_many_as_the_plan_counts():
    count = sum(math.prod(p.shape) for p in golden_model().trainable_params())
    assert count == model_parameters(config()) == 2816


# ---- what training differs in ---------------------------------------------------------------------------------------
def test_the_cosine_counts_from_the_first_step():
    shape = ScheduleShape(0.0, 1e-4, 1e-6, 2000, 200000, "cosine-from-zero")
    got = [shape.lr(t) for t in (0, 1, 1999, 2000, 100000, 200000, 300000)]
    want = [0.0, 5e-8, 9.995e-5, 9.997557473810373e-5, 5.05e-5, 1e-6, 1e-6]
    assert got == pytest.approx(want, rel=1e-12, abs=1e-20)


def test_adam_without_bias_correction():
    rng = np.random.default_rng(0)
    p, m, v = rng.standard_normal(50), np.zeros(50), np.zeros(50)
    here = [a.astype(np.float32) for a in (p, m, v)]
    for _ in range(3):
        g = rng.standard_normal(50)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - 1e-2 * (m / (np.sqrt(v) + 1e-8) + 0.1 * p)
        ops.adam_(here[0], g.astype(np.float32), *here[1:], step=1 << 30, lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
                  weight_decay=0.1)  # fmt: skip
    np.testing.assert_allclose(here[0], p, rtol=2e-6, atol=2e-6)


# ---- what is refused ------------------------------------------------------------------------------------------------
BASE = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --vocab-size 31"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--position-embedding-type rope", "asks by learned positions"),
        ("--qk-layernorm", "has no form of it"),
        ("--parallel-residual", "has no form of it"),
        ("--noop-layers 1", "must not be left out"),
    ],
)
def test_what_the_query_layer_cannot_do_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        load_config(f"{BASE} --top-query-layer norm_before {words}".split())


def test_a_gpt_of_a_pangu_configuration_is_refused_and_the_other_way_round_chosen():
    with pytest.raises(ConfigError, match="bash pretrain_pangu.sh"):
        GPTModel(ModelStage(config()))
    assert type(make_model(ModelStage(config()))) is PanguAlphaModel
    assert type(make_model(ModelStage(config(top_query_layer="none")))) is GPTModel
