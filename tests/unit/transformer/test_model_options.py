"""Every option of the model against one written in NumPy (float64), from the same parameters: losses and gradients."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.config.schema import FlashAttentionConfig, TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import shard_of
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.transformer import GPTModel, ModelStage
from parallel_core.transformer.rope import RotaryEmbedding

RTOL = 3e-5
"""fp32 against float64 through two layers; MindSpore's exp and erf are good to about 1e-6."""

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "vocab_size": 24,
    "seq_length": 6,
    "ffn_hidden_size": 20,
    "attention_dropout_rate": 0.0,
    "hidden_dropout_rate": 0.0,
    "init_method_std": 0.3,
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def _plain_operators():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    ops.use_kernels("local")


# ---- the model in NumPy ---------------------------------------------------------------------------------------------
def norm(x: np.ndarray, p: Arrays, name: str, c: TransformerConfig) -> np.ndarray:
    weight = p[f"{name}.weight"] + (1.0 if c.apply_layernorm_1p else 0.0)
    if c.normalization == "RMSNorm":
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon) * weight
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + c.norm_epsilon) * weight + p[f"{name}.bias"]


def linear(x: np.ndarray, p: Arrays, name: str) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def act(x: np.ndarray, name: str) -> np.ndarray:
    erf = np.vectorize(math.erf)
    if name in ("swiglu", "geglu", "geglu_tanh"):
        gate, up = np.split(x, 2, -1)
        return act(gate, {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[name]) * up
    if name in ("gelu_tanh", "openai_gelu"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    table = {
        "gelu": lambda: 0.5 * x * (1 + erf(x / math.sqrt(2))),
        "squared_relu": lambda: np.maximum(x, 0) ** 2,
        "relu": lambda: np.maximum(x, 0),
        "silu": lambda: x * sigmoid(x),
        "fast_gelu": lambda: x * sigmoid(1.702 * x),
    }
    return table[name]()


def frequencies(c: TransformerConfig, width: int, length: int) -> np.ndarray:
    """One frequency after another, as the papers write them."""
    trained, base = c.rope_original_max_position_embeddings, c.rotary_base
    if c.rope_dynamic_factor != 1.0 and length > trained:
        grown = c.rope_dynamic_factor * length / trained - (c.rope_dynamic_factor - 1)
        base *= grown ** (width / (width - 2))
    out = []
    for i in range(width // 2):
        f = base ** (-2 * i / width)
        wavelength = 2 * math.pi / f
        if c.use_rope_scaling:
            slow, fast, s = c.rope_low_freq_factor, c.rope_high_freq_factor, c.rope_scaling_factor
            if wavelength > trained / slow:
                f /= s
            elif wavelength >= trained / fast:
                smooth = (trained / wavelength - slow) / (fast - slow)
                f = (1 - smooth) * f / s + smooth * f
        if c.position_embedding_type == "yarn":
            ends = []
            for turns in (c.yarn_beta_fast, c.yarn_beta_slow):  # the channel whose wavelength is trained / turns
                ends.append(width / 2 * math.log(trained / turns / 2 / math.pi) / math.log(base))
            if c.yarn_correction_range_round_to_int:
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            low, high = max(ends[0], 0), min(ends[1], width - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            f = (1 - ramp) * f + ramp * f / c.yarn_rotary_scaling_factor
        out.append(f)
    return np.array(out)


def rope(x: np.ndarray, c: TransformerConfig) -> np.ndarray:
    """Turn pairs as complex numbers. x: [S, B, N, D]."""
    width = int(c.kv_channels * c.rotary_percent)
    frequency = frequencies(c, width, len(x))
    amplitude = 1.0
    if c.position_embedding_type == "yarn":
        amplitude = c.yarn_attention_factor or 0.1 * math.log(c.yarn_rotary_scaling_factor) + 1.0
        if not c.yarn_attention_factor and c.yarn_mscale and c.yarn_mscale_all_dim:
            over, under = (
                0.1 * m * math.log(c.yarn_rotary_scaling_factor) + 1 for m in (c.yarn_mscale, c.yarn_mscale_all_dim)
            )
            amplitude = over / under
    angle = np.outer(np.arange(len(x)) / c.rotary_seq_len_interpolation_factor, frequency)[:, None, None, :]
    turned, rest = x[..., :width], x[..., width:]
    if c.rotary_interleaved:
        z = (turned[..., 0::2] + 1j * turned[..., 1::2]) * np.exp(1j * angle) * amplitude
        out = np.stack((z.real, z.imag), -1).reshape(turned.shape)
    else:
        half = width // 2
        z = (turned[..., :half] + 1j * turned[..., half:]) * np.exp(1j * angle) * amplitude
        out = np.concatenate((z.real, z.imag), -1)
    return np.concatenate((out, rest), -1)


def attention(
    x: np.ndarray, p: Arrays, name: str, c: TransformerConfig, starts: np.ndarray | None, layer: int
) -> np.ndarray:
    scale = c.softmax_scale or 1 / math.sqrt(c.kv_channels)
    scale /= layer + 1 if c.scale_attn_by_inverse_layer_idx else 1
    pattern = c.window_attn_skip_freq
    window = c.fa_config.pre_tokens if not pattern or pattern[layer] else 99
    S, B, _ = x.shape
    G, D = c.num_query_groups, c.kv_channels
    per_group = c.num_attention_heads // G
    mixed = linear(x, p, f"{name}.linear_qkv").reshape(S, B, G, per_group + 2, D)
    query = mixed[:, :, :, :per_group].reshape(S, B, G * per_group, D)
    key, value = mixed[:, :, :, per_group], mixed[:, :, :, per_group + 1]
    if c.qk_layernorm:
        query, key = norm(query, p, f"{name}.q_layernorm", c), norm(key, p, f"{name}.k_layernorm", c)
    if c.position_embedding_type in ("rope", "yarn"):
        query, key = rope(query, c), rope(key, c)
    context = np.zeros((S, B, G * per_group, D))
    for b in range(B):
        for n in range(G * per_group):
            for s in range(S):
                first = 0 if starts is None else starts[b, s]
                seen = slice(max(first, s - window), s + 1)
                scores = key[seen, b, n // per_group] @ query[s, b, n] * scale
                weights = np.exp(scores - scores.max())
                context[s, b, n] = weights / weights.sum() @ value[seen, b, n // per_group]
    return linear(context.reshape(S, B, -1), p, f"{name}.linear_proj")


def numpy_model(p: Arrays, c: TransformerConfig, tokens: np.ndarray, starts: np.ndarray | None = None) -> np.ndarray:
    """Return the logits, [S, B, V]."""
    x = p["embedding.word_embeddings.weight"][tokens.T] * c.embedding_multiplier
    if c.position_embedding_type == "learned_absolute":
        x = x + p["embedding.position_embeddings.weight"][: len(x), None]
    for i in range(c.num_layers):
        layer, layer_input = f"decoder.layers.{i}", x
        for which, before, after in (
            ("self_attention", "input_layernorm", "post_attention_layernorm"),
            ("mlp", "pre_mlp_layernorm", "post_mlp_layernorm"),
        ):
            beside = c.parallel_residual and which == "mlp"
            normed = norm(layer_input if beside else x, p, f"{layer}.{before}", c)
            if which == "mlp":
                wide = act(linear(normed, p, f"{layer}.mlp.linear_fc1"), c.hidden_act)
                branch = linear(wide, p, f"{layer}.mlp.linear_fc2")
            else:
                branch = attention(normed, p, f"{layer}.{which}", c, starts, i)
            if c.use_sandwich_norm:
                branch = norm(branch, p, f"{layer}.{after}", c)
            x = (normed if c.apply_residual_connection_post_layernorm else x) + branch
    x = norm(x, p, "decoder.final_layernorm", c)
    tied = not c.untie_embeddings_and_output_weights
    return x @ p["embedding.word_embeddings.weight" if tied else "output_layer.weight"].T


def numpy_loss(logits: np.ndarray, labels: np.ndarray, c: TransformerConfig) -> np.ndarray:
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    share = c.label_smoothing * c.vocab_size / (c.vocab_size - 1)
    picked = np.take_along_axis(log_p, labels.T[..., None], -1)[..., 0]
    return (-(1 - share) * picked - share * log_p.mean(-1)).T


# ---- comparison -----------------------------------------------------------------------------------------------------
def build(**options: Any) -> tuple[GPTModel, TransformerConfig]:
    config = TransformerConfig(**{**SMALL, **options})
    model = GPTModel(ModelStage(config))
    rng = np.random.default_rng(0)
    for parameter in model.trainable_params():  # biases and norms that are not trivial
        noise = 0.2 * rng.standard_normal(parameter.shape).astype(np.float32)
        if parameter.ndim == 1:
            parameter.set_data(parameter + Tensor(noise))
    return model, config


def values_of(model: GPTModel) -> Arrays:
    return {shard_of(p).name: p.asnumpy().astype(np.float64) for p in model.trainable_params()}


TOKENS = np.random.default_rng(1).integers(0, 24, (2, 6)).astype(np.int32)
LABELS = np.random.default_rng(2).integers(0, 24, (2, 6)).astype(np.int32)
WEIGHTS = np.random.default_rng(3).random((2, 6)).astype(np.float32)


class Total(nn.Cell):
    """The weighted sum of the token losses."""

    def __init__(self, model: GPTModel, starts: Tensor | None) -> None:
        super().__init__(auto_prefix=False)
        self.model, self.starts = model, starts

    def construct(self, tokens: Tensor) -> Tensor:
        return (self.model(tokens, None, self.starts, Tensor(LABELS)) * Tensor(WEIGHTS)).sum()


def check(starts: np.ndarray | None = None, **options: Any) -> None:
    """Compare logits, losses, and the gradient along a random direction for every parameter."""
    model, config = build(**options)
    mask = None if starts is None else Tensor(starts)
    values = values_of(model)
    logits = numpy_model(values, config, TOKENS, starts)
    np.testing.assert_allclose(
        model(Tensor(TOKENS), None, mask).asnumpy().transpose(1, 0, 2), logits, atol=RTOL * np.abs(logits).max()
    )
    loss = numpy_loss(logits, LABELS, config)
    got = model(Tensor(TOKENS), None, mask, Tensor(LABELS)).asnumpy()
    np.testing.assert_allclose(got, loss, rtol=RTOL, atol=RTOL)
    _, gradients = ms.value_and_grad(Total(model, mask), None, model.trainable_params())(Tensor(TOKENS))
    rng = np.random.default_rng(4)
    for parameter, gradient in zip(model.trainable_params(), gradients):
        name = shard_of(parameter).name
        direction = rng.standard_normal(parameter.shape)
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = {**values, name: values[name] + sign * step * direction}
            ends.append((numpy_loss(numpy_model(moved, config, TOKENS, starts), LABELS, config) * WEIGHTS).sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        size = float(np.abs(gradient.asnumpy()).sum()) or 1.0
        assert abs(float((gradient.asnumpy() * direction).sum()) - slope) < 1e-4 * size + 1e-6, name


LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "hidden_act": "swiglu",
    "add_bias_linear": False,
    "qkv_has_bias": False,
    "out_proj_has_bias": False,
    "untie_embeddings_and_output_weights": True,
}

SCALED: dict[str, Any] = {
    "kv_channels": 16,
    "rotary_base": 1000.0,
    "rope_scaling_factor": 4.0,
    "rope_original_max_position_embeddings": 256,
}
YARN: dict[str, Any] = {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        LLAMA,
        {"position_embedding_type": "none"},
        {"add_bias_linear": False},
        {"qkv_has_bias": False, "out_proj_has_bias": False},
        {"kv_channels": 8},
        {"group_query_attention": True, "num_query_groups": 2},
        {**LLAMA, "group_query_attention": True, "num_query_groups": 1},
        {"qk_layernorm": True},
        {**LLAMA, "qk_layernorm": True},
        {"apply_layernorm_1p": True},
        {**LLAMA, "apply_layernorm_1p": True},
        {"use_sandwich_norm": True},
        {**LLAMA, "use_sandwich_norm": True, "attn_post_norm_scale": 0.5, "ffn_post_norm_scale": 0.25},
        {"apply_residual_connection_post_layernorm": True},
        {"apply_query_key_layer_scaling": True},
        {"label_smoothing": 0.1},
        {"norm_epsilon": 0.1},
        {**LLAMA, "rotary_percent": 0.5},
        {**LLAMA, "rotary_interleaved": True},
        {**LLAMA, "rotary_interleaved": True, "rotary_percent": 0.5, "kv_channels": 8},
        {**LLAMA, "rotary_base": 100.0},
        {**LLAMA, "rotary_seq_len_interpolation_factor": 4.0},
        {**LLAMA, **SCALED, "use_rope_scaling": True, "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 8.0},
        {**LLAMA, **SCALED, "rope_dynamic_factor": 3.0, "rope_original_max_position_embeddings": 4},
        {**LLAMA, **SCALED, **YARN},
        {**LLAMA, **SCALED, **YARN, "yarn_correction_range_round_to_int": False, "yarn_beta_fast": 16.0},
        {**LLAMA, **SCALED, **YARN, "yarn_mscale": 2.0, "yarn_mscale_all_dim": 0.5, "rotary_percent": 0.5},
        {**LLAMA, **SCALED, **YARN, "yarn_attention_factor": 1.5, "rotary_interleaved": True},
        {"parallel_residual": True},
        {**LLAMA, "parallel_residual": True, "use_sandwich_norm": True},
        {"embedding_multiplier": 4.0},
        {"softmax_scale": 1.0},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": True, "apply_query_key_layer_scaling": True},
        {"fa_config": FlashAttentionConfig(pre_tokens=2)},
        {"fa_config": FlashAttentionConfig(pre_tokens=1), "window_attn_skip_freq": (0, 1)},
    ],
    ids=lambda options: ", ".join(f"{k}={v}" for k, v in options.items() if LLAMA.get(k) != v) or "plain",
)
def test_the_model_is_the_one_written_in_numpy(options: dict[str, Any]) -> None:
    """What each option says it does, in values and gradients."""
    check(**options)


@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
def test_every_activation(name: str) -> None:
    check(hidden_act=name)


def test_documents_see_only_themselves() -> None:
    """The mask forbids: adding a mask of 0 and 1 to the scores would let everything be seen."""
    check(starts=np.array([[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]], np.int32))


def test_attention_is_causal() -> None:
    """Causal without any mask given: what comes later changes nothing."""
    model, _ = build()
    changed = TOKENS.copy()
    changed[:, 3:] = (changed[:, 3:] + 1) % 24
    first, second = (model(Tensor(tokens)).asnumpy() for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(first[:, :3], second[:, :3])
    assert (first[:, 3:] != second[:, 3:]).all(-1).any()


# ---- closed properties ----------------------------------------------------------------------------------------------
def turned(config: TransformerConfig, x: np.ndarray) -> np.ndarray:
    """Return [S, D] vectors turned as queries, and check that keys turn likewise and values not."""
    packed = np.tile(x[:, None, None], (1, 1, 1, 3)).astype(np.float32)  # one group of one query, key and value
    query, key, value = np.split(RotaryEmbedding(config)(Tensor(packed), x.shape[1]).asnumpy()[:, 0, 0], 3, -1)
    np.testing.assert_array_equal(key, query)
    np.testing.assert_array_equal(value, packed[:, 0, 0, : x.shape[1]])
    return query


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    """And are as exact as float32, whatever the parameters' dtype."""
    for options in ({}, {"rotary_interleaved": True}, {"rotary_percent": 0.5}):
        sizes = {**SMALL, "kv_channels": 8, "seq_length": 64, "params_dtype": "bfloat16"}
        config = TransformerConfig(**{**sizes, **options})
        vectors = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
        query, key = (turned(config, np.tile(v, (64, 1))) for v in vectors)
        scores = query @ key.T
        for distance in (0, 1, 7):
            along = np.array([scores[s, s - distance] for s in range(distance, 64)])
            np.testing.assert_allclose(along, along[0], atol=2e-5)
        np.testing.assert_allclose((query**2).sum(-1), (vectors[0] ** 2).sum(), rtol=1e-5)


def test_interpolation_halves_positions() -> None:
    x = np.tile(np.random.default_rng(0).standard_normal(4).astype(np.float32), (9, 1))
    plain, slow = (turned(TransformerConfig(**SMALL, rotary_seq_len_interpolation_factor=f), x) for f in (1.0, 2.0))
    np.testing.assert_allclose(slow[8], plain[4], atol=1e-6)


def test_a_window_hides_what_is_further_back() -> None:
    window = FlashAttentionConfig(pre_tokens=2)
    model, _ = build(fa_config=window)
    plain, config = build()
    starts = np.maximum(np.arange(6) - 2, 0)[None].repeat(2, 0)
    want = numpy_model(values_of(plain), config, TOKENS, starts)
    np.testing.assert_allclose(model(Tensor(TOKENS)).asnumpy().transpose(1, 0, 2), want, atol=1e-4)
    documents = np.array([[0, 0, 0, 0, 4, 4], [0, 1, 1, 1, 1, 1]], np.int32)
    want = numpy_model(values_of(plain), config, TOKENS, np.maximum(starts, documents))
    got = model(Tensor(TOKENS), None, Tensor(documents)).asnumpy().transpose(1, 0, 2)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_initial_values_have_the_spread_that_is_asked_for() -> None:
    """Init_method_std, the scaled output layers, the embeddings' own."""
    config = TransformerConfig(**{**SMALL, "hidden_size": 128, "ffn_hidden_size": 256, "embedding_init_std": 0.5})
    for parameter in GPTModel(ModelStage(config)).trainable_params():
        name, value = shard_of(parameter).name, parameter.asnumpy()
        if value.ndim == 1:
            assert (value == (1.0 if name.endswith("norm.weight") else 0.0)).all()
            continue
        std = 0.3
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std = 0.3 / math.sqrt(2 * 2)
        if name.startswith("embedding"):
            std = 0.5
        assert abs(value.std() / std - 1) < 0.1, name


def test_sandwich_norms_start_at_their_scales() -> None:
    """With both norms, also where the stored weight is the scale minus one."""
    for kind in ("LayerNorm", "RMSNorm"):
        for centred in (False, True):
            config = TransformerConfig(
                **SMALL,
                normalization=kind,
                use_sandwich_norm=True,
                attn_post_norm_scale=0.5,
                ffn_post_norm_scale=0.25,
                apply_layernorm_1p=centred,
            )
            layer = GPTModel(ModelStage(config)).decoder.layers[1]
            for cell, scale in (
                (layer.post_attention_layernorm, 0.5),
                (layer.post_mlp_layernorm, 0.25),
                (layer.input_layernorm, 1.0),
            ):
                np.testing.assert_allclose(cell.weight.asnumpy(), scale - centred)


def test_query_key_layer_scaling_keeps_float16_scores_small() -> None:
    """Divided by the layer's number before rounding and multiplied back in the softmax, so nothing overflows."""
    half = {"params_dtype": "float16", "compute_dtype": "float16", "num_layers": 1}
    for scaled in (False, True):
        config = TransformerConfig(**{**SMALL, **half}, apply_query_key_layer_scaling=scaled)
        core = GPTModel(ModelStage(config, layer_numbers=(7,))).decoder.layers[0].self_attention.core_attention
        assert core.coefficient == (8.0 if scaled else 1.0) and core.scale * core.coefficient == 0.5
        out = core.packed(Tensor(np.full((6, 1, 4, 3 * 4), 190.0, np.float16))).asnumpy()
        assert np.isfinite(out).all() == scaled


def test_the_residual_stream_is_float32_when_asked() -> None:
    half = {"params_dtype": "float16", "compute_dtype": "float16"}
    for fp32 in (False, True):
        model, _ = build(**half, fp32_residual_connection=fp32)
        hidden = model.embedding(Tensor(TOKENS), None)
        assert hidden.dtype == (ms.float32 if fp32 else ms.float16)
        assert model.decoder.layers[0](hidden).dtype == hidden.dtype
        loss = model(Tensor(TOKENS), None, None, Tensor(LABELS))
        assert loss.dtype == ms.float32
        want = build()[0](Tensor(TOKENS), None, None, Tensor(LABELS)).asnumpy()
        np.testing.assert_allclose(loss.asnumpy(), want, rtol=2e-2)


def test_fp16_lm_cross_entropy_keeps_the_logits_in_float16_and_the_loss_in_float32() -> None:
    model, _ = build(params_dtype="float16", compute_dtype="float16", fp16_lm_cross_entropy=True)
    assert model(Tensor(TOKENS)).dtype == ms.float16
    loss = model(Tensor(TOKENS), None, None, Tensor(LABELS))
    assert loss.dtype == ms.float32 and np.isfinite(loss.asnumpy()).all()


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    """Both rates reach the model."""
    for options in ({"hidden_dropout_rate": 0.5}, {"attention_dropout_rate": 0.5}):
        config = TransformerConfig(**{**SMALL, **options})
        streams = RandomStreams(1)
        model = GPTModel(ModelStage(config, streams=streams))
        plain = GPTModel(ModelStage(TransformerConfig(**SMALL)))
        streams.start_microbatch(1, 0)
        with_masks = model(Tensor(TOKENS)).asnumpy()
        streams.start_microbatch(1, 0)
        np.testing.assert_array_equal(model(Tensor(TOKENS)).asnumpy(), with_masks)
        streams.start_microbatch(1, 1)
        assert not np.array_equal(model(Tensor(TOKENS)).asnumpy(), with_masks)
        streams.training = False
        np.testing.assert_array_equal(model(Tensor(TOKENS)).asnumpy(), plain(Tensor(TOKENS)).asnumpy())


def test_positions_can_be_given() -> None:
    model, config = build()
    positions = np.array([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]], np.int32)
    table, words = (values_of(model)[f"embedding.{kind}_embeddings.weight"] for kind in ("position", "word"))
    got = model.embedding(Tensor(TOKENS), Tensor(positions)).asnumpy()
    np.testing.assert_allclose(got, (words[TOKENS] + table[positions]).transpose(1, 0, 2), atol=1e-6)


def test_wrong_inputs_are_refused() -> None:
    model, _ = build()
    with pytest.raises(ConfigError, match="a sequence of 7 tokens needs max_position_embeddings >= 7, not 6"):
        model(Tensor(np.zeros((1, 7), np.int32)))
    with pytest.raises(ConfigError, match="document_start of shape .*document starts"):
        model(Tensor(TOKENS), None, Tensor(np.zeros((2, 1, 6, 6), bool)))
    middle = GPTModel(
        ModelStage(TransformerConfig(**SMALL), layer_numbers=(0,), pre_process=False, post_process=False)
    )
    with pytest.raises(ConfigError, match="call set_input_tensor"):
        middle(Tensor(TOKENS))
    with pytest.raises(ConfigError, match="normalization='Batch' does not exist; use LayerNorm or RMSNorm"):
        GPTModel(ModelStage(TransformerConfig(**SMALL, normalization="Batch")))
