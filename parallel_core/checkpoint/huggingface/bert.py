"""BERT of Hugging Face: its tensors, and its head, which `architectures` names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from parallel_core.checkpoint.huggingface.architecture import Fields, Group
from parallel_core.checkpoint.huggingface.tensors import (
    OUTPUT,
    OUTPUT_BIAS,
    POSITIONS,
    TOKENTYPES,
    WORD_EMBEDDINGS,
    TensorTable,
)
from parallel_core.checkpoint.huggingface.values import Wrong
from parallel_core.config.schema import TransformerConfig

BERT_CLASSES = {
    "BertForPreTraining": "pretraining",
    "BertForMaskedLM": "masked_lm",
    "BertForQuestionAnswering": "question_answering",
    "BertModel": "encoder",
}
"""Their class -> our `bert_head`."""


def _both(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


BERT_TENSORS = TensorTable(
    "bert.",
    {
        WORD_EMBEDDINGS: "bert.embeddings.word_embeddings.weight",
        POSITIONS: "bert.embeddings.position_embeddings.weight",
        TOKENTYPES: "bert.embeddings.token_type_embeddings.weight",
        OUTPUT: "cls.predictions.decoder.weight",
        OUTPUT_BIAS: "cls.predictions.bias",
        **_both("embedding.layernorm", "bert.embeddings.LayerNorm"),
        **_both("lm_head.dense", "cls.predictions.transform.dense"),
        **_both("lm_head.layernorm", "cls.predictions.transform.LayerNorm"),
        **_both("pooler.dense", "bert.pooler.dense"),
        **_both("binary_head", "cls.seq_relationship"),
        **_both("qa_outputs", "qa_outputs"),
    },
    "encoder.layer.{}",
    {
        "self_attention.linear_qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "self_attention.linear_proj": ("attention.output.dense",),
        "post_attention_layernorm": ("attention.output.LayerNorm",),
        "mlp.linear_fc1": ("intermediate.dense",),
        "mlp.linear_fc2": ("output.dense",),
        "post_mlp_layernorm": ("output.LayerNorm",),
    },
    # Heads that the named class has no use for lie in the files of many models; `transformers` leaves them out too.
    ignored=re.compile(
        r".*position_ids|cls\.predictions\.decoder\.bias|cls\.seq_relationship\..*|(bert\.)?pooler\.dense\..*"
    ),
    older={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)


def bert_head() -> Group:
    """Return the head, which stands in the name of the class."""

    def read(found: Mapping[str, Any], _: Fields) -> Fields:
        named = found.get("architectures")
        if not isinstance(named, list) or len(named) != 1 or named[0] not in BERT_CLASSES:
            raise Wrong(f"architectures={named!r} names the model's head; give one of {', '.join(BERT_CLASSES)}")
        return {"bert.bert_head": BERT_CLASSES[named[0]]}

    def write(model: TransformerConfig) -> dict[str, Any]:
        for name, head in BERT_CLASSES.items():
            if model.bert.bert_head == head:
                return {"architectures": [name]}
        raise Wrong(f"bert_head={model.bert.bert_head!r}, an encoder's head there")

    return Group(("architectures",), ("bert.bert_head",), read, write)
