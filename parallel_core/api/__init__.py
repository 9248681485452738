"""MindFormers' interface on one process: `from parallel_core.api import ...` for `from mindformers import ...`."""

from __future__ import annotations

from parallel_core.api.auto import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from parallel_core.api.configs import BertConfig, GPT2Config, LlamaConfig, PanguAlphaConfig, PretrainedConfig
from parallel_core.api.contexts import ContextConfig, ParallelContextConfig, init_context
from parallel_core.api.models import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PanguAlphaHeadModel,
    PreTrainedModel,
)
from parallel_core.api.pipelines import pipeline
from parallel_core.api.register import MindFormerModuleType, MindFormerRegister
from parallel_core.api.streamers import TextIteratorStreamer, TextStreamer
from parallel_core.api.tokenizers import (
    BertProcessor,
    BertTokenizer,
    GPT2Processor,
    GPT2Tokenizer,
    LlamaProcessor,
    LlamaTokenizer,
    PanguAlphaProcessor,
    PanguAlphaTokenizer,
    PreTrainedTokenizer,
)
from parallel_core.api.trainer import Trainer, TrainingArguments

__all__ = [
    "AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "BertConfig", "BertForPreTraining",
    "BertForQuestionAnswering", "BertModel", "BertProcessor", "BertTokenizer", "ContextConfig", "GPT2Config",
    "GPT2LMHeadModel", "GPT2Processor", "GPT2Tokenizer", "LlamaConfig", "LlamaForCausalLM", "LlamaProcessor",
    "LlamaTokenizer", "MindFormerModuleType", "MindFormerRegister", "PanguAlphaConfig", "PanguAlphaHeadModel",
    "PanguAlphaProcessor", "PanguAlphaTokenizer", "ParallelContextConfig", "PreTrainedModel", "PreTrainedTokenizer",
    "PretrainedConfig", "TextIteratorStreamer", "TextStreamer", "Trainer", "TrainingArguments", "init_context",
    "pipeline",
]  # fmt: skip
