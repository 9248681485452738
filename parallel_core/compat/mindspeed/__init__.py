"""The Python API of MindSpeed-Core-MS pretraining scripts: their code runs with other imports and nothing else.

User code only: nothing in the package imports this. It is a thin layer over `parallel_core.transformer` and
`parallel_core.training`, with the context and the pipeline stage taken from `parallel_core.parallel_state` instead of
passed down. `examples/pretrain_gpt_mindspeed.py` is such a script.
"""

from parallel_core.compat.mindspeed.config import init_configs_from_args, init_configs_from_yaml
from parallel_core.compat.mindspeed.data import (
    build_pretraining_data_loader,
    get_train_valid_test_num_samples,
    train_valid_test_datasets_provider,
)
from parallel_core.compat.mindspeed.eos_mask import EosMask
from parallel_core.compat.mindspeed.gpt_model import AttnMaskType, GPTModel, post_language_model_processing
from parallel_core.compat.mindspeed.language_model import ParallelLMLogits, TransformerLanguageModel, get_language_model
from parallel_core.compat.mindspeed.loss import LossWithMask, VocabParallelCrossEntropy
from parallel_core.compat.mindspeed.module import Module
from parallel_core.compat.mindspeed.training import get_batch, pretrain, set_parallel_context, set_seed
from parallel_core.config import get_args, initialize_megatron
from parallel_core.training.batches import get_batch_on_this_cp_rank

__all__ = [
    "AttnMaskType",
    "EosMask",
    "GPTModel",
    "LossWithMask",
    "Module",
    "ParallelLMLogits",
    "TransformerLanguageModel",
    "VocabParallelCrossEntropy",
    "build_pretraining_data_loader",
    "get_args",
    "get_batch",
    "get_batch_on_this_cp_rank",
    "get_language_model",
    "get_train_valid_test_num_samples",
    "init_configs_from_args",
    "init_configs_from_yaml",
    "initialize_megatron",
    "post_language_model_processing",
    "pretrain",
    "set_parallel_context",
    "set_seed",
    "train_valid_test_datasets_provider",
]
