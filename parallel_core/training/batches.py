"""From dataset to the tensors of a microbatch, on the ranks that need them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.comm.interface import Group
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.data import (
    GPTDatasetConfig,
    MegatronTokenizer,
    TensorParallelBatches,
    blends_from_arguments,
    build_pretraining_data_loader,
    build_tokenizer,
    build_train_valid_test_datasets,
    bundled_tokenizer_model,
    parse_blend,
    prepare_bundled_corpus,
    stage_needs_data,
)
from parallel_core.data.chat import HOW_TO_NAME_ONE, ChatTemplate, chat_template, tokenizer_folders
from parallel_core.errors import ConfigError, DataError
from parallel_core.layout.sequence import cut

TensorBatch = dict[str, Tensor | None]
"""tokens, labels, position_ids, document_start (the first position that each may see): int32 [B, S]; loss_mask: float32
[B, S]. None where a stage does not need it, or where it says nothing (positions 0..S-1, plain causal attention)."""


def gpt_dataset_config(config: AllConfig) -> GPTDatasetConfig:
    """Return the datasets' configuration; without any data source it is the bundled corpus with its tokenizer."""
    data = config.dataset_config
    per_split = (data.train_data_path, data.valid_data_path, data.test_data_path)
    bundled = not (data.data_path or any(per_split) or data.data_args_path or data.mock_data)
    blend = parse_blend((prepare_bundled_corpus(data.data_cache_path or None),)) if bundled else None
    blends: tuple[Any, Any] = (blend, None)
    if not bundled and not data.mock_data:
        blends = blends_from_arguments(
            data_path=data.data_path or None,
            train_data_path=data.train_data_path or None,
            valid_data_path=data.valid_data_path or None,
            test_data_path=data.test_data_path or None,
            data_args_path=data.data_args_path or None,
        )
    tokenizer_type, tokenizer_model = data.tokenizer_type, data.tokenizer_model
    if not tokenizer_type and bundled:
        tokenizer_type, tokenizer_model = "SentencePieceTokenizer", bundled_tokenizer_model()
    tokenizer = build_tokenizer(
        tokenizer_type or "NullTokenizer",
        tokenizer_model=tokenizer_model or None,
        vocab_file=data.vocab_file or None,
        merge_file=data.merge_file or None,
        vocab_extra_ids=data.vocab_extra_ids,
        legacy_tokenizer=data.legacy_tokenizer,
        vocab_size=data.unpadded_vocab_size or config.model_config.vocab_size - 1,
    )
    return GPTDatasetConfig(
        random_seed=config.training_config.seed,
        sequence_length=config.model_config.seq_length,
        tokenizer=tokenizer,
        blend=blends[0],
        blend_per_split=blends[1],
        split=None if blends[1] else data.split,
        mock=data.mock_data,
        path_to_cache=data.data_cache_path or None,
        mmap_bin_files=data.mmap_bin_files,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        eos_token_id=None if data.eos_token_id < 0 else data.eos_token_id,
        padding_id=None if data.pad_token_id < 0 else data.pad_token_id,
        chat=_chat(config, tokenizer) if data.sft else None,
    )


def _chat(config: AllConfig, tokenizer: MegatronTokenizer) -> ChatTemplate:
    data = config.dataset_config
    folders = tokenizer_folders(data.tokenizer_model, data.vocab_file)
    template = chat_template(tokenizer, folders, data.sft_tokenizer_prompt_format, data.chat_template)
    if template is None:
        raise ConfigError(f"sft: there is no chat template in {', '.join(folders)}; {HOW_TO_NAME_ONE}")
    return template


def default_datasets_provider(config: AllConfig) -> Callable[[tuple[int, int, int]], tuple[Any, Any, Any]]:
    """Return a `train_valid_test_datasets_provider(num_samples)` that builds GPT datasets."""

    def provide(num_samples: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        return build_train_valid_test_datasets(gpt_dataset_config(config), num_samples)

    return provide


class BatchSource:
    """This rank's microbatches as tensors, each model chunk reading the same ones at its own pace.

    The first rank of a tensor parallel group reads, the others receive; pipeline stages that need no data give empty
    batches.

    Args:
        loader: iterator of NumPy microbatches, or None on ranks that do not read.
        config: the run.
        context: this rank's groups.
        num_chunks: model chunks on this rank.
        needs_data: whether this rank's stages use data at all.
    """

    def __init__(
        self,
        loader: Iterator[dict[str, np.ndarray]] | None,
        config: AllConfig,
        context: ParallelContext,
        num_chunks: int,
        needs_data: bool,
    ) -> None:
        data = config.dataset_config
        self._keep_positions = data.reset_position_ids
        self._cp = context.cp
        self._keep_mask = data.reset_attention_mask
        self._vocab_size = config.model_config.vocab_size
        self._loader = loader
        self._queues: list[deque[TensorBatch]] = [deque() for _ in range(num_chunks)]
        self._batches: Iterator[dict[str, np.ndarray]] | None = loader
        if needs_data and context.tp.size > 1:
            self._batches = TensorParallelBatches(
                loader,
                lambda array: context.tp.broadcast_(Tensor(array)).asnumpy(),
                micro_batch_size=data.batch_size,
                sequence_length=config.model_config.seq_length,
                has_document_start=data.reset_attention_mask,
            )
        self._needs_data = needs_data

    def iterator(self, chunk: int) -> Iterator[TensorBatch]:
        """Return the microbatches of one chunk."""
        while True:
            if not self._queues[chunk]:
                batch = self._next()
                for queue in self._queues:
                    queue.append(batch)
            yield self._queues[chunk].popleft()

    def close(self) -> None:
        """Stop reading ahead."""
        close = getattr(self._loader, "close", None)
        if close is not None:
            close()

    def _next(self) -> TensorBatch:
        empty: TensorBatch = dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids", "document_start"))
        if not self._needs_data:
            return empty
        if self._batches is None:
            raise DataError("this rank has no data to read")
        try:
            arrays = next(self._batches)
        except StopIteration:
            raise DataError(
                "the data is used up: the dataset holds fewer samples than the run asks for; give --train-iters or "
                "--train-samples that fit, more data, or --dataloader-type cyclic; of batches of one's own give what "
                "can be iterated again (a list, a class with __iter__) in place of an iterator"
            ) from None
        self._check(arrays["tokens"])
        return self._tensors(arrays, empty)

    def _tensors(self, arrays: dict[str, np.ndarray], empty: TensorBatch) -> TensorBatch:
        """Return this rank's part of the sequences; document starts stay whole, because its queries see all keys."""
        whole = {name: array for name, array in arrays.items() if name != "document_start"}
        whole.setdefault("position_ids", np.broadcast_to(np.arange(whole["tokens"].shape[1]), whole["tokens"].shape))
        part = get_batch_on_this_cp_rank(whole, self._cp)
        batch: TensorBatch = {
            **empty,
            "tokens": _int32(part["tokens"]),
            "labels": _int32(part["labels"]),
            "loss_mask": Tensor(part["loss_mask"].astype(np.float32)),
        }
        if self._keep_positions:
            batch["position_ids"] = _int32(part["position_ids"])
        if self._keep_mask:
            batch["document_start"] = _int32(arrays["document_start"])
        return batch

    def _check(self, tokens: np.ndarray) -> None:
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"the data holds token {high if high >= self._vocab_size else low}, outside the model's vocabulary of "
                f"{self._vocab_size}; it was made with another tokenizer: give the right --tokenizer-model, "
                f"--vocab-size or --padded-vocab-size"
            )


def get_batch_on_this_cp_rank(batch: dict[str, np.ndarray], cp_group: Group) -> dict[str, np.ndarray]:
    """Return this rank's positions of a batch, as Megatron-LM's function of this name does.

    Labels are cut like tokens, so they are shifted before: the label of a chunk's last token is the next chunk's first.

    Args:
        batch: arrays [B, S] by name.
        cp_group: the ranks that share the sequences.

    Raises:
        ConfigError: the sequences cannot be cut (see `layout.sequence`).
    """
    return {name: cut(array, cp_group.size, cp_group.rank) for name, array in batch.items()}


def make_batch_source(
    dataset: Any,
    consumed_samples: int,
    config: AllConfig,
    context: ParallelContext,
    num_chunks: int,
    external: bool = False,
    wraps: bool = False,
) -> BatchSource:
    """Return this rank's microbatches of `dataset`, starting after `consumed_samples`.

    Args:
        dataset: samples by number, or with `dataloader_type="external"` an iterator of NumPy microbatches.
        consumed_samples: samples all ranks have seen before.
        config: the run.
        context: this rank's groups.
        num_chunks: model chunks on this rank.
        external: `dataset` is an iterator of NumPy microbatches whatever `dataloader_type` says.
        wraps: after the last sample comes the first (evaluations; training data must suffice).
    """
    data = config.dataset_config
    needs = stage_needs_data(context.is_first_stage, context.is_last_stage, data.reset_attention_mask)
    loader = None
    if needs and context.tp.rank == 0:
        loader = build_pretraining_data_loader(
            dataset,
            consumed_samples,
            micro_batch_size=data.batch_size,
            data_parallel_rank=context.dp.rank,
            data_parallel_size=context.dp.size,
            dataloader_type="external" if external else data.dataloader_type,
            num_workers=data.num_workers,
            drop_last=data.drop_remainder,
            wraps=wraps,
        )
    return BatchSource(loader, config, context, num_chunks, needs)


def _int32(array: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(array, np.int32), ms.int32)
