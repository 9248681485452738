"""Models on the core other than a GPT, and which one a configuration asks for."""

from __future__ import annotations

from parallel_core.transformer.gpt_model import GPTModel
from parallel_core.transformer.models.bert import BertModel
from parallel_core.transformer.models.classifier import TextClassifier
from parallel_core.transformer.models.pangu_alpha import PanguAlphaModel
from parallel_core.transformer.stage import ModelStage

__all__ = ["BertModel", "PanguAlphaModel", "TextClassifier", "make_model"]


def make_model(stage: ModelStage) -> GPTModel:
    """Return the part of the model that `stage.config` describes."""
    if stage.config.bert.is_encoder:
        return BertModel(stage)
    if stage.config.num_labels:
        return TextClassifier(stage)
    return PanguAlphaModel(stage) if stage.config.top_query_layer != "none" else GPTModel(stage)
