"""The section of bidirectional encoders (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass

BERT_HEADS = ("none", "encoder", "masked_lm", "pretraining", "question_answering")
"""What stands on the layers of an encoder; none: the model is no encoder."""
HEADS = ("lm_head.", "output_layer.", "pooler.", "binary_head.", "qa_outputs.", "score.")
"""How the names of a head's tensors begin."""
WORD_HEADS = ("masked_lm", "pretraining")
"""Those that predict words, by the word embedding."""


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """An encoder: attention to both sides, norms after the residual additions, segments, a head for its task."""

    bert_head: str = "none"
    """none: no encoder; encoder: hidden states and the pooled first one; masked_lm: the words behind masks;
    pretraining: these and whether the second segment follows the first; question_answering: where an answer begins and
    ends."""
    num_tokentypes: int = 2
    """Rows of the segment embedding."""

    @property
    def is_encoder(self) -> bool:
        """Whether the model is an encoder at all."""
        return self.bert_head != "none"

    @property
    def predicts_words(self) -> bool:
        """Whether there is an output layer over the vocabulary."""
        return self.bert_head in WORD_HEADS

    @property
    def has_pooler(self) -> bool:
        """Whether a dense layer and a tanh stand on the first position."""
        return self.bert_head in ("encoder", "pretraining")
