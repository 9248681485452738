"""The frequencies of rotary embeddings, plain and scaled to sequences longer than those of the first training.

Sources: Llama 3.1 (arXiv:2407.21783), YaRN (arXiv:2309.00071); conventions of Megatron-LM and of Hugging Face's
`transformers`, which agree.
"""

from __future__ import annotations

import math

import numpy as np

from parallel_core.config.schema import TransformerConfig
from parallel_core.layout.derived import yarn_concentration


def rotary_frequencies(config: TransformerConfig, length: int) -> np.ndarray:
    """Return how far each pair of channels turns from one position to the next, radians, float32 [R / 2].

    Args:
        config: the model; R = its rotary_channels.
        length: positions in the sequence; dynamic scaling depends on it.
    """
    dim, base = config.rotary_channels, float(config.rotary_base)
    if config.rope_dynamic_factor != 1.0:
        base *= _dynamic_growth(config, length) ** (dim / (dim - 2))
    plain = 1.0 / (base ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))
    if config.use_rope_scaling:
        plain = _llama3(plain, config)
    if config.has_yarn:
        plain = _yarn(plain, config, dim)
    return (plain / np.float32(config.rotary_seq_len_interpolation_factor)).astype(np.float32)


def rotary_amplitude(config: TransformerConfig) -> float:
    """Return what cosines and sines are multiplied by: 1, or YaRN's attention factor.

    In multi-latent attention the numerator and the denominator count alone too.
    """
    if not config.has_yarn:
        return 1.0
    if config.yarn_attention_factor:
        return config.yarn_attention_factor
    factor, over, under = config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim
    if config.mla.multi_latent_attention:
        return yarn_concentration(factor, over) / yarn_concentration(factor, under)
    if over and under:
        return yarn_concentration(factor, over) / yarn_concentration(factor, under)
    return yarn_concentration(factor, 1.0)


def _dynamic_growth(config: TransformerConfig, length: int) -> float:
    """Return the factor of the base (before its exponent) for a sequence of `length`; 1 up to the trained length."""
    trained, factor = config.rope_original_max_position_embeddings, config.rope_dynamic_factor
    return factor * max(length, trained) / trained - (factor - 1)


def _llama3(plain: np.ndarray, config: TransformerConfig) -> np.ndarray:
    """Return frequencies with slow ones divided by the factor, fast ones kept, and a linear blend in between."""
    slow, fast = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_position_embeddings * plain / (2 * math.pi)
    kept = np.clip((turns - slow) / (fast - slow), 0.0, 1.0)
    return ((1 - kept) * plain / config.rope_scaling_factor + kept * plain).astype(np.float32)


def _yarn(plain: np.ndarray, config: TransformerConfig, dim: int) -> np.ndarray:
    """Return frequencies blended from kept to divided by the factor, linearly over the channels between two counts."""

    def channel(turns: float) -> float:
        positions = config.rope_original_max_position_embeddings
        return dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    first, last = channel(config.yarn_beta_fast), channel(config.yarn_beta_slow)
    if config.yarn_correction_range_round_to_int:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    span = last - first if last != first else 0.001  # the reference's way around a division by zero
    divided = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / span, 0.0, 1.0)
    return (plain / config.yarn_rotary_scaling_factor * divided + plain * (1 - divided)).astype(np.float32)
