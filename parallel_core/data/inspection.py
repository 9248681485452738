"""What is in a dataset, and which samples each rank would see first: the text of `python -m parallel_core.data`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parallel_core.data.builder import Dataset
from parallel_core.data.indexed_dataset import IndexedDataset
from parallel_core.data.samplers import MegatronPretrainingRandomSampler, MegatronPretrainingSampler
from parallel_core.data.tokenizer import MegatronTokenizer

_BAR = 40


def describe_files(dataset: IndexedDataset) -> Iterator[str]:
    """Yield lines on the size of a `.bin/.idx` pair and the histogram of its document lengths."""
    bounds = dataset.document_indices
    token_ends = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))
    lengths = np.diff(token_ends[bounds])
    yield f"{dataset.path_prefix}"
    yield f"  documents  {dataset.num_documents:>15,}"
    yield f"  sequences  {len(dataset):>15,}"
    yield f"  tokens     {dataset.num_tokens:>15,}   stored as {dataset.dtype}"
    if not len(lengths):
        return
    quantiles = np.percentile(lengths, [0, 50, 90, 99, 100]).astype(np.int64)
    yield "  tokens per document: " + ", ".join(
        f"{name} {value:,}" for name, value in zip(("min", "median", "90%", "99%", "max"), quantiles)
    ) + f", mean {lengths.mean():,.1f}"
    yield from length_histogram(lengths)


def length_histogram(lengths: np.ndarray) -> Iterator[str]:
    """Yield one line per power of two: range, count and a bar."""
    # lengths 0, 1, 2-3, 4-7, ...: the number of bits is the bin
    bins = np.bincount(np.frexp(lengths.astype(np.float64))[1].astype(np.int64))
    for exponent in range(int(np.flatnonzero(bins)[0]), len(bins)):
        low, high = (1 << exponent) >> 1, (1 << exponent) - 1
        name = f"{low:,}" if low >= high else f"{low:,}-{high:,}"
        bar = "#" * int(np.ceil(_BAR * bins[exponent] / bins.max()))
        yield f"  {name:>21} {bins[exponent]:>12,} {bar}"


def describe_documents(dataset: IndexedDataset, tokenizer: MegatronTokenizer | None, count: int) -> Iterator[str]:
    """Yield the beginnings of the first `count` sequences, decoded when a tokenizer is given."""
    for index in range(min(count, len(dataset))):
        tokens = dataset.get(index)
        shown = tokens[:48].tolist()
        yield f"  sequence {index}, {len(tokens)} tokens: {shown[:16]}{'...' if len(tokens) > 16 else ''}"
        if tokenizer is not None:
            yield f"    {tokenizer.detokenize(shown)!r}"


def count_ids_outside(dataset: IndexedDataset, vocab_size: int) -> int:
    """Return how many tokens of the dataset are no ids of a vocabulary of `vocab_size`."""
    outside = 0
    for tokens in dataset.blocks():
        outside += int(np.count_nonzero((tokens >= vocab_size) | (tokens < 0)))
    return outside


def describe_plan(dataset: Dataset, name: str) -> Iterator[str]:
    """Yield lines on how often the parts of a dataset are gone through."""
    parts = getattr(dataset, "datasets", [dataset])
    yield f"{name}: {len(dataset):,} samples"
    for part in parts:
        plan = part.plan
        final = ", the final epoch shuffled apart" if plan.separate_final_epoch else ""
        yield (
            f"  {part.dataset_path or 'mock data'}: sequences {int(part.indices[0])} to {int(part.indices[-1])}, "
            f"{plan.tokens_per_epoch:,} tokens x {plan.num_epochs} epochs = {len(part):,} samples{final}"
        )


def describe_batches(
    dataset: Dataset,
    tokenizer: MegatronTokenizer | None,
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    consumed_samples: int,
    dataloader_type: str,
    data_sharding: bool,
    num_batches: int,
) -> Iterator[str]:
    """Yield the sample numbers of the first micro-batches of every data parallel rank, and their first tokens."""
    for rank in range(data_parallel_size):
        position = (len(dataset), consumed_samples, micro_batch_size, rank, data_parallel_size)
        sampler: MegatronPretrainingSampler | MegatronPretrainingRandomSampler
        if dataloader_type == "single":
            sampler = MegatronPretrainingSampler(*position)
        else:
            sampler = MegatronPretrainingRandomSampler(*position, data_sharding=data_sharding)
        for number, indices in zip(range(num_batches), sampler):
            yield f"  data parallel rank {rank}, micro-batch {number}: samples {indices}"
            for index in indices:
                sample = dataset[index]
                shown = sample["tokens"][:12].tolist()
                text = f"  {tokenizer.detokenize(shown)!r}" if tokenizer is not None else ""
                unmasked = int(sample["loss_mask"].sum())
                yield f"    {index}: {shown}... loss on {unmasked} of {len(sample['loss_mask'])}{text}"
