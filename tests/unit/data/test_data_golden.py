"""Bit equality with what Megatron-LM core_v0.16.1 built (tests/golden/data)."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from parallel_core.data import (
    Blend,
    GPTDatasetConfig,
    IndexedDataset,
    IndexedDatasetBuilder,
    attention_mask_from_document_starts,
    build_blending_indices,
    build_pretraining_data_loader,
    build_train_valid_test_datasets,
    train_valid_test_num_samples,
)
from parallel_core.data.gpt_dataset import GPTDataset
from parallel_core.data.tokenizer import NullTokenizer

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "data"
INFO = json.loads((GOLDEN / "info.json").read_text())


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


@pytest.fixture
def corpus(tmp_path):
    for name in ("corpus_a", "corpus_b"):
        for suffix in (".bin", ".idx"):
            shutil.copy(GOLDEN / (name + suffix), tmp_path)
    return str(tmp_path / "corpus_a"), str(tmp_path / "corpus_b")


def config(tmp_path, blend, **options):
    return GPTDatasetConfig(
        random_seed=1234,
        sequence_length=32,
        tokenizer=NullTokenizer(255),
        blend=blend,
        path_to_cache=str(tmp_path / "cache"),
        **options,
    )


@pytest.mark.parametrize("name", ["corpus_a", "corpus_b"])
@pytest.mark.parametrize("mmap", [True, False])
def test_indexed_dataset_reads_megatron_files(name, mmap):
    dataset, expected = IndexedDataset(str(GOLDEN / name), mmap=mmap), golden(name)
    assert np.array_equal(dataset.sequence_lengths, expected["sequence_lengths"])
    assert np.array_equal(dataset.sequence_pointers, expected["sequence_pointers"])
    assert np.array_equal(dataset.document_indices, expected["document_indices"])
    assert dataset.num_tokens == INFO[name]["tokens"] and dataset.num_documents == INFO[name]["docs"]
    tokens = np.concatenate([dataset.get(index) for index in range(len(dataset))])
    assert np.array_equal(tokens, expected["tokens"])


@pytest.mark.parametrize("name", ["corpus_a", "corpus_b"])
def test_indexed_dataset_builder_writes_the_same_bytes(name, tmp_path):
    source, expected = IndexedDataset(str(GOLDEN / name)), golden(name)
    start = 0
    with IndexedDatasetBuilder(str(tmp_path / "copy.bin"), source.dtype) as builder:
        for length in expected["doc_lengths"]:
            builder.add_document(expected["tokens"][start : start + length], [int(length)])
            start += length
        builder.finalize(str(tmp_path / "copy.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == (GOLDEN / (name + suffix)).read_bytes()


def assert_indices_equal(dataset, expected, prefix=""):
    for name in ("document_index", "sample_index", "shuffle_index"):
        ours, theirs = getattr(dataset, name), expected[prefix + name]
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name


def assert_samples_equal(dataset, expected):
    names = {"tokens", "labels", "loss_mask", "position_ids"} | (
        {"attention_mask"} if "sample_attention_mask" in expected else set()
    )
    for index in range(len(expected["sample_tokens"])):
        sample = dataset[index]
        for name in names:
            assert np.array_equal(sample[name], expected[f"sample_{name}"][index]), (index, name)


GPT_CASES = {
    "gpt_1epoch": {},
    "gpt_none": {},
    "gpt_2epoch_noseparate": {},
    "gpt_2epoch_separate": {},
    "gpt_noextra": {"add_extra_token_to_sequence": False},
    "gpt_reset_masks": {
        "reset_position_ids": True,
        "reset_attention_mask": True,
        "eod_mask_loss": True,
        "create_attention_mask": True,
    },
}


@pytest.mark.parametrize("case", GPT_CASES)
def test_gpt_dataset(case, corpus, tmp_path):
    expected = golden(case)
    requested = int(expected["num_samples_requested"])
    options = config(tmp_path, Blend((corpus[0],)), split="1,0,0", **GPT_CASES[case])
    for _ in ("built", "from the cache"):
        dataset, valid, test = build_train_valid_test_datasets(options, (None if requested < 0 else requested, 0, 0))
        assert isinstance(dataset, GPTDataset) and valid is None and test is None
        assert len(dataset) == expected["num_samples_len"]
        assert np.array_equal(dataset.indices, expected["indexed_indices"])
        assert_indices_equal(dataset, expected)
        assert_samples_equal(dataset, expected)


def test_splits(corpus, tmp_path):
    cases = [golden(f"gpt_split_{split}") for split in ("train", "valid", "test")]
    sizes = [int(case["num_samples_requested"]) for case in cases]
    datasets = build_train_valid_test_datasets(config(tmp_path, Blend((corpus[0],)), split="80,15,5"), sizes)
    for dataset, expected in zip(datasets, cases):
        assert np.array_equal(dataset.indices, expected["indexed_indices"])
        assert_indices_equal(dataset, expected)
        assert_samples_equal(dataset, expected)


def test_blended_dataset(corpus, tmp_path):
    expected = golden("blend_0307")
    options = config(tmp_path, Blend(corpus, (0.3, 0.7)), split="1,0,0")
    for _ in ("built", "from the cache"):
        blend, _, _ = build_train_valid_test_datasets(options, (int(expected["requested"]), 0, 0))
        assert len(blend) == expected["size"]
        assert blend.dataset_index.dtype == np.int16 and blend.dataset_sample_index.dtype == np.int64
        assert np.array_equal(blend.dataset_index, expected["dataset_index"])
        assert np.array_equal(blend.dataset_sample_index, expected["dataset_sample_index"])
        for number, part in enumerate(blend.datasets):
            assert part.num_samples == expected[f"ds{number}_num_samples"]
            assert_indices_equal(part, expected, f"ds{number}_")
        assert_samples_equal(blend, expected)
        ids = [int(blend[index]["dataset_id"]) for index in range(50)]
        assert ids == expected["sample_dataset_id"].tolist()


def test_blending_helper():
    expected = golden("build_blending_indices_3")
    dataset_index, sample_index = build_blending_indices(expected["weights"], len(expected["dataset_index"]))
    assert np.array_equal(dataset_index, expected["dataset_index"])
    assert np.array_equal(sample_index, expected["dataset_sample_index"])


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ("gpt2", {}),
        ("gpt2_eodmask", {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}),
    ],
)
def test_batches_of_megatrons_training_runs(run, options, corpus, tmp_path):
    """Iterations of 4 micro-batches of 2, as `pretrain_gpt` itself fed them to the model."""
    expected = golden("training_batches")
    sizes = train_valid_test_num_samples(global_batch_size=8, train_iters=20, eval_interval=100000, eval_iters=0)
    train_config = config(tmp_path, Blend((corpus[0],)), split="100,0,0", **options)
    dataset = build_train_valid_test_datasets(train_config, sizes)[0]
    steps = sorted({int(name.split("/")[1]) for name in expected if name.startswith(run + "/")})
    assert len(steps) == 2
    for step in steps:
        with build_pretraining_data_loader(dataset, (step - 1) * 8, micro_batch_size=2) as loader:
            batches = [next(loader) for _ in range(4)]
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            ours = np.concatenate([batch[name] for batch in batches])
            assert np.array_equal(ours, expected[f"{run}/{step}/{name}"].reshape(ours.shape)), (step, name)
        if options:
            starts = np.concatenate([batch["document_start"] for batch in batches])
            masks = attention_mask_from_document_starts(starts)
            assert np.array_equal(masks, expected[f"{run}/{step}/attention_mask"].reshape(masks.shape))


class Identified(NullTokenizer):
    """What the caches of the golden folder were built with."""

    def __init__(self) -> None:
        super().__init__(255)
        self.unique_identifiers = {"class": "NullTokenizer", "tokenizer_path": "", "vocab_size": "255"}


def test_caches_are_megatrons_byte_for_byte(corpus, tmp_path, monkeypatch):
    """Names and contents: so the two programs share a cache. One corpus, a weighted blend, and one without weights.

    `megatron_cache.json` has the files that Megatron-LM core_v0.16.1 wrote for the same, asked for from this folder: a
    cache's name is a hash of the data's path, among other things.
    """
    monkeypatch.chdir(tmp_path)
    for blend in (Blend(("corpus_a",)), Blend(("corpus_a", "corpus_b"), (0.3, 0.7)), Blend(("corpus_a", "corpus_b"))):
        options = GPTDatasetConfig(
            random_seed=1234, sequence_length=32, tokenizer=Identified(), blend=blend, split="90,8,2",
            path_to_cache="cache",
        )  # fmt: skip
        build_train_valid_test_datasets(options, (200, 20, 10))
    written = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pathlib.Path("cache").iterdir()}
    expected = json.loads((GOLDEN / "megatron_cache.json").read_text())
    assert {name: written.get(name) for name in expected} == expected
    assert all(name.endswith((".lock", "-source.txt")) for name in set(written) - set(expected))
