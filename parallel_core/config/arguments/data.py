"""Arguments of the data (`dataset_config`), and those that the reader of the arguments itself obeys."""

from __future__ import annotations

from parallel_core.config.argument import Argument, mapped

_SPEED = "MindSpeed-Core-MS"
_D = "dataset_config."

BATCHES: tuple[Argument, ...] = (
    mapped("micro_batch_size", "int", None, _D + "batch_size", "samples in one microbatch", aliases=("batch_size_ms",)),
    mapped("global_batch_size", "int", None, _D + "global_batch_size " + _D + "micro_batch_num",
           "samples of one step over all ranks; default micro_batch_size x data parallel size x micro_batch_num"),
    mapped("micro_batch_num", "int", None, _D + "micro_batch_num", "microbatches of each rank in one step",
           origin=_SPEED),
    mapped("rampup_batch_size", "ints", None, _D + "rampup_batch_size",
           "start, increment and samples of the global batch size's growth"),
    mapped("dataloader_type", "str", None, _D + "dataloader_type", "order in which samples are taken",
           choices=("single", "cyclic", "external")),
    mapped("num_workers", "int", 2, _D + "num_workers", "threads that prepare batches ahead"),
    mapped("drop_remainder", "toggle", True, _D + "drop_remainder", "leave out a last, incomplete batch",
           origin=_SPEED),
)

SOURCES: tuple[Argument, ...] = (
    mapped("data_path", "strs", None, _D + "data_path", "prefix of the data, or weights and prefixes in turn"),
    mapped("train_data_path", "strs", None, _D + "train_data_path", "training data"),
    mapped("valid_data_path", "strs", None, _D + "valid_data_path", "validation data"),
    mapped("test_data_path", "strs", None, _D + "test_data_path", "test data"),
    mapped("data_args_path", "str", None, _D + "data_args_path", "file that holds the words of data_path"),
    mapped("split", "str", None, _D + "split", "shares of training, validation and test; default 969, 30, 1"),
    mapped("data_cache_path", "str", None, _D + "data_cache_path", "where index files are kept"),
    mapped("mock_data", "flag", False, _D + "mock_data", "made-up data"),
    mapped("mmap_bin_files", "off", True, _D + "mmap_bin_files", "map data files instead of reading them",
           flags=("--no-mmap-bin-files",)),
    mapped("reset_position_ids", "flag", False, _D + "reset_position_ids", "positions start again at each document"),
    mapped("reset_attention_mask", "flag", False, _D + "reset_attention_mask",
           "attention stays within its document"),
    mapped("eod_mask_loss", "flag", False, _D + "eod_mask_loss", "no loss on end-of-document tokens"),
    mapped("eos_token_id", "int", None, _D + "eos_token_id", "end-of-document token; default the tokenizer's",
           origin=_SPEED, aliases=("eod_token_id",)),
    mapped("pad_token_id", "int", None, _D + "pad_token_id", "padding token; default none", origin=_SPEED),
    mapped("tokenizer_type", "str", None, _D + "tokenizer_type", "kind of tokenizer"),
    mapped("tokenizer_model", "str", None, _D + "tokenizer_model", "file of the tokenizer"),
    mapped("legacy_tokenizer", "flag", False, _D + "legacy_tokenizer model_config.vocab_size",
           "Megatron's legacy classes: a SentencePieceTokenizer with its own special tokens"),
    mapped("vocab_extra_ids", "int", 0, _D + "vocab_extra_ids model_config.vocab_size",
           "further tokens <extra_id_i> of a legacy SentencePieceTokenizer"),
    mapped("vocab_file", "str", None, _D + "vocab_file", "vocabulary file of a BPE tokenizer"),
    mapped("merge_file", "str", None, _D + "merge_file", "merges file of a BPE tokenizer"),
)

READING: tuple[Argument, ...] = (
    mapped("yaml_cfg", "str", None, "", "YAML file with the values that flags do not give", direct=False,
           aliases=("config",)),
    mapped("use_checkpoint_args", "flag", False, "model_config.num_layers",
           "model arguments come from the checkpoint in load", direct=False),
    mapped("use_mp_args_from_checkpoint_args", "flag", False, "parallel_config.tensor_model_parallel_size",
           "with use_checkpoint_args: the layout too", direct=False),
    mapped("use_tokenizer_model_from_checkpoint_args", "off", True, "dataset_config.tokenizer_model",
           "with use_checkpoint_args: the tokenizer too", direct=False,
           flags=("--no-use-tokenizer-model-from-checkpoint-args",
                  "--disable-use-tokenizer-model-from-checkpoint-args")),
)

DATA = BATCHES + SOURCES + READING
