"""`--use-checkpoint-args`: model arguments from the checkpoint that `load` names."""

from __future__ import annotations

from collections.abc import Mapping

from parallel_core.config import table
from parallel_core.config.values import Given
from parallel_core.errors import ConfigError, ParallelCoreError

MODEL_NAMES = """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention
    kv_channels max_position_embeddings position_embedding_type add_position_embedding use_rotary_position_embeddings
    rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor add_bias_linear add_qkv_bias
    squared_relu swiglu openai_gelu hidden_act untie_embeddings_and_output_weights apply_layernorm_1p normalization
    norm_epsilon qk_layernorm apply_query_key_layer_scaling attention_dropout hidden_dropout
    make_vocab_size_divisible_by padded_vocab_size vocab_size qkv_has_bias add_dense_bias use_sandwich_norm
    num_experts multi_latent_attention
"""
LAYOUT_NAMES = """
    tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    num_layers_per_virtual_pipeline_stage
"""
TOKENIZER_NAMES = "tokenizer_type tokenizer_model vocab_file merge_file legacy_tokenizer vocab_extra_ids"


def checkpoint_values(given: Mapping[str, Given]) -> list[Given]:
    """Return the values that the checkpoint in `load` was trained with, as far as the user asks for them.

    Raises:
        ConfigError: `load` is not given, or is no checkpoint that can be read.
    """
    if "load" not in given:
        raise ConfigError(f"{given['use_checkpoint_args'].terms}: needs load, the checkpoint to take them from")
    root = str(given["load"].value)
    from parallel_core.checkpoint.native import find_checkpoint  # Only this option needs the checkpoint readers.
    from parallel_core.checkpoint.opening import open_checkpoint

    step = given["ckpt_step"].value if "ckpt_step" in given else None
    try:
        common = open_checkpoint(find_checkpoint(root, step, check=False)).common  # type: ignore[arg-type]
    except ParallelCoreError as error:
        raise ConfigError(str(error)) from None
    stored = common.get("megatron_args") or common.get("model_config") or {}
    if not stored:
        raise ConfigError(f"{given['load'].terms}: has no arguments in it")
    by_field = "padded_vocab_size" not in stored
    names = MODEL_NAMES.split()
    if "use_mp_args_from_checkpoint_args" in given:
        names += LAYOUT_NAMES.split()
    keep = given.get("use_tokenizer_model_from_checkpoint_args")
    if keep is None or keep.value:
        names += TOKENIZER_NAMES.split()
    values = []
    for key, value in stored.items():
        direct = table.DIRECT.get(f"model_config.{key}") if by_field else None
        found = (direct, False) if direct else table.find(str(key))
        if found and not found[1] and found[0].name in names and value is not None:
            values.append(Given(found[0].name, value, f"checkpoint {root}", str(key), value))
    return values
