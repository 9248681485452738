"""Megatron's data pipeline in NumPy: the same samples, in the same order, from the same files."""

from __future__ import annotations

from parallel_core.data.blended_dataset import BlendedDataset
from parallel_core.data.blending import build_blending_indices, build_exhaustive_blending_indices
from parallel_core.data.builder import build_train_valid_test_datasets, train_valid_test_num_samples
from parallel_core.data.bundled import bundled_tokenizer, bundled_tokenizer_model, prepare_bundled_corpus
from parallel_core.data.config import Blend, GPTDatasetConfig, Split, blends_from_arguments, parse_blend
from parallel_core.data.data_order import data_order_fingerprint, describe_data_order, explain_data_order_change
from parallel_core.data.gpt_dataset import GPTDataset
from parallel_core.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, merge_indexed_datasets
from parallel_core.data.loader import PretrainingDataLoader, build_pretraining_data_loader
from parallel_core.data.masked_words import MaskedWordsConfig, MaskedWordsDataset
from parallel_core.data.masks import attention_mask_from_document_starts, document_starts
from parallel_core.data.parallel_batch import TensorParallelBatches, fields_of, stage_needs_data
from parallel_core.data.samplers import MegatronPretrainingRandomSampler, MegatronPretrainingSampler
from parallel_core.data.tokenizer import MegatronTokenizer, build_tokenizer

__all__ = [
    "Blend",
    "BlendedDataset",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "MaskedWordsConfig",
    "MaskedWordsDataset",
    "MegatronPretrainingRandomSampler",
    "MegatronPretrainingSampler",
    "MegatronTokenizer",
    "PretrainingDataLoader",
    "Split",
    "TensorParallelBatches",
    "attention_mask_from_document_starts",
    "blends_from_arguments",
    "build_blending_indices",
    "build_exhaustive_blending_indices",
    "build_pretraining_data_loader",
    "build_tokenizer",
    "build_train_valid_test_datasets",
    "bundled_tokenizer",
    "bundled_tokenizer_model",
    "data_order_fingerprint",
    "describe_data_order",
    "document_starts",
    "explain_data_order_change",
    "fields_of",
    "merge_indexed_datasets",
    "parse_blend",
    "prepare_bundled_corpus",
    "stage_needs_data",
    "train_valid_test_num_samples",
]
