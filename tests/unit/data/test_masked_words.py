"""BERT's samples are Megatron's: the same sentences in the same order, the same words masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parallel_core.data import Blend, IndexedDataset, IndexedDatasetBuilder, Split, build_train_valid_test_datasets
from parallel_core.data.data_order import data_order_fingerprint, describe_data_order
from parallel_core.data.masked_words import MaskedWordsConfig, MaskedWordsDataset, mask_words
from parallel_core.data.mersenne import Mersenne32, Mersenne64
from parallel_core.data.parallel_batch import ENCODER_FIELDS, SPAN_FIELDS, pack_batch, unpack_batch
from parallel_core.data.tokenizer import NullTokenizer, build_tokenizer
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError, DataError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
VOCAB = str(GOLDEN / "squad" / "vocab.txt")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """40 documents of 0 to 8 sentences, one of them with a sentence that is too long."""
    prefix, rng = str(tmp_path_factory.mktemp("data") / "d"), np.random.default_rng(0)
    with IndexedDatasetBuilder(f"{prefix}.bin", np.uint16) as builder:
        for number in range(40):
            lengths = rng.integers(1, 20, int(rng.integers(0, 9))).tolist()
            lengths = [600, 4, 5] if number == 7 else lengths
            builder.add_document(rng.integers(5, 461, sum(lengths)), lengths)
        builder.finalize(f"{prefix}.idx")
    return prefix


def config_of(prefix: str, **options) -> MaskedWordsConfig:
    usual = {"random_seed": 7, "sequence_length": 40, "blend": Blend((prefix,)), "split": "1,0,0",
             "tokenizer": build_tokenizer("BertWordPieceLowerCase", vocab_file=VOCAB)}  # fmt: skip
    return MaskedWordsConfig(**{**usual, **options})


def dataset_of(prefix: str, **options) -> MaskedWordsDataset:
    indices = np.arange(40, dtype=np.int32)
    return MaskedWordsDataset(IndexedDataset(prefix), prefix, indices, 150, Split.train, config_of(prefix, **options))


@pytest.mark.parametrize("head", [True, False], ids=["two segments", "words alone"])
def test_samples_are_megatrons(prefix, head):
    """Frozen from megatron-core 0.16.1's BERTMaskedWordPieceDataset."""
    frozen, dataset = np.load(GOLDEN / "data" / "masked_words.npz"), dataset_of(prefix, classification_head=head)
    np.testing.assert_array_equal(dataset.sample_index, frozen[f"idx{head}"])
    for number in range(60):
        for name, value in dataset[number].items():
            np.testing.assert_array_equal(value, frozen[f"{name}{head}"][number], err_msg=f"{name} of {number}")


def test_generators_are_those_of_the_standard():
    """The 10000th number after the default seed, as the C++ standard gives it."""
    for draws, wanted in ((Mersenne32(5489), 4123659995), (Mersenne64(5489), 9981545732273789042)):
        assert [draws.next() for _ in range(10000)][-1] == wanted


def test_shares_of_masked_words_and_of_short_samples(prefix):
    lengths = {share: dataset_of(prefix, short_sequence_probability=share).sample_index[:, 2] for share in (0.0, 0.5)}
    assert set(lengths[0.0].tolist()) == {37} and 0.2 < (lengths[0.5] < 37).mean() < 0.8
    asked = {}
    for share in (0.15, 0.4):
        dataset = dataset_of(prefix, masking_probability=share, short_sequence_probability=0.0)
        samples = [dataset[number] for number in range(100)]
        asked[share] = sum(s["loss_mask"].sum() for s in samples) / sum(s["attention_mask"].sum() for s in samples)
    assert 0.10 < asked[0.15] <= 0.16 and 0.3 < asked[0.4] <= 0.41


def test_whole_words_are_masked_and_the_marks_never():
    tokenizer = build_tokenizer("BertWordPieceLowerCase", vocab_file=VOCAB)
    assert isinstance(tokenizer, BertWordPieceTokenizer)
    tokens = [2, *tokenizer.tokenize("Elise Brandt repaired the town clock of a valley") * 3, 3]
    for seed in range(20):
        masked, positions = mask_words(tokens, 60, np.random.RandomState(seed), tokenizer, 0.3)
        assert positions and 0 not in positions and len(tokens) - 1 not in positions
        assert [t for p, t in enumerate(masked) if p not in positions] == [
            t for p, t in enumerate(tokens) if p not in positions
        ]
        inside = [p for p in range(len(tokens)) if tokenizer.continues[tokens[p]]]
        assert all((p - 1 in positions) == (p in positions) for p in inside)


def test_the_index_is_cached_and_made_again_for_other_data(prefix, tmp_path):
    assert dataset_of(prefix, path_to_cache=str(tmp_path)).built_anew_on_cache_miss
    again = dataset_of(prefix, path_to_cache=str(tmp_path))
    assert not again.built_anew_on_cache_miss and len(again) == 184
    assert dataset_of(prefix, path_to_cache=str(tmp_path), random_seed=8).built_anew_on_cache_miss


def test_another_number_of_epochs_is_another_order(prefix):
    orders = [data_order_fingerprint(describe_data_order(dataset_of(prefix, **more))) for more in
              ({}, {}, {"random_seed": 8}, {"masking_probability": 0.2})]  # fmt: skip
    assert orders[0] == orders[1] and len(set(orders)) == 3


def test_splits_are_of_documents_and_what_cannot_be_is_told(prefix, tmp_path):
    train, valid, test = build_train_valid_test_datasets(config_of(prefix, split="50,50,0"), (20, 20, 0))
    assert test is None and train is not None and valid is not None
    bound = IndexedDataset(prefix).document_indices[20]
    assert train.sample_index[:, 1].max() <= bound <= valid.sample_index[:, 0].min()
    with pytest.raises(ConfigError, match="BertWordPieceLowerCase"):
        config_of(prefix, tokenizer=NullTokenizer(460))
    one = str(tmp_path / "one")
    with IndexedDatasetBuilder(f"{one}.bin", np.uint16) as builder:
        builder.add_document(np.array([5, 6]), [2])
        builder.finalize(f"{one}.idx")
    with pytest.raises(DataError, match="--split-sentences, or give --bert-no-binary-head"):
        build_train_valid_test_datasets(config_of(one), (4, 0, 0))
    with pytest.raises(DataError, match="outside the vocabulary of 461"):
        big = str(tmp_path / "big")
        with IndexedDatasetBuilder(f"{big}.bin", np.uint16) as builder:
            builder.add_document(np.array([5, 600, 7]), [2, 1])
            builder.finalize(f"{big}.idx")
        build_train_valid_test_datasets(config_of(big), (4, 0, 0))[0][0]


@pytest.mark.parametrize("fields", [ENCODER_FIELDS, SPAN_FIELDS], ids=["masked words", "spans"])
def test_batches_come_whole_to_the_other_ranks(fields):
    rng, batch = np.random.default_rng(0), {}
    for name in fields:
        shape = (3,) if name in ("is_random", "start_positions", "end_positions") else (3, 5)
        batch[name] = rng.random(shape, np.float32) if name == "loss_mask" else rng.integers(0, 9, shape, np.int32)
    back = unpack_batch(pack_batch(batch, fields), 3, 5, False, fields)
    assert list(back) == list(fields)
    for name, value in batch.items():
        np.testing.assert_array_equal(back[name], value)
