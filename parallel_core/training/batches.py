"""From dataset to the tensors of a microbatch, on the ranks that need them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.comm.interface import Group
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.data import (
    TensorParallelBatches,
    build_pretraining_data_loader,
    fields_of,
    stage_needs_data,
)
from parallel_core.errors import DataError
from parallel_core.layout.sequence import cut
from parallel_core.ops import raw
from parallel_core.ops.documents import remember
from parallel_core.tensor_parallel.checks import id_outside

TensorBatch = dict[str, Tensor | None]
"""tokens, labels, position_ids, document_start (the first position that each may see): int32 [B, S]; loss_mask: float32
[B, S]. None where a stage does not need it, or where it says nothing (positions 0..S-1, plain causal attention)."""


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
        reads_alone: every rank has a loader of its own.
    """

    def __init__(
        self,
        loader: Iterator[dict[str, np.ndarray]] | None,
        config: AllConfig,
        context: ParallelContext,
        num_chunks: int,
        needs_data: bool,
        reads_alone: bool = False,
    ) -> None:
        data = config.dataset_config
        self._keep_positions = data.reset_position_ids
        self._cp = context.cp
        self._keep_mask = data.reset_attention_mask
        self._vocab_size = config.model_config.vocab_size
        self._loader = loader
        self._queues: list[deque[TensorBatch]] = [deque() for _ in range(num_chunks)]
        self._batches: Iterator[dict[str, np.ndarray]] | None = loader
        self._fields = fields_of(config.model_config.bert.bert_head, config.model_config.num_labels)
        if needs_data and context.tp.size > 1 and not reads_alone:
            self._batches = TensorParallelBatches(
                loader,
                lambda array: context.tp.broadcast_(Tensor(array)).asnumpy(),
                micro_batch_size=data.batch_size,
                sequence_length=config.model_config.seq_length,
                has_document_start=data.reset_attention_mask,
                fields=self._fields,
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
        usual = ("tokens", "labels", "loss_mask", "position_ids", "document_start")
        empty: TensorBatch = dict.fromkeys(self._fields or usual)
        if not self._needs_data:
            return empty
        if self._batches is None:
            raise DataError("there is nothing to train on: its share of the data is empty (--split), or none is given")
        try:
            arrays = next(self._batches)
        except StopIteration:
            raise DataError(
                "the data is used up: the dataset holds fewer samples than the run asks for; give --train-iters or "
                "--train-samples that fit, more data, or --dataloader-type cyclic; of batches of one's own give what "
                "can be iterated again (a list, a class with __iter__) in place of an iterator"
            ) from None
        self._check(arrays["tokens"])
        if self._fields:
            return {name: _tensor(array) for name, array in arrays.items()}
        return self._tensors(arrays, empty)

    def _tensors(self, arrays: dict[str, np.ndarray], empty: TensorBatch) -> TensorBatch:
        """Return this rank's part of the sequences; document starts stay whole, because its queries see all keys."""
        whole = {name: arrays[name] for name in ("tokens", "labels", "loss_mask")}
        if self._keep_positions:
            counted = np.broadcast_to(np.arange(whole["tokens"].shape[1]), whole["tokens"].shape)
            whole["position_ids"] = arrays.get("position_ids", counted)
        part = get_batch_on_this_cp_rank(whole, self._cp)
        batch: TensorBatch = {
            **empty,
            "tokens": _int32(part["tokens"]),
            "labels": _int32(part["labels"]),
            "loss_mask": raw.on(np.array(part["loss_mask"], np.float32, order="C")),
        }
        if self._keep_positions:
            batch["position_ids"] = _int32(part["position_ids"])
        if self._keep_mask:
            batch["document_start"] = remember(_int32(arrays["document_start"]), arrays["document_start"])
        return batch

    def _check(self, tokens: np.ndarray) -> None:
        if (outside := id_outside(tokens, self._vocab_size)) is not None:
            raise DataError(
                f"the data holds token {outside}, outside the model's vocabulary of "
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
    masked = data.reset_attention_mask or config.model_config.bert.is_encoder
    needs = stage_needs_data(context.is_first_stage, context.is_last_stage, masked)
    loader, external = None, external or data.dataloader_type == "external"
    # What an NPU has sent has to be waited for on the host, so there every rank reads; an iterator may be one's own.
    alone = ms.get_context("device_target") == "Ascend" and not external
    if needs and (context.tp.rank == 0 or alone):
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
    return BatchSource(loader, config, context, num_chunks, needs, alone)


def _tensor(array: np.ndarray) -> Tensor:
    return Tensor(np.ascontiguousarray(array)) if array.dtype == np.float32 else _int32(array)


def _int32(array: np.ndarray) -> Tensor:
    return raw.on(np.array(array, np.int32, order="C"))
