"""The formulas that several rooms share, with numbers from Megatron."""

from __future__ import annotations

import pytest

from parallel_core.errors import ConfigError
from parallel_core.layout import derived


@pytest.mark.parametrize(
    ("size", "multiple", "tp", "padded"),
    [(50257, 128, 1, 50304), (50257, 128, 4, 50688), (256, 128, 1, 256), (257, 128, 1, 384), (2048, 128, 16, 2048)],
)
def test_vocabulary_padding(size, multiple, tp, padded):
    assert derived.padded_vocab_size(size, multiple, tp) == padded


def test_widths():
    """Llama's 4096 gives 10880 by Megatron's rule (Meta's 11008 is a choice of its own); GPT-2's 768 gives 3072."""
    assert derived.feed_forward_width(4096, gated=True) == 10880
    assert derived.feed_forward_width(768, gated=False) == 3072
    assert derived.feed_forward_width(8, gated=True) == 64
    assert derived.head_size(64, 4) == 16 and derived.key_value_heads(8, 2, grouped=False) == 8
    assert derived.key_value_heads(8, 0, grouped=True) == 1


def test_chunks():
    assert derived.chunks_per_rank(8, 2, 2) == 2
    for wrong in ((7, 2, 2), (8, 0, 2), (8, 2, 0)):
        with pytest.raises(ConfigError, match="not a whole number of chunks"):
            derived.chunks_per_rank(*wrong)
