"""MindFormers' interface: `from parallel_core.api import ...` for `from mindformers import ...`."""

from __future__ import annotations

from parallel_core.api.auto import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from parallel_core.api.bases import (
    BaseDataset,
    BasePipeline,
    BaseTrainer,
    ProcessorMixin,
    get_input_data_batch_slice_map,
    get_real_group_size,
    get_real_rank,
)
from parallel_core.api.book import MindFormerBook
from parallel_core.api.configs import BertConfig, GPT2Config, LlamaConfig, PanguAlphaConfig, PretrainedConfig
from parallel_core.api.contexts import ContextConfig, ParallelContextConfig, init_context
from parallel_core.api.interleaving import MicroBatchInterleaved
from parallel_core.api.models import (
    BertForPreTraining,
    BertForQuestionAnswering,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PanguAlphaHeadModel,
    PreTrainedModel,
)
from parallel_core.api.pipelines import pipeline
from parallel_core.api.register import MindFormerModuleType, MindFormerRegister
from parallel_core.api.settings_file import MindFormerConfig
from parallel_core.api.streamers import TextIteratorStreamer, TextStreamer
from parallel_core.api.tokenizers import (
    AddedToken,
    BertProcessor,
    BertTokenizer,
    GPT2Processor,
    GPT2Tokenizer,
    LlamaProcessor,
    LlamaTokenizer,
    PanguAlphaProcessor,
    PanguAlphaTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
)
from parallel_core.api.trainer import Trainer, TrainingArguments

__all__ = [
    "AddedToken", "AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "BaseDataset", "BasePipeline",
    "BaseTrainer", "BertConfig", "BertForPreTraining", "BertForQuestionAnswering", "BertModel", "BertProcessor",
    "BertTokenizer", "ContextConfig", "GPT2Config", "GPT2ForSequenceClassification", "GPT2LMHeadModel",
    "GPT2Processor", "GPT2Tokenizer", "LlamaConfig", "LlamaForCausalLM", "LlamaProcessor", "LlamaTokenizer",
    "MicroBatchInterleaved", "MindFormerBook", "MindFormerConfig", "MindFormerModuleType", "MindFormerRegister",
    "PanguAlphaConfig", "PanguAlphaHeadModel", "PanguAlphaProcessor", "PanguAlphaTokenizer", "ParallelContextConfig",
    "PreTrainedModel", "PreTrainedTokenizer", "PreTrainedTokenizerBase", "PretrainedConfig", "ProcessorMixin",
    "TextIteratorStreamer", "TextStreamer", "Trainer", "TrainingArguments", "get_input_data_batch_slice_map",
    "get_real_group_size", "get_real_rank", "init_context", "pipeline",
]  # fmt: skip
