"""The parts of MindSpeed-Core-MS scripts in one process: masks, losses, configuration, models without a context."""

from __future__ import annotations

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

import parallel_core.compat.mindspeed.config as compat_config
from parallel_core import parallel_state, transformer
from parallel_core.compat.mindspeed import (
    AttnMaskType,
    EosMask,
    GPTModel,
    LossWithMask,
    Module,
    ParallelLMLogits,
    VocabParallelCrossEntropy,
    get_language_model,
    get_train_valid_test_num_samples,
    pretrain,
    set_seed,
)
from parallel_core.compat.mindspeed.config import ModelConfig, keep, plain
from parallel_core.compat.mindspeed.eos_mask import document_starts_of_mask
from parallel_core.compat.mindspeed.stage import current_stage
from parallel_core.config.schema import AllConfig, DatasetConfig, TransformerConfig
from parallel_core.errors import ConfigError, DataError
from parallel_core.transformer import ModelStage
from tests.helpers.session import session_module
from tests.ranks.support import TINY, kernels


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    session_module().set_up(0, 1)
    with kernels("local"):
        yield


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(compat_config, "_current", [])
    parallel_state.set_context(None)
    yield
    parallel_state.set_context(None)


def config_of(**model: object) -> AllConfig:
    return keep(
        AllConfig(model_config=TransformerConfig(**{**TINY, **model}), dataset_config=DatasetConfig(batch_size=2))
    )


# ---- end-of-document masks ------------------------------------------------------------------------------------------
def brute_force(ids, eod, reset):
    """Megatron's loop over the documents of one sample."""
    mask, positions = np.tril(np.ones((len(ids), len(ids)), int)), np.arange(len(ids))
    before = 0
    for i in np.flatnonzero(ids == eod):
        mask[i + 1 :, : i + 1] = 0
        if reset:
            positions[i + 1 :] -= i + 1 - before
            before = i + 1
    return positions, 1 - mask


@pytest.mark.parametrize("eod", [0, 7])
@pytest.mark.parametrize("reset", [False, True])
def test_eos_mask_is_megatrons_and_eod_0_is_a_token(eod, reset):
    ids = np.random.default_rng(eod).integers(0, 9, (3, 40)).astype(np.int32)
    ids[1, 0] = ids[1, -1] = eod
    expected = [brute_force(row, eod, reset) for row in ids]
    positions, dense = EosMask(3, 40, eod, reset, dense=True)(Tensor(ids))
    _, starts = EosMask(3, 40, eod, reset)(Tensor(ids))
    assert (positions.dtype, dense.dtype, starts.dtype) == (ms.int32,) * 3
    np.testing.assert_array_equal(positions.asnumpy(), [row[0] for row in expected])
    np.testing.assert_array_equal(dense.asnumpy(), [row[1] for row in expected])
    np.testing.assert_array_equal(document_starts_of_mask(dense.asnumpy()), starts.asnumpy())
    np.testing.assert_array_equal(document_starts_of_mask(dense.asnumpy()[:, None] > 0), starts.asnumpy())


def test_positions_are_exact_in_long_samples():
    """16-bit floats have 11 bits of mantissa: offsets of 2049 and more would be rounded."""
    ids = np.ones((1, 8192), np.int32)
    ids[0, [2048, 4098, 6147]] = 5
    positions, _ = EosMask(1, 8192, 5, True)(Tensor(ids))
    lengths = (2049, 4099 - 2049, 6148 - 4099, 8192 - 6148)
    np.testing.assert_array_equal(positions.asnumpy()[0], np.concatenate([np.arange(n) for n in lengths]))


def test_eos_mask_says_what_is_wrong():
    for eod in (-1, None, True, 1.0):
        with pytest.raises(ConfigError, match="eod_token_id="):
            EosMask(1, 4, eod)
    with pytest.raises(DataError, match=r"made for ids of shape \[1, 4\], got \[2, 4\]"):
        EosMask(1, 4, 0)(Tensor(np.zeros((2, 4), np.int32)))
    with pytest.raises(DataError, match="this pipeline stage is given no tokens; set --reset-attention-mask"):
        EosMask(1, 4, 0)(None)
    hole = np.triu(np.ones((1, 4, 4), int), 1)
    hole[0, 3, 1] = 1
    with pytest.raises(ConfigError, match="is not causal within documents"):
        document_starts_of_mask(hole)


# ---- losses ---------------------------------------------------------------------------------------------------------
def test_loss_is_the_mean_over_what_counts():
    config_of()
    parallel_state.initialize_model_parallel()
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 8)).astype(np.float32)
    labels = rng.integers(0, 8, (2, 3)).astype(np.int32)
    mask = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
    loss = LossWithMask(VocabParallelCrossEntropy())(Tensor(logits), Tensor(labels), Tensor(mask))
    shifted = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.asnumpy(), (shifted * mask).sum() / 3, rtol=1e-6)
    nothing = LossWithMask(VocabParallelCrossEntropy())(Tensor(logits), Tensor(labels), Tensor(0 * mask))
    assert float(nothing) == 0.0  # not 0 / 0


def test_label_smoothing_is_the_configurations_unless_given():
    config_of(label_smoothing=0.25)
    parallel_state.initialize_model_parallel()
    assert VocabParallelCrossEntropy().label_smoothing == 0.25
    assert VocabParallelCrossEntropy(0.0).label_smoothing == 0.0


# ---- configuration --------------------------------------------------------------------------------------------------
def test_the_model_section_reaches_the_others_and_the_core_gets_its_own():
    config = config_of()
    assert isinstance(config.model_config, ModelConfig)
    assert config.model_config.dataset_config.batch_size == 2
    assert config.model_config.training_config is config.training_config
    assert type(plain(config).model_config) is TransformerConfig
    assert plain(config).model_config == TransformerConfig(**TINY)


def test_without_a_configuration_the_data_calls_say_what_to_do():
    with pytest.raises(ConfigError, match=r"call init_configs_from_args\(get_args\(\)\) first"):
        get_train_valid_test_num_samples()


def test_seeds():
    set_seed(0)
    first = np.random.rand()
    set_seed(0)
    assert np.random.rand() == first
    for bad in (-1, 2**32, "1", True):
        with pytest.raises(ConfigError, match="use an integer from 0"):
            set_seed(bad)


# ---- models ---------------------------------------------------------------------------------------------------------
def batch(seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(0, 32, (2, 2, 8)).astype(np.int32)
    mask = (rng.random((2, 8)) < 0.7).astype(np.float32)
    return {"tokens": Tensor(tokens), "labels": Tensor(labels), "loss_mask": Tensor(mask)}


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_model_is_the_cores(tied):
    config = config_of(untie_embeddings_and_output_weights=not tied)
    parallel_state.initialize_model_parallel()
    model = GPTModel(config.model_config)
    core = transformer.GPTModel(ModelStage(plain(config).model_config))
    assert {p.shard.name for p in model.trainable_params()} == {p.shard.name for p in core.trainable_params()}
    data = batch()
    tokens, labels, mask = data["tokens"], data["labels"], data["loss_mask"]

    def core_loss(tokens, labels, mask):
        return (core(tokens, labels=labels) * mask).sum() / mask.sum()

    def loss(tokens, labels, mask):
        return model(tokens, labels=labels, loss_mask=mask)

    got, gradients = ops.value_and_grad(loss, None, model.trainable_params())(tokens, labels, mask)
    want, expected = ops.value_and_grad(core_loss, None, core.trainable_params())(tokens, labels, mask)
    np.testing.assert_allclose(got.asnumpy(), want.asnumpy(), rtol=1e-6)
    of_core = {p.shard.name: g.asnumpy() for p, g in zip(core.trainable_params(), expected)}
    for parameter, gradient in zip(model.trainable_params(), gradients):
        np.testing.assert_allclose(gradient.asnumpy(), of_core[parameter.shard.name], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(model(tokens).asnumpy(), core(tokens).asnumpy())  # logits


@pytest.mark.parametrize("eod", [0, 3])
def test_eod_of_the_model_keeps_documents_apart(eod):
    config = config_of()
    parallel_state.initialize_model_parallel()
    model = GPTModel(config.model_config, eod=eod, reset_position_ids=True)
    data = batch()
    tokens = data["tokens"].asnumpy()
    tokens[:, 3] = eod
    tokens[:, 4:] = np.where(tokens[:, 4:] == eod, 5, tokens[:, 4:])
    whole = model(Tensor(tokens)).asnumpy()
    other = tokens.copy()
    other[:, :3] = (other[:, :3] + 1) % 32
    np.testing.assert_array_equal(model(Tensor(other)).asnumpy()[:, 4:], whole[:, 4:])
    assert not np.array_equal(GPTModel(config.model_config)(Tensor(other)).asnumpy()[:, 4:], whole[:, 4:])
    positions, dense = EosMask(2, 8, eod, True, dense=True)(Tensor(tokens))
    np.testing.assert_array_equal(GPTModel(config.model_config)(Tensor(tokens), positions, dense).asnumpy(), whole)


def test_models_outside_of_a_provider_need_a_context_and_one_stage():
    config = config_of()
    with pytest.raises(ConfigError, match="model parallelism is not initialized"):
        GPTModel(config.model_config)
    parallel_state.initialize_model_parallel()
    with pytest.raises(ConfigError, match="known inside pretrain"):
        GPTModel(plain(config).model_config)
    assert current_stage(config.model_config).layer_numbers == (0, 1, 2, 3)


def test_16_bit_types_compute_in_float32_on_the_cpu():
    config = config_of(compute_dtype="bfloat16", params_dtype="float32")
    parallel_state.initialize_model_parallel()
    model = GPTModel(config.model_config)
    assert model(batch()["tokens"]).dtype == ms.float32
    assert ParallelLMLogits(config.model_config, compute_dtype=ms.bfloat16).compute_dtype == ms.float32
    assert ParallelLMLogits(config.model_config, compute_dtype="float16").compute_dtype == ms.float32
    with pytest.raises(ConfigError, match="compute_dtype="):
        ParallelLMLogits(config.model_config, compute_dtype=ms.int32)


def test_logits_take_a_bias():
    config = config_of()
    parallel_state.initialize_model_parallel()
    hidden = Tensor(np.random.default_rng(1).standard_normal((8, 2, 16)).astype(np.float32))
    weight = Tensor(np.random.default_rng(2).standard_normal((32, 16)).astype(np.float32))
    plain_logits = ParallelLMLogits(config.model_config)(hidden, weight)
    bias = Tensor(np.arange(32, dtype=np.float32))
    np.testing.assert_allclose(
        ParallelLMLogits(config.model_config)(hidden, weight, True, bias).asnumpy(),
        plain_logits.asnumpy() + np.arange(32),
        rtol=1e-6,
    )
    assert len(ParallelLMLogits(config.model_config, bias=True).trainable_params()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokentypes": 2}, "num_tokentypes=2 is not built"),
        ({"add_pooler": True}, "add_pooler=True is not built"),
        ({"add_decoder": True}, "add_decoder=True is not built"),
        ({"encoder_attn_mask_type": AttnMaskType.padding}, "attention mask type .*padding.* is not built; use causal"),
    ],
)
def test_language_models_that_are_not_built(arguments, message):
    config = config_of()
    parallel_state.initialize_model_parallel()
    with pytest.raises(ConfigError, match=message):
        get_language_model(config.model_config, **arguments)


def test_calls_that_are_not_built():
    config = config_of()
    parallel_state.initialize_model_parallel()
    model, tokens = GPTModel(config.model_config), batch()["tokens"]
    with pytest.raises(ConfigError, match="tokentype_ids: not built"):
        model(tokens, tokentype_ids=tokens)
    with pytest.raises(ConfigError, match="labels are given, but no loss_mask"):
        model(tokens, labels=tokens)
    later = GPTModel(config.model_config, pre_process=False)
    with pytest.raises(ConfigError, match=r"call set_input_tensor\(hidden\) before each call"):
        later(tokens)


def test_sharing_the_embedding():
    config = config_of()
    parallel_state.initialize_model_parallel()
    first = GPTModel(config.model_config, post_process=False)
    last = GPTModel(config.model_config, pre_process=False)
    own, copy = first.shared_embedding_or_output_weight(), last.shared_embedding_or_output_weight()
    np.testing.assert_array_equal(own.asnumpy(), copy.asnumpy())
    assert own.shard.shared_embedding and copy.shard.shared_embedding
    assert copy.shard.is_copy and not own.shard.is_copy
    between = GPTModel(config.model_config, pre_process=False, post_process=False)
    with pytest.raises(ConfigError, match="this stage holds no embedding"):
        between.shared_embedding_or_output_weight()
    untied = dataclasses.replace(config.model_config, untie_embeddings_and_output_weights=True)
    with pytest.raises(ConfigError, match="nothing to share"):
        GPTModel(untied).initialize_word_embeddings()
    with pytest.raises(ConfigError, match="Module has no language_model"):
        Module(config.model_config).set_input_tensor(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": "encoder_and_decoder"}, "only encoder_or_decoder"),
        ({"forward_step_func": len, "get_batch_func": len}, "give forward_step_func or get_batch_func"),
        ({"args_defaults": {"lr": 1.0}}, "give them to initialize_megatron"),
        ({"extra_args_provider": len}, "give them to initialize_megatron"),
    ],
)
def test_pretrain_refuses_what_it_could_only_ignore(arguments, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(None, lambda pre_process, post_process: None, all_config=config_of(), **arguments)


def test_the_layout_is_the_one_that_was_initialized():
    config = config_of()
    parallel_state.initialize_model_parallel()
    two = dataclasses.replace(config.parallel_config, tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=2, but parallel_state was initialized with 1"):
        pretrain(None, GPTModel, all_config=dataclasses.replace(config, parallel_config=two))
